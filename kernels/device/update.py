"""Kernel of the whole update of a step: mask, SGD, average, working copy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tables import TensorList, as_tensor_list, laid_out_like
from ..update import Conserve
from .chunks import my_segment, my_start, number, pointer_to
from .ema import lerp, weight_of
from .launching import Launch, launch_each, triton_dtype
from .mask import is_below
from .numbers import one_or_on_device
from .versions import count_changes

# One pass per program keeps the six streams of the widest case within 64 registers a thread.
CHUNK = 2048
WARPS = 8


@triton.jit
def _update_block(
    pointers,  # of weights, gradients, buffers, scores, averages, copies; any for what is absent
    numbers,  # threshold, lr, momentum, weight decay, whether averages move, their weight
    offsets,
    mask,
    MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    SCORED: tl.constexpr,
    HOLD: tl.constexpr,
    AVERAGED: tl.constexpr,
    COPIED: tl.constexpr,
):
    """Update one block. Products are added as torch's foreach kernels do it on a GPU, by FMA."""
    param_pointer, grad_pointer, buffer_pointer, score_pointer, average_pointer, copy_pointer = (
        pointers
    )
    threshold, lr, momentum, weight_decay, moving, weight = numbers
    param = tl.load(param_pointer + offsets, mask=mask)
    grad = tl.load(grad_pointer + offsets, mask=mask).to(tl.float32)
    low = False
    if SCORED:
        low = is_below(tl.load(score_pointer + offsets, mask=mask).to(tl.float32), threshold)
        grad = tl.where(low, 0.0, grad)
    grad = tl.fma(param, weight_decay, grad)
    if MOMENTUM:
        buffer = tl.load(buffer_pointer + offsets, mask=mask) * momentum + grad
        tl.store(buffer_pointer + offsets, buffer, mask=mask)
        if NESTEROV:
            grad = tl.fma(buffer, momentum, grad)
        else:
            grad = buffer
    after = tl.fma(grad, -lr, param)
    if SCORED and HOLD:
        after = tl.where(low, param, after)
    tl.store(param_pointer + offsets, after, mask=mask)
    if COPIED:
        tl.store(copy_pointer + offsets, after.to(copy_pointer.dtype.element_ty), mask=mask)
    if AVERAGED:
        if moving:
            average = tl.load(average_pointer + offsets, mask=mask)
            tl.store(average_pointer + offsets, lerp(average, after, weight), mask=mask)


