"""Checks of arguments: every error names the argument, what was expected, what came, what to do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import SupportsFloat

import torch
from torch import Tensor

from .layout import check_dense
from .tables import TensorList

# A chunk's elements and an order statistic's rank are 32-bit integers on the device.
MOST_ELEMENTS = 2**31 - 1


def check_number(name: str, value: object, low: float, high: float = float("inf")) -> float:
    """Return ``value`` as a float in [low, high].

    Raises:
        TypeError: if it is no number.
        ValueError: if it is out of range or NaN.
    """
    # The usual types first: asking for a protocol takes microseconds, per tensor and call.
    if type(value) is float or type(value) is int:
        number = float(value)
        if low <= number <= high and number != float("inf"):
            return number
    wanted = f"[{low:g}, {high:g}]" if high != float("inf") else f"[{low:g}, inf)"
    if (
        isinstance(value, bool | Tensor)
        or not isinstance(value, SupportsFloat)
        or getattr(value, "shape", ())
    ):
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
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        return [check_number(name, value, low, high)] * count
    if len(value) != count:
        raise ValueError(
            f"{name}: expected one number or {count}, one per tensor, got {len(value)}."
        )
    return [check_number(f"{name}[{i}]", number, low, high) for i, number in enumerate(value)]


def check_tensor(name: str, tensor: object, *, floating: bool = True) -> Tensor:
    """Return ``tensor`` if it is a (floating) tensor, and not sparse.

    Raises:
        TypeError: if not.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}.")
    if tensor.layout != torch.strided:
        raise TypeError(
            f"{name}: expected a tensor that is not sparse, got {tensor.layout}. Pass "
            "tensor.to_dense()."
        )
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
        _check_is_list(name, tensors)
        if len(tensors) != len(first):
            raise ValueError(
                f"{name}: expected {len(first)} tensors, as many as {first_name}, got "
                f"{len(tensors)}."
            )
        if _is_sound(tensors, first, device, floating=floating, empty=empty):
            device = tensors.device  # pyright: ignore[reportAttributeAccessIssue]
            continue
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


def _check_is_list(name: str, tensors: object) -> None:
    if isinstance(tensors, Tensor):
        raise TypeError(f"{name}: expected a list of tensors, got one. Pass [tensor].")
    if not isinstance(tensors, Sequence) or isinstance(tensors, str | bytes):
        hint = " Pass list(...) of it." if isinstance(tensors, Iterable) else ""
        raise TypeError(f"{name}: expected a list of tensors, got {type(tensors).__name__}.{hint}")


def _is_sound(
    tensors: Sequence[Tensor],
    first: Sequence[Tensor],
    device: torch.device | None,
    *,
    floating: bool,
    empty: bool,
) -> bool:
    """Return whether a TensorList fits, by what it knows of its tensors, without asking each."""
    if not isinstance(tensors, TensorList) or not isinstance(first, TensorList):
        return False
    layout = tensors.layout
    return (
        layout.is_complete
        and layout.shapes == first.layout.shapes
        and (device is None or tensors.device == device)
        and (layout.is_floating or not floating)
        and max(layout.sizes, default=0) <= MOST_ELEMENTS
        and (empty or min(layout.sizes, default=1) > 0)
    )


def check_whole(name: str, tensors: Sequence[Tensor]) -> None:
    """Check tensors that are changed in place: each must fill its memory.

    Raises:
        ValueError: for a tensor with gaps in memory.
    """
    if not isinstance(tensors, TensorList):  # Its tensors have none.
        for i, tensor in enumerate(tensors):
            check_dense(f"{name}[{i}]", tensor)


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


def check_flag(name: str, flag: Tensor | None, device: torch.device) -> None:
    """Raise unless ``flag`` is None or a 0-d bool tensor on ``device``.

    Raises:
        TypeError: for what is no tensor.
        ValueError: for another dtype, shape or device.
    """
    if flag is None:
        return
    check_tensor(name, flag, floating=False)
    if flag.dtype != torch.bool or flag.ndim or flag.device != device:
        raise ValueError(
            f"{name}: expected a 0-d bool tensor on {device}, got {flag.dtype} "
            f"{list(flag.shape)} on {flag.device}."
        )


def check_scores(
    name: str,
    tensors: Sequence[Tensor],
    scores: Sequence[Tensor | None],
    thresholds: Tensor,
) -> torch.device:
    """Check scores and thresholds against ``tensors``, called ``name``; return the device.

    Raises:
        TypeError: for what is no list of floating tensors, or thresholds that are not float32.
        ValueError: for lists, shapes or devices that do not match.
    """
    device = check_lists({name: tensors})
    _check_is_list("scores", scores)
    if len(scores) != len(tensors):
        raise ValueError(f"scores: expected {len(tensors)}, as many as {name}, got {len(scores)}.")
    if not _are_scores_of(tensors, scores):
        for i, (values, tensor) in enumerate(zip(scores, tensors, strict=True)):
            if values is not None:
                check_same(f"scores[{i}]", values, f"{name}[{i}]", tensor)
    check_tensor("thresholds", thresholds)
    if thresholds.dtype != torch.float32:
        raise TypeError(f"thresholds: expected torch.float32, got {thresholds.dtype}.")
    if thresholds.ndim != 1 or len(thresholds) < len(tensors) or thresholds.device != device:
        raise ValueError(
            f"thresholds: expected one number per tensor, [{len(tensors)}] on {device}, got "
            f"{list(thresholds.shape)} on {thresholds.device}."
        )
    return device


def _are_scores_of(tensors: Sequence[Tensor], scores: Sequence[Tensor | None]) -> bool:
    """Return whether two TensorLists fit, by what they know of their tensors."""
    if not isinstance(tensors, TensorList) or not isinstance(scores, TensorList):
        return False
    return (
        scores.layout.is_floating
        and scores.device == tensors.device
        and all(
            mine is None or mine == theirs
            for mine, theirs in zip(scores.layout.shapes, tensors.layout.shapes, strict=True)
        )
    )
