"""Layers of a tape written out in elementary operations, which a compiler can fuse.

They compute what :mod:`~cure_fast.engine.tape_norm` and :mod:`~cure_fast.engine.tape_layers` leave
to ATen's own kernels, whose insides no compiler sees. Uncompiled they are slow.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .tape_base import Ask, Layer, Pullback, Stack, joined, put, taken, tensors_of
from .tape_layers import ReLU
from .tape_norm import BatchNorm

# Of [parts, M, C, H, W]: all but parts and channels.
OVER = (1, 3, 4)


class FormulaReLU(ReLU):
    """Rectifier."""

    def forward(
        self, weights: Mapping[str, Tensor], parts: int, *inputs: Tensor
    ) -> tuple[Tensor, Pullback]:
        """Return the input with zeros for its negative values."""
        y = F.relu(inputs[0])
        return y, partial(self._passed_back, y)

    @staticmethod
    def _passed_back(y: Tensor, gradient: Stack, ask: Ask) -> Stack | None:
        below = []
        for count, parts, rows in gradient.repeats():
            read = taken(y, parts, gradient.size)
            each = rows.unflatten(0, (count, len(read)))
            below.append(torch.where(read <= 0, 0, each).flatten(0, 1))
        return joined(below, gradient.of)


class FormulaBatchNorm(BatchNorm):
    """``nn.BatchNorm2d``, in training or evaluation mode as its module is at each forward pass."""

    def forward(
        self, weights: Mapping[str, Tensor], parts: int, *inputs: Tensor
    ) -> tuple[Tensor, Pullback]:
        """Return normalised features [N, C, H, W]; update running statistics if training.

        Each part has its own statistics then, and updates the running ones, in order.

        Args:
            weights: by name, the running statistics too.
            parts: equal parts of the batch.
            inputs: features [N, C, H, W].
        """
        (x,) = inputs
        self.check_size(x, parts)
        training, prefix = self.module.training, self.name
        running = weights[f"{prefix}.running_mean"], weights[f"{prefix}.running_var"]
        each = x.unflatten(0, (parts, len(x) // parts)).to(_wide(x))
        if training:
            variance, mean = torch.var_mean(each, dim=OVER, correction=0)
            self._update(running, mean, variance, each.numel() // mean.numel())
        else:
            mean, variance = (some.to(each.dtype).expand(parts, -1) for some in running)
        deviation = (variance + self.module.eps).rsqrt()
        weight, bias = tensors_of(weights, self.names)
        y = (each - _spread(mean)) * _spread(deviation * weight)
        if bias is not None:
            y = y + _spread(bias[None])
        y = y.to(x.dtype).flatten(0, 1)
        return y, partial(self._derived, training, x, mean, deviation, weight)

    def _update(
        self, running: tuple[Tensor, Tensor], mean: Tensor, variance: Tensor, count: int
    ) -> None:
        """Move the running statistics towards those of each part in turn."""
        unbiased = variance * (count / (count - 1))
        for some in zip(mean, unbiased, strict=True):
            for kept, new in zip(running, some, strict=True):
                kept.lerp_(new.to(kept.dtype), self.momentum)

    def _derived(
        self,
        training: bool,
        x: Tensor,
        mean: Tensor,
        deviation: Tensor,
        weight: Tensor,
        gradient: Stack,
        ask: Ask,
    ) -> Stack | None:
        """Fill in the gradients of weight and bias, and return those of the input.

        Args:
            training: whether mean and deviation were those of ``x``.
            x: [N, C, H, W].
            mean: [parts, C].
            deviation: the inverse of the standard deviation, [parts, C].
            weight: [C].
            gradient: of the output.
            ask: what is needed.
        """
        below: list[Tensor] = []
        blocks = iter(gradient.of)
        for count, parts, rows in gradient.repeats():
            some = slice(parts.start, parts.stop)
            given = rows.unflatten(0, (count, len(parts), gradient.size)).to(_wide(x))
            read = taken(x, parts, gradient.size)
            each = read.unflatten(0, (len(parts), gradient.size)).to(_wide(x))
            normal = (each - _spread(mean[some])) * _spread(deviation[some])
            to_bias = given.sum(dim=(2, 4, 5))
            to_weight = (given * normal).sum(dim=(2, 4, 5))
            if training:
                share = each.numel() // each.shape[2] // len(parts)
                given = given - _spread(to_bias / share) - normal * _spread(to_weight / share)
            out = given * _spread(deviation[some] * weight)
            # Flat first: a compiler lays out what it stores by the shape that is cast, and takes
            # images of four dimensions for channels_last.
            below.append(out.flatten(0, 2).to(x.dtype))
            found = (t.flatten(0, 1).to(weight.dtype) for t in (to_weight, to_bias))
            for own in zip(*found, strict=True):
                number, _ = next(blocks)
                masks = (name in ask.wanted[number] for name in self.names)
                chosen = [one if mask else None for one, mask in zip(own, masks, strict=False)]
                put(ask.found[number], self.names, chosen, weight)
        stack = joined(below, gradient.of)
        return stack.only(ask.below) if stack is not None and ask.below else None


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _spread(values: Tensor) -> Tensor:
    """Return [..., C] as [..., 1, C, 1, 1], to stand beside images."""
    return values[..., None, :, None, None]


def formula_of(layer: Layer) -> Layer:
    """Return the layer that computes the same in elementary operations; others as they are."""
    if type(layer) is BatchNorm:
        return FormulaBatchNorm(layer.name, layer.module)
    return FormulaReLU() if type(layer) is ReLU else layer
