"""Checks of arguments: every error names the argument, what was expected, what came, what to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import SupportsFloat

import torch
from torch import Tensor

# A chunk's elements and an order statistic's rank are 32-bit integers on the device.
MOST_ELEMENTS = 2**31 - 1


def check_number(name: str, value: object, low: float, high: float = float("inf")) -> float:
    """Return ``value`` as a float in [low, high].

    Raises:
        TypeError: if it is no number.
        ValueError: if it is out of range or NaN.
    """
    wanted = f"[{low:g}, {high:g}]" if high != float("inf") else f"[{low:g}, inf)"
    if isinstance(value, bool) or not isinstance(value, SupportsFloat) or isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a number in {wanted}, got {type(value).__name__}.")
    number = float(value)
    if not low <= number <= high or number == float("inf"):
        raise ValueError(f"{name}: expected a number in {wanted}, got {number:g}.")
    return number


def per_tensor(
    name: str, value: float | Sequence[float], count: int, low: float, high: float = float("inf")
) -> list[float]:
    """Return one number per tensor in [low, high], from one number or ``count`` of them.

    Raises:
        TypeError: if one is no number.
        ValueError: if one is out of range, or there are not ``count``.
    """
    if not isinstance(value, Sequence):
        return [check_number(name, value, low, high)] * count
    if len(value) != count:
        raise ValueError(
            f"{name}: expected one number or {count}, one per tensor, got {len(value)}."
        )
    return [check_number(f"{name}[{i}]", number, low, high) for i, number in enumerate(value)]


def check_tensor(name: str, tensor: object, *, floating: bool = True) -> Tensor:
    """Return ``tensor`` if it is a (floating) tensor.

    Raises:
        TypeError: if not.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}.")
    if floating and not tensor.is_floating_point():
        raise TypeError(f"{name}: expected a floating dtype, got {tensor.dtype}.")
    return tensor


def check_lists(
    lists: dict[str, Sequence[Tensor]], *, floating: bool = True, empty: bool = True
) -> torch.device:
    """Check lists of tensors that belong together; return their device (the CPU for empty lists).

    Args:
        lists: by the argument's name, each of L tensors; tensor i has one shape in all of them.
        floating: whether integer dtypes are refused.
        empty: whether tensors without elements are allowed.

    Raises:
        TypeError: for what is no list of (floating) tensors.
        ValueError: for lengths, shapes or devices that differ, and tensors that are empty where
            that is not allowed, or of 2**31 elements and more.
    """
    first_name, first = next(iter(lists.items()))
    device: torch.device | None = None
    for name, tensors in lists.items():
        if isinstance(tensors, Tensor) or not isinstance(tensors, Sequence):
            raise TypeError(
                f"{name}: expected a list of tensors, got {type(tensors).__name__}. For one "
                f"tensor pass [tensor]."
            )
        if len(tensors) != len(first):
            raise ValueError(
                f"{name}: expected {len(first)} tensors, as many as {first_name}, got "
                f"{len(tensors)}."
            )
        for i, tensor in enumerate(tensors):
            check_tensor(f"{name}[{i}]", tensor, floating=floating)
            if tensor.shape != first[i].shape:
                raise ValueError(
                    f"{name}[{i}]: expected shape {list(first[i].shape)}, that of "
                    f"{first_name}[{i}], got {list(tensor.shape)}."
                )
            device = tensor.device if device is None else device
            if tensor.device != device:
                raise ValueError(
                    f"{name}[{i}]: expected all tensors on {device}, got one on {tensor.device}. "
                    "Move it there first."
                )
            if tensor.numel() > MOST_ELEMENTS or (tensor.numel() == 0 and not empty):
                raise ValueError(
                    f"{name}[{i}]: expected 1 to {MOST_ELEMENTS} elements, got {tensor.numel()}. "
                    "Leave the tensor out."
                )
    return device or torch.device("cpu")


def check_same(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """Check that ``tensor`` has the shape and device of ``like``.

    Raises:
        TypeError: if it is no floating tensor.
        ValueError: if shape or device differ.
    """
    check_tensor(name, tensor)
    if tensor.shape != like.shape:
        raise ValueError(
            f"{name}: expected shape {list(like.shape)}, that of {like_name}, got "
            f"{list(tensor.shape)}."
        )
    if tensor.device != like.device:
        raise ValueError(
            f"{name}: expected {like.device}, where {like_name} is, got {tensor.device}. Move it "
            "there first."
        )


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Check that ``value`` is one of ``choices``.

    Raises:
        ValueError: if not.
    """
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}.")


def check_scalar(
    name: str, value: object, device: torch.device, low: float, high: float = float("inf")
) -> None:
    """Check a number in [low, high], or a 0-d floating tensor on ``device``, which is not read.

    Raises:
        TypeError: if it is neither.
        ValueError: if a number is out of range, or a tensor is not 0-d or elsewhere.
    """
    if not isinstance(value, Tensor):
        check_number(name, value, low, high)
        return
    check_tensor(name, value)
    if value.ndim or value.device != device:
        raise ValueError(
            f"{name}: expected a number or a 0-d tensor on {device}, got shape "
            f"{list(value.shape)} on {value.device}."
        )
