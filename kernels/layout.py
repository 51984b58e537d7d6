"""How tensors lie in memory: their order, gaps in it, and what lists of them have in common."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# 16-byte loads and stores need addresses that are multiples of this.
ALIGNMENT = 16

# Of a tensor: its dtype, and whether its address is a multiple of ALIGNMENT. None: no tensor.
Kind = tuple[torch.dtype, bool] | None


def memory_order(tensor: Tensor) -> tuple[int, ...]:
    """Return the strides of the dimensions longer than 1: equal for tensors that lie alike."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return tuple(stride for size, stride in sizes if size != 1)


def is_dense(tensor: Tensor) -> bool:
    """Return whether the elements fill one piece of memory, each once, in whatever order."""
    if not tensor.numel():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def check_dense(name: str, tensor: Tensor) -> None:
    """Check that the elements of ``tensor`` fill its memory, each once.

    Raises:
        ValueError: if not.
    """
    if not is_dense(tensor):
        raise ValueError(
            f"{name}: expected a tensor whose elements fill its memory without gaps, got shape "
            f"{list(tensor.shape)} with strides {tensor.stride()}. Pass a copy, such as "
            "tensor.contiguous()."
        )


def kind_of(tensor: Tensor | None) -> Kind:
    """Return dtype and alignment of a tensor; None without one."""
    return None if tensor is None else (tensor.dtype, tensor.data_ptr() % ALIGNMENT == 0)


class Layout:
    """What a list keeps when it points to other tensors; equal for lists that plans can share.

    Attributes:
        shapes: of each tensor; None where there is none, here and below.
        orders: memory order of each tensor.
        kinds: dtype of each tensor, and whether it is aligned.
        is_complete: whether no tensor is missing.
        is_floating: whether all dtypes are floating.
        sizes: number of elements of each tensor, 0 where there is none.
    """

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        self.shapes = tuple(None if t is None else t.shape for t in tensors)
        self.orders = tuple(None if t is None else memory_order(t) for t in tensors)
        self.kinds = tuple(map(kind_of, tensors))
        self.is_complete = None not in self.kinds
        self.is_floating = all(kind is None or kind[0].is_floating_point for kind in self.kinds)
        self.sizes = tuple(0 if t is None else t.numel() for t in tensors)
        # Plans are found by it at each call.
        self._hash = hash((self.shapes, self.orders, self.kinds))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Layout)
            and self._hash == other._hash
            and (self.shapes, self.orders, self.kinds) == (other.shapes, other.orders, other.kinds)
        )
