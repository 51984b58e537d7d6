"""Order statistics of a whole model's scores by radix selection, in three launches.

A score's bits, made to order as integers, are cut into three digits. Each launch counts, per
tensor, how often each value of one digit occurs among the scores that share the digits found so
far; the last program of a tensor to arrive picks the digit that holds the wanted rank. Counts are
integers, so the order in which programs arrive changes nothing. No program waits for another: a
launch ends when all counts are complete.

The first digit is the exponent (and for signed scores the sign), of which gradients use few
values: it is counted by ballots (tl.histogram), whose cost does not depend on the data. By then
10 to 20 % of the scores are left, few enough to count the longer digits one by one in memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ..rgp import Score, Selection
from ..tables import as_tensor_list, laid_out_like, without_gaps
from ..workspace import BINS, Workspace
from .chunks import my_segment, my_start, pointer_to
from .keys import key_of, score_of, score_with
from .launching import Launch, launch_all, triton_dtype
from .mask import mask_below

# Elements per program, and per pass of its loop. More at a time costs registers, fewer leave the
# memory idle.
CHUNK = 8192
BLOCK = 2048

FIRST_BINS = tl.constexpr(256)
ROW = tl.constexpr(BINS)


@triton.jit
def _arrive(tickets, segment, size, CHUNK: tl.constexpr):
    """Return whether this is the last program of its tensor to arrive; all its counts are done."""
    # Every thread's counts come before the ticket, and the ticket before the reading of others'.
    tl.debug_barrier()
    arrived = tl.atomic_add(tickets + segment, 1, sem="acq_rel")
    return arrived == (size - 1) // CHUNK


@triton.jit
def _resolve(row, rank, COUNT: tl.constexpr):
    """Return the digit that holds ``rank``, and the rank among its scores; clear the counts."""
    bins = tl.arange(0, COUNT)
    # Past the first-level cache, which does not see what other programs counted.
    counts = tl.load(row + bins, cache_modifier=".cg")
    tl.store(row + bins, tl.zeros([COUNT], tl.int32))
    reached = tl.cumsum(counts, 0)
    digit = tl.sum((reached <= rank).to(tl.int32), 0)
    return digit, rank - tl.sum(tl.where(bins < digit, counts, 0), 0)


@triton.jit
def _score_block(
    nat_pointer,
    adv_pointer,
    score_pointer,
    offsets,
    mask,
    alpha,
    rest,
    SCORE: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """Store the scores of one block; return the counts of their first digit and of non-finite."""
    nat = tl.load(nat_pointer + offsets, mask=mask).to(tl.float32)
    adv = tl.load(adv_pointer + offsets, mask=mask).to(tl.float32)
    score = score_of(nat, adv, alpha, rest, SCORE)
    tl.store(score_pointer + offsets, score, mask=mask)
    digit = (key_of(score, SCORE == "signed") >> SHIFT).to(tl.int32)
    bad = tl.abs(score) == float("inf")
    bad = bad | (score != score)
    if mask is not None:
        bad = bad & mask
    return tl.histogram(digit, FIRST_BINS, mask=mask), tl.sum(bad.to(tl.int32), 0)


@triton.jit
def _score_kernel(
    nat_addresses,  # int64 [L]
    adv_addresses,  # int64 [L]
    score_addresses,  # int64 [L]
    sizes,  # int32 [L]
    weights,  # float32 [L, 2]: alpha, 1 - alpha
    ranks,  # int32 [L]
    chunks,  # int32 [P, 2]
    histogram,  # int32 [L, ROW]
    tickets,  # int32 [L]
    state,  # int32 [L, 4]
    nonfinite,  # int32 [R]
    NAT: tl.constexpr,
    ADV: tl.constexpr,
    SCORE: tl.constexpr,
    SHIFT: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Form and store the scores, and find their first digit."""
    segment = my_segment(chunks)
    start = my_start(chunks, CHUNK)
    size = tl.load(sizes + segment)
    alpha = tl.load(weights + 2 * segment)
    rest = tl.load(weights + 2 * segment + 1)
    nat = pointer_to(nat_addresses, segment, NAT, ALIGNED)
    adv = pointer_to(adv_addresses, segment, ADV, ALIGNED)
    score = pointer_to(score_addresses, segment, tl.float32, True)
    counts = tl.zeros([FIRST_BINS], tl.int32)
    bad = 0
    if size - start >= CHUNK:
        for block in range(0, CHUNK, BLOCK):
            offsets = start + block + tl.arange(0, BLOCK)
            more, worse = _score_block(nat, adv, score, offsets, None, alpha, rest, SCORE, SHIFT)
            counts += more
            bad += worse
    else:
        for block in range(0, CHUNK, BLOCK):
            if block < size - start:
                offsets = start + block + tl.arange(0, BLOCK)
                more, worse = _score_block(
                    nat, adv, score, offsets, offsets < size, alpha, rest, SCORE, SHIFT
                )
                counts += more
                bad += worse
    row = histogram + segment * ROW
    tl.atomic_add(row + tl.arange(0, FIRST_BINS), counts, mask=counts > 0, sem="relaxed")
    tl.atomic_add(state + 4 * segment + 2, bad, mask=bad > 0, sem="relaxed")
    if _arrive(tickets, segment, size, CHUNK):
        digit, rank = _resolve(row, tl.load(ranks + segment), FIRST_BINS)
        tl.store(state + 4 * segment, digit)
        tl.store(state + 4 * segment + 1, rank)
        tl.store(nonfinite + segment, tl.load(state + 4 * segment + 2, cache_modifier=".cg"))
        tl.store(state + 4 * segment + 2, 0)
        tl.store(tickets + segment, 0)


