"""BatchNorm on a tape, whose parts of a batch are normalised apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from .tape_base import Ask, Layer, Pullback, Stack, joined, names_of, put, taken, tensors_of
from .trace import UnsupportedNetworkError

aten = torch.ops.aten

# From gradients of the output for a range of parts, and which of them are needed, to those of
# input, weight and bias.
Derivatives = Callable[[Tensor, range, tuple[bool, ...]], tuple[Tensor, Tensor, Tensor]]


class BatchNorm(Layer):
    """``nn.BatchNorm2d``, in training or evaluation mode as its module is at each forward pass."""

    def __init__(self, name: str, module: nn.BatchNorm2d) -> None:
        if module.momentum is None or module.running_mean is None or not module.affine:
            raise UnsupportedNetworkError(
                f"{name} is a BatchNorm without momentum, running statistics or weights, "
                "which no tape knows"
            )
        self.name = name
        self.names = names_of(name, module)
        self.module = module
        self.momentum = module.momentum

    @property
    def counter(self) -> Tensor | None:
        """The module's ``num_batches_tracked`` if it trains."""
        return self.module.num_batches_tracked if self.module.training else None

    def forward(
        self, weights: Mapping[str, Tensor], parts: int, *inputs: Tensor
    ) -> tuple[Tensor, Pullback]:
        """Return normalised features [N, C, H, W]; update running statistics if training.

        Each part has its own statistics then, and updates the running ones, in order.
        """
        (x,) = inputs
        weight, bias = tensors_of(weights, self.names)
        self.check_size(x, parts)
        apart = self.module.training and parts > 1
        if apart:
            y, derivatives = self._apart(x, weight, bias, parts)
        else:
            y, derivatives = self._whole(x, weight, bias)
        return y, partial(self._backward, weight, derivatives, apart)

    def check_size(self, x: Tensor, parts: int) -> None:
        """Refuse features [N, C, H, W] with one value per channel, which has no variance.

        Raises:
            ValueError: for those, in training mode.
        """
        if self.module.training and x.numel() == parts * x.shape[1]:
            raise ValueError(
                f"BatchNorm: expected more than one value per channel, got {list(x.shape)}; "
                "give a larger batch or larger images"
            )

    def _whole(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Derivatives]:
        """Normalise by one set of statistics.

        ``_batch_norm_impl_index`` is what ``F.batch_norm`` calls, and takes cuDNN's kernels where
        that would take them.
        """
        running, training, eps = self._running, self.module.training, self.module.eps
        y, mean, deviation, reserve, implementation = aten._batch_norm_impl_index(
            x, weight, bias, *running, training, self.momentum, eps, torch.backends.cudnn.enabled
        )

        def derivatives(
            rows: Tensor, parts: range, mask: tuple[bool, ...]
        ) -> tuple[Tensor, Tensor, Tensor]:
            # Some parts alone are asked for in evaluation mode, where images know nothing of one
            # another. cuDNN may write into its reserve, so each call has its own.
            read = taken(x, parts, len(rows) // len(parts))
            return aten._batch_norm_impl_index_backward(
                *(implementation, read, rows, weight, *running, mean, deviation),
                *(training, eps, mask, reserve.clone()),
            )

        return y, derivatives

    def _apart(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, parts: int
    ) -> tuple[Tensor, Derivatives]:
        """Normalise each part by its own statistics, into one output.

        By ATen's own kernels: cuDNN's can neither write into part of a tensor nor share a reserve.
        """
        running, eps = self._running, self.module.eps
        wide = torch.promote_types(x.dtype, weight.dtype)
        if x.is_cuda:
            # There statistics are what is summed in; on the CPU the wider of both.
            wide = torch.promote_types(wide, torch.float32)
        y = torch.empty_like(x)
        kept: list[tuple[Tensor, Tensor, Tensor]] = []
        for read, into in zip(x.chunk(parts), y.chunk(parts), strict=True):
            mean, deviation = (x.new_empty(x.shape[1], dtype=wide) for _ in range(2))
            aten.native_batch_norm.out(
                *(read, weight, bias, *running, True, self.momentum, eps),
                out=into,
                save_mean=mean,
                save_invstd=deviation,
            )
            kept.append((read, mean, deviation))

        def derivatives(
            rows: Tensor, parts: range, mask: tuple[bool, ...]
        ) -> tuple[Tensor, Tensor, Tensor]:
            read, *statistics = kept[parts.start]
            return aten.native_batch_norm_backward(
                rows, read, weight, *running, *statistics, True, eps, mask
            )

        return y, derivatives

    @property
    def _running(self) -> tuple[Tensor | None, Tensor | None]:
        return self.module.running_mean, self.module.running_var

    def _backward(
        self, weight: Tensor, derivatives: Derivatives, apart: bool, gradient: Stack, ask: Ask
    ) -> Stack | None:
        below = []
        for number, parts, rows in gradient.blocks() if apart else gradient.each():
            masks = tuple(name in ask.wanted[number] for name in self.names)
            passed = (number, parts.start) in ask.below
            to_input, *found = derivatives(rows, parts, (passed, *masks))
            if passed:
                below.append(to_input)
            put(
                ask.found[number],
                self.names,
                [one if mask else None for one, mask in zip(found, masks, strict=True)],
                weight,
            )
        return joined(below, ask.below)
