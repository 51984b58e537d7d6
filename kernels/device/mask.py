"""Kernel of the mask: zero what scores below its tensor's threshold."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ..tables import as_tensor_list, laid_out_like
from .chunks import my_segment, my_start, pointer_to
from .launching import Launch, launch_each, triton_dtype
from .versions import count_changes

CHUNK = 8192
BLOCK = 2048


@triton.jit
def is_below(score, threshold):
    """Return where a score is strictly below ``threshold``, NaN counting as largest."""
    return tl.where(threshold != threshold, score == score, score < threshold)


@triton.jit
def _mask_block(tensor_pointer, score_pointer, offsets, mask, threshold):
    """Zero the entries of one block whose scores are below ``threshold``."""
    score = tl.load(score_pointer + offsets, mask=mask).to(tl.float32)
    value = tl.load(tensor_pointer + offsets, mask=mask)
    low = is_below(score, threshold)
    tl.store(tensor_pointer + offsets, tl.where(low, 0.0, value).to(value.dtype), mask=mask)


@triton.jit
def _mask_kernel(
    tensor_addresses,  # int64 [L]
    score_addresses,  # int64 [L]
    sizes,  # int32 [L]
    chunks,  # int32 [P, 2]
    thresholds,  # float32 [R]
    DTYPE: tl.constexpr,
    SCORE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Zero the entries whose scores are below their tensor's threshold."""
    segment = my_segment(chunks)
    start = my_start(chunks, CHUNK)
    size = tl.load(sizes + segment)
    threshold = tl.load(thresholds + segment)
    tensor = pointer_to(tensor_addresses, segment, DTYPE, ALIGNED)
    score = pointer_to(score_addresses, segment, SCORE, ALIGNED)
    if size - start >= CHUNK:
        for block in range(0, CHUNK, BLOCK):
            offsets = start + block + tl.arange(0, BLOCK)
            _mask_block(tensor, score, offsets, None, threshold)
    else:
        for block in range(0, CHUNK, BLOCK):
            if block < size - start:
                offsets = start + block + tl.arange(0, BLOCK)
                _mask_block(tensor, score, offsets, offsets < size, threshold)


def mask_below(
    tensors: Sequence[Tensor], scores: Sequence[Tensor | None], thresholds: Tensor
) -> None:
    """Launch the mask, once per pair of dtypes."""
    masked = as_tensor_list(tensors, "tensors")
    by = as_tensor_list(laid_out_like(scores, tensors), "scores")
    plan = by.plan(masked, chunk=CHUNK)
    thresholds = thresholds.contiguous()
    launch_each(
        [
            Launch(
                _mask_kernel,
                len(group.chunks),
                masked.device,
                (masked.addresses, by.addresses, plan.sizes, group.chunks, thresholds),
                {
                    "DTYPE": triton_dtype(group.dtypes[1]),
                    "SCORE": triton_dtype(group.dtypes[0]),
                    **{"ALIGNED": group.aligned, "CHUNK": CHUNK, "BLOCK": BLOCK},
                },
            )
            for group in plan.groups
        ]
    )
    count_changes([t for t, own in zip(masked, by, strict=True) if own is not None])