@triton.jit
def _count_block(
    score_pointer,
    row,
    offsets,
    mask,
    found,
    SIGNED: tl.constexpr,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
):
    """Count the digit of those scores of one block whose higher digits are ``found``."""
    key = key_of(tl.load(score_pointer + offsets, mask=mask), SIGNED)
    matches = (key >> (SHIFT + BITS)).to(tl.int32) == found
    if mask is not None:
        matches = matches & mask
    digit = ((key >> SHIFT) & ((1 << BITS) - 1)).to(tl.int32)
    # Ties would queue up at one counter: those of the block's lowest digit are added at once.
    lowest = tl.min(tl.where(matches, digit, 1 << BITS), 0)
    tied = matches & (digit == lowest)
    tl.atomic_add(
        row + lowest, tl.sum(tied.to(tl.int32), 0), mask=lowest < (1 << BITS), sem="relaxed"
    )
    tl.atomic_add(row + digit, 1, mask=matches & (digit != lowest), sem="relaxed")


@triton.jit
def _digit_kernel(
    score_addresses,  # int64 [L]
    sizes,  # int32 [L]
    ranks,  # int32 [L]
    chunks,  # int32 [P, 2]
    histogram,  # int32 [L, ROW]
    tickets,  # int32 [L]
    state,  # int32 [L, 4]
    thresholds,  # float32 [R]
    kept,  # float32 [R]
    SIGNED: tl.constexpr,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Find one more digit; with the last one (SHIFT 0) the threshold."""
    segment = my_segment(chunks)
    start = my_start(chunks, CHUNK)
    size = tl.load(sizes + segment)
    found = tl.load(state + 4 * segment)
    score = pointer_to(score_addresses, segment, tl.float32, True)
    row = histogram + segment * ROW
    if size - start >= CHUNK:
        for block in range(0, CHUNK, BLOCK):
            offsets = start + block + tl.arange(0, BLOCK)
            _count_block(score, row, offsets, None, found, SIGNED, SHIFT, BITS)
    else:
        for block in range(0, CHUNK, BLOCK):
            if block < size - start:
                offsets = start + block + tl.arange(0, BLOCK)
                _count_block(score, row, offsets, offsets < size, found, SIGNED, SHIFT, BITS)
    if _arrive(tickets, segment, size, CHUNK):
        digit, rank = _resolve(row, tl.load(state + 4 * segment + 1), 1 << BITS)
        key = (found << BITS) | digit
        tl.store(state + 4 * segment, key)
        tl.store(state + 4 * segment + 1, rank)
        tl.store(tickets + segment, 0)
        if SHIFT == 0:
            threshold = score_with(key.to(tl.uint32, bitcast=True), SIGNED)
            tl.store(thresholds + segment, threshold)
            # float64 holds any count; the scores below are those in front of the rank, ties aside.
            above = size - (tl.load(ranks + segment) - rank)
            tl.store(kept + segment, (above.to(tl.float64) / size.to(tl.float64)).to(tl.float32))


@triton.jit
def _largest_below(score_pointer, offsets, mask, limit, SIGNED: tl.constexpr):
    """Return the largest key below ``limit`` in one block, or 0."""
    key = key_of(tl.load(score_pointer + offsets, mask=mask), SIGNED)
    below = key < limit
    if mask is not None:
        below = below & mask
    return tl.max(tl.where(below, key, 0).to(tl.uint32), 0)


@triton.jit
def _interpolate_kernel(
    score_addresses,  # int64 [L]
    sizes,  # int32 [L]
    fractions,  # float64 [L]
    chunks,  # int32 [P, 2]
    tickets,  # int32 [L]
    state,  # int32 [L, 4]
    thresholds,  # float32 [R]
    SIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Replace the order statistic in ``thresholds`` by the interpolated percentile."""
    segment = my_segment(chunks)
    start = my_start(chunks, CHUNK)
    size = tl.load(sizes + segment)
    limit = tl.load(state + 4 * segment).to(tl.uint32, bitcast=True)
    score = pointer_to(score_addresses, segment, tl.float32, True)
    largest = tl.zeros([], tl.uint32)
    for block in range(0, CHUNK, BLOCK):
        if block < size - start:
            offsets = start + block + tl.arange(0, BLOCK)
            below = _largest_below(score, offsets, offsets < size, limit, SIGNED)
            largest = tl.maximum(largest, below)
    below_keys = (state + 4 * segment + 3).to(tl.pointer_type(tl.uint32), bitcast=True)
    tl.atomic_max(below_keys, largest, sem="relaxed")
    if _arrive(tickets, segment, size, CHUNK):
        # With a rank left among equal scores, the one before the threshold equals it.
        ties = tl.load(state + 4 * segment + 1)
        before = tl.load(below_keys, cache_modifier=".cg")
        before = tl.where(ties > 0, limit, before)
        tl.store(below_keys, tl.zeros([], tl.uint32))
        tl.store(tickets + segment, 0)
        low = score_with(before, SIGNED)
        high = score_with(limit, SIGNED)
        fraction = tl.load(fractions + segment)
        way = high.to(tl.float64) - low.to(tl.float64)
        between = (low.to(tl.float64) + fraction * way).to(tl.float32)
        exact = (fraction == 1) | (low == high)
        tl.store(thresholds + segment, tl.where(exact, high, between))


def rgp_select(
    nat_grads: Sequence[Tensor],
    adv_grads: Sequence[Tensor],
    *,
    percentile: Sequence[float],
    alpha: Sequence[float],
    score: Score = "abs",
) -> Selection:
    """Launch the kernels of :func:`cure_fast.kernels.rgp.rgp_select` with tables of their own."""
    nat_grads = without_gaps(nat_grads)
    workspace = Workspace(nat_grads, percentiles=percentile, alphas=alpha, score=score)
    return select_in(workspace, nat_grads, laid_out_like(adv_grads, nat_grads))


def select_in(
    workspace: Workspace, nat_grads: Sequence[Tensor], adv_grads: Sequence[Tensor]
) -> Selection:
    """Launch the selection with the tables and memory of ``workspace``."""
    launch_all(selection_launches(workspace, nat_grads, adv_grads))
    return Selection(workspace.scores, *workspace.results)


def selection_launches(
    workspace: Workspace, nat_grads: Sequence[Tensor], adv_grads: Sequence[Tensor]
) -> list[Launch]:
    """Return the launches: one per pair of dtypes for the first digit, one for each other."""
    nat, adv = as_tensor_list(nat_grads, "nat_grads"), as_tensor_list(adv_grads, "adv_grads")
    scores, device = workspace.scores, workspace.device
    plan = scores.plan(nat, adv, chunk=CHUNK)
    signed = workspace.score == "signed"
    bits = 12 if signed else 11
    counted = (workspace.histogram, workspace.tickets, workspace.state)
    launches = [
        Launch(
            _score_kernel,
            len(group.chunks),
            device,
            (
                *(nat.addresses, adv.addresses, scores.addresses, plan.sizes),
                *(workspace.weights, workspace.ranks, group.chunks, *counted),
                workspace.nonfinite,
            ),
            {
                "NAT": triton_dtype(group.dtypes[1]),
                "ADV": triton_dtype(group.dtypes[2]),
                "SCORE": workspace.score,
                "SHIFT": bits + 12,
                "ALIGNED": group.aligned,
                "CHUNK": CHUNK,
                "BLOCK": BLOCK,
            },
            warps=8,
        )
        for group in plan.groups
    ]
    for shift, width in ((12, bits), (0, 12)):
        launches += [
            Launch(
                _digit_kernel,
                len(group.chunks),
                device,
                (
                    *(scores.addresses, plan.sizes, workspace.ranks, group.chunks, *counted),
                    *(workspace.thresholds, workspace.kept),
                ),
                {
                    **{"SIGNED": signed, "SHIFT": shift, "BITS": width},
                    **{"CHUNK": CHUNK, "BLOCK": BLOCK},
                },
                warps=8,
            )
            for group in scores.plan(chunk=CHUNK).groups
        ]
    return launches


def rgp_threshold(
    nat_grads: Sequence[Tensor],
    adv_grads: Sequence[Tensor],
    *,
    percentile: Sequence[float],
    alpha: Sequence[float],
    score: Score = "abs",
) -> Tensor:
    """Launch the selection and the interpolation."""
    nat_grads = without_gaps(nat_grads)
    workspace = Workspace(
        nat_grads, percentiles=percentile, alphas=alpha, score=score, keep_exempt=True
    )
    select_in(workspace, nat_grads, laid_out_like(adv_grads, nat_grads))
    plan = workspace.scores.plan(chunk=CHUNK)
    launch_all(
        [
            Launch(
                _interpolate_kernel,
                len(group.chunks),
                workspace.device,
                (
                    *(workspace.scores.addresses, plan.sizes, workspace.fractions, group.chunks),
                    *(workspace.tickets, workspace.state, workspace.thresholds),
                ),
                {"SIGNED": score == "signed", "CHUNK": CHUNK, "BLOCK": BLOCK},
                warps=8,
            )
            for group in plan.groups
        ]
    )
    return workspace.thresholds


def rgp_mask(
    grads: Sequence[Tensor],
    nat_grads: Sequence[Tensor],
    adv_grads: Sequence[Tensor],
    *,
    percentile: Sequence[float],
    alpha: Sequence[float],
    score: Score = "abs",
) -> Tensor:
    """Launch the selection and the mask."""
    selection = rgp_select(
        laid_out_like(nat_grads, grads),
        laid_out_like(adv_grads, grads),
        percentile=percentile,
        alpha=alpha,
        score=score,
    )
    mask_below(grads, selection.scores, selection.thresholds)
    return selection.kept