@triton.jit
def _update_chunk(
    addresses,  # int64 [L] each: weights, gradients, buffers, scores, averages, copies, or None
    numbers,  # thresholds [R], lr, momentum, weight decay, decay, whether averages move
    segment,
    start,
    size,
    GRAD: tl.constexpr,
    SCORE: tl.constexpr,
    COPY: tl.constexpr,
    MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    HOLD: tl.constexpr,
    AVERAGED: tl.constexpr,
    LR_ON_DEVICE: tl.constexpr,
    MOMENTUM_ON_DEVICE: tl.constexpr,
    WEIGHT_DECAY_ON_DEVICE: tl.constexpr,
    DECAY_ON_DEVICE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Update one chunk of one tensor."""
    params, grads, buffers, scores, averages, copies = addresses
    thresholds, lr, momentum, weight_decay, decay, moved = numbers
    param = pointer_to(params, segment, tl.float32, ALIGNED)
    grad = pointer_to(grads, segment, GRAD, ALIGNED)
    # What is absent is never read; any pointer stands for it.
    buffer, score, average, copy = param, param, param, param
    threshold, weight, moving = 0.0, 0.0, True
    if MOMENTUM:
        buffer = pointer_to(buffers, segment, tl.float32, ALIGNED)
    if SCORE is not None:
        score = pointer_to(scores, segment, SCORE, ALIGNED)
        threshold = tl.load(thresholds + segment)
    if COPY is not None:
        copy = pointer_to(copies, segment, COPY, ALIGNED)
    if AVERAGED:
        average = pointer_to(averages, segment, tl.float32, ALIGNED)
        weight = decay
        if DECAY_ON_DEVICE:
            weight = weight_of(decay, True).to(tl.float32)
        if moved is not None:
            moving = tl.load(moved) != 0
    if WEIGHT_DECAY_ON_DEVICE:
        weight_decay = tl.load(weight_decay + segment)
    pointers = (param, grad, buffer, score, average, copy)
    rate = number(lr, LR_ON_DEVICE)
    factor = number(momentum, MOMENTUM_ON_DEVICE)
    values = (threshold, rate, factor, weight_decay, moving, weight)
    SCORED: tl.constexpr = SCORE is not None
    COPIED: tl.constexpr = COPY is not None
    offsets = start + tl.arange(0, CHUNK)
    if size - start >= CHUNK:
        _update_block(
            pointers, values, offsets, None, MOMENTUM, NESTEROV, SCORED, HOLD, AVERAGED, COPIED
        )
    else:
        mask = offsets < size
        _update_block(
            pointers, values, offsets, mask, MOMENTUM, NESTEROV, SCORED, HOLD, AVERAGED, COPIED
        )


@triton.jit
def _update_kernel(
    param_addresses,  # int64 [L]
    grad_addresses,  # int64 [L]
    buffer_addresses,  # int64 [L] or None, like the next three
    score_addresses,
    average_addresses,
    copy_addresses,
    sizes,  # int32 [L]
    chunks,  # int32 [P, 2]
    thresholds,  # float32 [R] or None
    lr,  # float32, or pointer to a floating number
    momentum,  # as lr
    weight_decay,  # float32, or pointer to float32 [L]
    decay,  # float32 1 - decay, or pointer to a floating decay
    moved,  # uint8 [] or None
    skip,  # uint8 [] or None
    GRAD: tl.constexpr,
    SCORE: tl.constexpr,
    COPY: tl.constexpr,
    MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    HOLD: tl.constexpr,
    AVERAGED: tl.constexpr,
    LR_ON_DEVICE: tl.constexpr,
    MOMENTUM_ON_DEVICE: tl.constexpr,
    WEIGHT_DECAY_ON_DEVICE: tl.constexpr,
    DECAY_ON_DEVICE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Update one chunk, unless ``skip`` is set."""
    going = True
    if skip is not None:
        going = tl.load(skip) == 0
    if going:
        segment = my_segment(chunks)
        start = my_start(chunks, CHUNK)
        _update_chunk(
            (
                param_addresses,
                grad_addresses,
                buffer_addresses,
                score_addresses,
                average_addresses,
                copy_addresses,
            ),
            (thresholds, lr, momentum, weight_decay, decay, moved),
            segment,
            start,
            tl.load(sizes + segment),
            GRAD,
            SCORE,
            COPY,
            MOMENTUM,
            NESTEROV,
            HOLD,
            AVERAGED,
            LR_ON_DEVICE,
            MOMENTUM_ON_DEVICE,
            WEIGHT_DECAY_ON_DEVICE,
            DECAY_ON_DEVICE,
            ALIGNED,
            CHUNK,
        )


def masked_sgd(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor] | None,
    *,
    lr: float | Tensor,
    momentum: float | Tensor = 0.0,
    weight_decay: float | Sequence[float] | Tensor = 0.0,
    nesterov: bool = False,
    scores: Sequence[Tensor | None] | None = None,
    thresholds: Tensor | None = None,
    conserve: Conserve = "gradient",
    averages: Sequence[Tensor] | None = None,
    decay: float | Tensor = 0.999,
    moved: Tensor | None = None,
    low_precision_copies: Sequence[Tensor] | None = None,
    skip: Tensor | None = None,
) -> None:
    """Launch the update: once for the masked tensors and once for the others, per dtype."""
    master = as_tensor_list(params, "params")
    weight_decay = one_or_on_device("weight_decay", weight_decay, master.device)
    thresholds = None if thresholds is None else thresholds.contiguous()
    # A tensor is not read; it may hold 0, whose buffers are written all the same.
    buffers = momentum_buffers if isinstance(momentum, Tensor) or momentum else None
    lists = (
        as_tensor_list(laid_out_like(grads, params), "grads"),
        _table(buffers, "momentum_buffers"),
        _table(None if scores is None else laid_out_like(scores, params), "scores"),
        _table(averages, "averages"),
        _table(low_precision_copies, "low_precision_copies"),
    )
    plan = master.plan(*lists, chunk=CHUNK)
    addresses = [None if each is None else each.addresses for each in lists]
    launches = [
        Launch(
            _update_kernel,
            len(group.chunks),
            master.device,
            (
                *(master.addresses, *addresses, plan.sizes, group.chunks, thresholds),
                *(lr, momentum, weight_decay),
                decay if isinstance(decay, Tensor) else 1 - decay,
                *(_byte(moved), _byte(skip)),
            ),
            {
                "GRAD": triton_dtype(group.dtypes[1]),
                "SCORE": triton_dtype(group.dtypes[3]),
                "COPY": triton_dtype(group.dtypes[5]),
                "MOMENTUM": group.dtypes[2] is not None,
                "NESTEROV": nesterov,
                "HOLD": conserve == "weight",
                "AVERAGED": group.dtypes[4] is not None,
                "LR_ON_DEVICE": isinstance(lr, Tensor),
                "MOMENTUM_ON_DEVICE": isinstance(momentum, Tensor),
                "WEIGHT_DECAY_ON_DEVICE": isinstance(weight_decay, Tensor),
                "DECAY_ON_DEVICE": isinstance(decay, Tensor),
                **{"ALIGNED": group.aligned, "CHUNK": CHUNK},
            },
            warps=WARPS,
        )
        for group in plan.groups
    ]
    launch_each(launches)
    count_changes(params, buffers, averages, low_precision_copies)


def _table(tensors: Sequence[Tensor | None] | None, name: str) -> TensorList | None:
    return None if tensors is None else as_tensor_list(tensors, name)


def _byte(flag: Tensor | None) -> Tensor | None:
    """Return a bool tensor as bytes, as kernels take it."""
    return None if flag is None else flag.view(torch.uint8)
