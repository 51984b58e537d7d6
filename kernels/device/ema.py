"""Kernels of the coin and of averages of weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ema import device_of
from ..philox import COIN, step_tensor
from ..tables import as_tensor_list, laid_out_like
from .chunks import my_segment, my_start, number, pointer_to
from .launching import Launch, launch_each, triton_dtype
from .philox import uniform
from .versions import count_changes

CHUNK = 4096
BLOCK = 2048


@triton.jit(do_not_specialize=["seed"])
def _coin_kernel(
    landed,  # uint8 []
    rate,  # float32, or pointer to a floating number
    seed,  # integer
    step,  # int64 []
    RATE_ON_DEVICE: tl.constexpr,
    STREAM: tl.constexpr,
):
    """Store whether the coin lands."""
    drawn = uniform(seed, tl.zeros([], tl.int32), tl.load(step), STREAM)
    tl.store(landed, (drawn < number(rate, RATE_ON_DEVICE)).to(tl.uint8))


@triton.jit
def weight_of(decay, DECAY_ON_DEVICE: tl.constexpr):
    """Return the weight of the new value: 1 - decay in float64, or what the host made of it."""
    if DECAY_ON_DEVICE:
        return 1 - tl.load(decay).to(tl.float64)
    else:
        return decay


@triton.jit
def lerp(old, new, weight):
    """Return ``old + weight * (new - old)``, exact for weights 0 and 1."""
    way = new - old
    return tl.where(weight < 0.5, old + weight * way, new - way * (1 - weight))


@triton.jit
def _average_block(average_pointer, param_pointer, offsets, mask, weight, KIND: tl.constexpr):
    """Move one block; KIND is the dtype of the arithmetic, or None for a copy."""
    param = tl.load(param_pointer + offsets, mask=mask)
    if KIND is None:
        after = param
    else:
        old = tl.load(average_pointer + offsets, mask=mask)
        after = lerp(old.to(KIND), param.to(KIND), weight.to(KIND))
    tl.store(average_pointer + offsets, after.to(average_pointer.dtype.element_ty), mask=mask)


@triton.jit
def _average_kernel(
    average_addresses,  # int64 [L]
    param_addresses,  # int64 [L]
    sizes,  # int32 [L]
    chunks,  # int32 [P, 2]
    moved,  # uint8 []
    decay,  # float32 1 - decay, or pointer to a floating decay
    AVERAGE: tl.constexpr,
    PARAM: tl.constexpr,
    KIND: tl.constexpr,
    DECAY_ON_DEVICE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Move the averages if the coin has landed; else touch no memory of theirs."""
    if tl.load(moved) != 0:
        segment = my_segment(chunks)
        start = my_start(chunks, CHUNK)
        size = tl.load(sizes + segment)
        average = pointer_to(average_addresses, segment, AVERAGE, ALIGNED)
        param = pointer_to(param_addresses, segment, PARAM, ALIGNED)
        weight = weight_of(decay, DECAY_ON_DEVICE)
        if size - start >= CHUNK:
            for block in range(0, CHUNK, BLOCK):
                offsets = start + block + tl.arange(0, BLOCK)
                _average_block(average, param, offsets, None, weight, KIND)
        else:
            for block in range(0, CHUNK, BLOCK):
                if block < size - start:
                    offsets = start + block + tl.arange(0, BLOCK)
                    _average_block(average, param, offsets, offsets < size, weight, KIND)


def flip_coin(
    rate: float | Tensor, *, seed: int, step: Tensor | int, device: torch.device | str | None = None
) -> Tensor:
    """Launch the coin."""
    counter = step_tensor(step, device_of(step, device))
    landed = torch.empty((), dtype=torch.bool, device=counter.device)
    Launch(
        _coin_kernel,
        1,
        counter.device,
        (landed.view(torch.uint8), rate, seed, counter),
        {"RATE_ON_DEVICE": isinstance(rate, Tensor), "STREAM": COIN},
        warps=1,
    ).run()
    return landed


def ema_update(
    averages: Sequence[Tensor],
    params: Sequence[Tensor],
    *,
    decay: float | Tensor,
    rate: float | Tensor = 1.0,
    seed: int = 0,
    step: Tensor | int | None = None,
    skip: Tensor | None = None,
) -> Tensor:
    """Launch the coin, then the move: once per pair of dtypes."""
    old = as_tensor_list(averages, "averages")
    new = as_tensor_list(laid_out_like(params, averages), "params")
    device = old.device
    if step is not None and (isinstance(rate, Tensor) or rate < 1):
        moved = flip_coin(rate, seed=seed, step=step, device=device)
    else:
        moved = torch.ones((), dtype=torch.bool, device=device)
    if skip is not None:
        moved = moved & ~skip
    plan = old.plan(new, chunk=CHUNK)
    if not isinstance(decay, Tensor) and any(
        group.dtypes[0] == torch.float64 for group in plan.groups
    ):
        # A number passed by the host arrives as float32.
        decay = torch.full((), decay, dtype=torch.float64, device=device)
    on_device = isinstance(decay, Tensor)
    launch_each(
        [
            Launch(
                _average_kernel,
                len(group.chunks),
                device,
                (
                    *(old.addresses, new.addresses, plan.sizes, group.chunks),
                    *(moved.view(torch.uint8), decay if on_device else 1 - decay),
                ),
                {
                    "AVERAGE": triton_dtype(group.dtypes[0]),
                    "PARAM": triton_dtype(group.dtypes[1]),
                    "KIND": arithmetic_of(group.dtypes[0]),
                    "DECAY_ON_DEVICE": on_device,
                    **{"ALIGNED": group.aligned, "CHUNK": CHUNK, "BLOCK": BLOCK},
                },
            )
            for group in plan.groups
        ]
    )
    count_changes(averages)
    return moved


def copy_where(targets: Sequence[Tensor], sources: Sequence[Tensor], *, condition: Tensor) -> None:
    """Launch the copy: once per dtype."""
    old = as_tensor_list(targets, "targets")
    new = as_tensor_list(laid_out_like(sources, targets), "sources")
    plan = old.plan(new, chunk=CHUNK)
    launch_each(
        [
            Launch(
                _average_kernel,
                len(group.chunks),
                old.device,
                (
                    *(old.addresses, new.addresses, plan.sizes, group.chunks),
                    *(condition.view(torch.uint8), 0.0),
                ),
                {
                    "AVERAGE": triton_dtype(group.dtypes[0]),
                    "PARAM": triton_dtype(group.dtypes[1]),
                    "KIND": None,
                    "DECAY_ON_DEVICE": False,
                    **{"ALIGNED": group.aligned, "CHUNK": CHUNK, "BLOCK": BLOCK},
                },
            )
            for group in plan.groups
        ]
    )
    count_changes(targets)


def arithmetic_of(dtype: torch.dtype | None) -> tl.dtype | None:
    """Return in what an average of ``dtype`` is computed; None for one that is copied."""
    if dtype is None or not dtype.is_floating_point:
        return None
    return tl.float64 if dtype == torch.float64 else tl.float32
