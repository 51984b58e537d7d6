"""The layers of a :class:`~cure_fast.engine.tape.Tape`: forward, and backward for a stack.

See :class:`~cure_fast.engine.tape_base.Layer` for what a layer does.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from cure_fast.models import ImageClassifier, thin_first

from .tape_base import (
    Ask,
    Layer,
    Pullback,
    Stack,
    empty_rows,
    joined,
    names_of,
    put,
    taken,
    tensors_of,
)
from .tape_norm import BatchNorm
from .trace import RELUS, SUMS, UnsupportedNetworkError

aten = torch.ops.aten


class Convolution(Layer):
    """``nn.Conv2d``: one input gradient for all cotangents, a weight gradient for each."""

    def __init__(self, name: str, module: nn.Conv2d) -> None:
        if isinstance(module.padding, str) or module.padding_mode != "zeros":
            raise UnsupportedNetworkError(
                f"{name} pads by name or with other values than zeros, which no tape knows"
            )
        self.names = names_of(name, module)
        self.geometry = (module.stride, module.padding, module.dilation)
        self.groups = module.groups
        self.thin = thin_first(module)

    def forward(
        self, weights: Mapping[str, Tensor], parts: int, *inputs: Tensor
    ) -> tuple[Tensor, Pullback]:
        """Return features [N, O, H', W'] of features [N, I, H, W]."""
        (x,) = inputs
        weight, bias = tensors_of(weights, self.names)
        read, geometry = self._read(x)
        y = F.conv2d(read, weight, bias, *geometry, self.groups)
        return y, partial(self._backward, x, weight)

    def _backward(self, x: Tensor, weight: Tensor, gradient: Stack, ask: Ask) -> Stack | None:
        for number, parts, rows in gradient.each():
            masks = tuple(name in ask.wanted[number] for name in self.names)
            if any(masks):
                read = taken(x, parts, gradient.size)
                found = self._derivatives(rows, read, weight, (False, *masks, False)[:3])[1:]
                put(ask.found[number], self.names, found, weight)
        if not ask.below:
            return None
        rows = gradient.only(ask.below).rows
        # Only the shape and layout of the input count for the input's gradient.
        unread = empty_rows(x, len(rows))
        return Stack(self._derivatives(rows, unread, weight, (True, False, False))[0], ask.below)

    def _derivatives(
        self, rows: Tensor, x: Tensor, weight: Tensor, mask: tuple[bool, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        sizes = [len(weight)] if len(self.names) > 1 else None
        read, geometry = self._read(x)
        to_input, *others = aten.convolution_backward(
            rows, read, weight, sizes, *geometry, False, (0, 0), self.groups, mask
        )
        if mask[0] and self.thin is not None and read is not x:
            to_read, to_input = to_input, torch.zeros_like(x)
            self.thin.thinned(to_input).copy_(to_read)
        return to_input, *others

    def _read(self, x: Tensor) -> tuple[Tensor, tuple[Any, Any, Any]]:
        """Return what the convolution reads of its input, and its geometry there."""
        if self.thin is None or x.device.type != "cpu":
            return x, self.geometry
        return self.thin.thinned(x), ((1, 1), self.geometry[1], self.geometry[2])


class Linear(Layer):
    """``nn.Linear`` of features [N, F]."""

    def __init__(self, name: str, module: nn.Linear) -> None:
        self.name = name
        self.names = names_of(name, module)

    def forward(
        self, weights: Mapping[str, Tensor], parts: int, *inputs: Tensor
    ) -> tuple[Tensor, Pullback]:
        """Return outputs [N, O] of features [N, F]."""
        (x,) = inputs
        if x.dim() != 2:
            raise UnsupportedNetworkError(
                f"{self.name} takes {list(x.shape)}, and a tape knows linear layers of [N, F] alone"
            )
        weight, bias = tensors_of(weights, self.names)
        return F.linear(x, weight, bias), partial(self._backward, x, weight)

    def _backward(self, x: Tensor, weight: Tensor, gradient: Stack, ask: Ask) -> Stack | None:
        for number, parts, rows in gradient.each():
            masks = [name in ask.wanted[number] for name in self.names] + [False]
            to_weight = rows.t() @ taken(x, parts, gradient.size) if masks[0] else None
            to_bias = rows.sum(0) if masks[1] else None
            put(ask.found[number], self.names, (to_weight, to_bias), weight)
        if not ask.below:
            return None
        return Stack(gradient.only(ask.below).rows @ weight, ask.below)


class ReLU(Layer):
    """Rectifier; its output tells where the gradient passes, once for all cotangents."""

    def forward(
        self, weights: Mapping[str, Tensor], parts: int, *inputs: Tensor
    ) -> tuple[Tensor, Pullback]:
        """Return the input with zeros for its negative values."""
        y = F.relu(inputs[0])
        return y, partial(self._backward, y)

    @staticmethod
    def _backward(y: Tensor, gradient: Stack, ask: Ask) -> Stack | None:
        out = Stack(empty_rows(y, len(gradient.rows)), gradient.of)
        for (count, parts, rows), (_, _, into) in zip(
            gradient.repeats(), out.repeats(), strict=True
        ):
            read = taken(y, parts, gradient.size)
            # One call for each: a GPU reads dense memory in wide accesses, and expanded not.
            for some, place in zip(rows.chunk(count), into.chunk(count), strict=True):
                aten.threshold_backward.grad_input(some, read, 0, grad_input=place)
        return out


class MaxPool(Layer):
    """``nn.MaxPool2d``."""

    def __init__(self, name: str, module: nn.MaxPool2d) -> None:
        if module.return_indices:
            raise UnsupportedNetworkError(f"{name} returns indices, which no tape knows")
        self.geometry = (module.kernel_size, module.stride, module.padding, module.dilation)
        self.ceil_mode = module.ceil_mode

    def forward(
        self, weights: Mapping[str, Tensor], parts: int, *inputs: Tensor
    ) -> tuple[Tensor, Pullback]:
        """Return the maxima [N, C, H', W'] of features [N, C, H, W]."""
        (x,) = inputs
        y, indices = aten.max_pool2d_with_indices(x, *self.geometry, self.ceil_mode)
        return y, partial(self._backward, x, indices)

    def _backward(self, x: Tensor, indices: Tensor, gradient: Stack, ask: Ask) -> Stack | None:
        below = []
        for count, parts, rows in gradient.repeats():
            read, places = (taken(kept, parts, gradient.size) for kept in (x, indices))
            options = (*self.geometry, self.ceil_mode, places)
            below += [
                aten.max_pool2d_with_indices_backward(some, read, *options)
                for some in rows.chunk(count)
            ]
        return joined(below, gradient.of)


class Mean(Layer):
    """Mean over all positions."""

    def forward(
        self, weights: Mapping[str, Tensor], parts: int, *inputs: Tensor
    ) -> tuple[Tensor, Pullback]:
        """Return features [N, C] of features [N, C, H, W]."""
        (x,) = inputs
        return x.mean(dim=(2, 3)), partial(self._backward, x)

    @staticmethod
    def _backward(x: Tensor, gradient: Stack, ask: Ask) -> Stack | None:
        share = gradient.rows / math.prod(x.shape[2:])
        out = empty_rows(x, len(gradient.rows))
        return Stack(out.copy_(share[:, :, None, None]), gradient.of)


class Sum(Layer):
    """Sum of two values; the gradient goes to both."""

    def forward(
        self, weights: Mapping[str, Tensor], parts: int, *inputs: Tensor
    ) -> tuple[Tensor, Pullback]:
        """Return the sum of two tensors of one shape."""
        first, second = inputs
        if first.shape != second.shape:
            raise UnsupportedNetworkError(
                f"a sum of {list(first.shape)} and {list(second.shape)}, and a tape knows sums of "
                "equal shapes alone"
            )
        return first + second, self._backward

    @staticmethod
    def _backward(gradient: Stack, ask: Ask) -> Stack | None:
        return gradient


def layer_of(node: fx.Node, model: ImageClassifier) -> Layer:
    """Return the layer that computes ``node`` of a graph that :func:`.trace.trace` returned.

    Raises:
        UnsupportedNetworkError: for a use of a known operation that a tape does not know.
    """
    if node.op == "call_module":
        name = str(node.target)
        module = model.get_submodule(name)
        if isinstance(module, nn.ReLU):
            _refuse_overwriting(node, module.inplace)
            return ReLU()
        kinds = {
            nn.Conv2d: Convolution,
            nn.BatchNorm2d: BatchNorm,
            nn.Linear: Linear,
            nn.MaxPool2d: MaxPool,
        }
        return kinds[type(module)](name, module)
    options = dict(node.kwargs)
    if node.op == "call_method":
        del options["dim"]
        layer = Mean()
    elif node.target in RELUS:
        _refuse_overwriting(node, bool(options.pop("inplace", False)))
        layer = ReLU()
    else:
        assert node.target in SUMS, node.target
        _refuse_overwriting(node, node.target is operator.iadd)
        layer = Sum()
    operands = 2 if isinstance(layer, Sum) else 1
    if options or len(node.args) != operands or not all(isinstance(a, fx.Node) for a in node.args):
        raise UnsupportedNetworkError(
            f"{node.name} has a constant operand or an option, which no tape knows"
        )
    return layer


def _refuse_overwriting(node: fx.Node, in_place: bool) -> None:
    """Refuse an operation in place on a value that another operation reads as well."""
    if in_place and len(node.all_input_nodes[0].users) > 1:
        raise UnsupportedNetworkError(
            f"{node.name} overwrites a value that is used again, which no tape knows"
        )
