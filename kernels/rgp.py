"""Robust gradient prominence (RGP): score every weight by two gradients, mask the low ones.

Score of a weight (Gowda et al., CURE, ICLR 2024, Eq. 6):

    abs         alpha * |g_nat| + (1 - alpha) * |g_adv|      the paper's
    signed      alpha * g_nat + (1 - alpha) * g_adv          the authors' code
    abs_of_sum  |alpha * g_nat + (1 - alpha) * g_adv|

Scores are formed in float32 whatever the gradients' dtype. Per tensor, the weights
whose score lies strictly below the tensor's percentile are masked; the percentile
is ``numpy.percentile(score, p, method="linear")``. With rank r = p/100 * (n-1) that
value lies between the order statistics floor(r) and ceil(r), so "strictly below"
needs one of them only, the one at ceil(r): where r is whole they coincide; where it
is not, either the two are different and the value lies above floor(r) and at most at
ceil(r), or they are equal and the value is both. :func:`rgp_threshold` still returns the
interpolated value, which is the number people compare with NumPy.

A score that is NaN counts as larger than every other, infinity included: it is kept
and changes the meaning of no other score. :func:`rgp_select` counts the scores that are
NaN or infinite, on the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from . import dispatch
from .checking import (
    check_choice,
    check_lists,
    check_number,
    check_same,
    check_scores,
    check_tensor,
    check_whole,
    per_tensor,
)
from .workspace import EXEMPT, Workspace, rank_of

Score = Literal["abs", "signed", "abs_of_sum"]
SCORES = ("abs", "signed", "abs_of_sum")


class Selection(NamedTuple):
    """Which weights are prominent.

    Attributes:
        scores: L score tensors, float32, shaped as the gradients; None for an exempt tensor, whose
            percentile is 0.
        thresholds: float32 [L]; a weight is masked where its score is strictly below. This is the
            order statistic at the rank rounded up, with the same mask as the percentile itself;
            -inf for an exempt tensor.
        kept: float32 [L], fraction of the weights not masked.
        nonfinite: int32 [L], number of scores that are NaN or infinite; 0 for an exempt tensor.
    """

    scores: Sequence[Tensor | None]
    thresholds: Tensor
    kept: Tensor
    nonfinite: Tensor


def rgp_score(nat_grad: Tensor, adv_grad: Tensor, *, alpha: float, score: Score = "abs") -> Tensor:
    """Return the prominence of each weight, float32, in the shape of ``nat_grad``.

    Args:
        nat_grad: gradient of the natural loss, any shape and floating dtype.
        adv_grad: gradient of the adversarial loss, same shape.
        alpha: weight of the natural gradient, in [0, 1].
        score: how the two are combined; see the module's docstring.

    Raises:
        TypeError: for what is no floating tensor, or no number.
        ValueError: for an unknown score, an alpha out of range, or tensors of different shapes or
            devices.
    """
    check_tensor("nat_grad", nat_grad)
    check_same("adv_grad", adv_grad, "nat_grad", nat_grad)
    alpha = check_number("alpha", alpha, 0, 1)
    check_choice("score", score, SCORES)
    nat, adv = nat_grad.detach().float(), adv_grad.detach().float()
    # In place where the memory is new: fresh memory costs a CPU more than the arithmetic.
    if score == "abs":
        return nat.abs().mul_(alpha).add_(adv.abs().mul_(1 - alpha))
    total = (nat * alpha).add_(adv * (1 - alpha))
    return total if score == "signed" else total.abs_()


def rgp_select(
    nat_grads: Sequence[Tensor],
    adv_grads: Sequence[Tensor],
    *,
    percentile: float | Sequence[float],
    alpha: float | Sequence[float],
    score: Score = "abs",
) -> Selection:
    """Return scores and thresholds of each tensor, without reading anything back from the device.

    On a GPU three launches: 4 bytes per weight are written and 16 read beside two float32
    gradients' 8. The result is exact, and the same bit for bit at each call.

    Args:
        nat_grads: L gradients of the natural loss, one per weight tensor, floating, none empty.
        adv_grads: L gradients of the adversarial loss, same shapes.
        percentile: percent of weights below the threshold, in [0, 100]; one number or L. 0 exempts
            a tensor.
        alpha: weight of the natural gradient, in [0, 1]; one number or L.
        score: how the two gradients are combined; see the module's docstring.

    Raises:
        TypeError: for what is no list of floating tensors, or no number.
        ValueError: for lists of different lengths, different shapes or devices, an empty tensor or
            a value out of range.
    """
    device, percentiles, alphas = _check(nat_grads, adv_grads, percentile, alpha, score)
    return dispatch.run(
        "select",
        rgp_select_ref,
        device,
        nat_grads,
        adv_grads,
        percentile=percentiles,
        alpha=alphas,
        score=score,
    )


@torch.no_grad()
def rgp_select_ref(
    nat_grads: Sequence[Tensor],
    adv_grads: Sequence[Tensor],
    *,
    percentile: float | Sequence[float],
    alpha: float | Sequence[float],
    score: Score = "abs",
) -> Selection:
    """Compute :func:`rgp_select` by torch.kthvalue, tensor by tensor."""
    device, percentiles, alphas = _check(nat_grads, adv_grads, percentile, alpha, score)
    scores: list[Tensor | None] = []
    thresholds, kept, nonfinite = [], [], []
    for nat, adv, p, weight in zip(nat_grads, adv_grads, percentiles, alphas, strict=True):
        if p == 0:
            scores.append(None)
            thresholds.append(torch.full((), EXEMPT, dtype=torch.float32, device=device))
            kept.append(torch.ones((), dtype=torch.float32, device=device))
            nonfinite.append(torch.zeros((), dtype=torch.int32, device=device))
            continue
        values, threshold = _scored(nat, adv, p, weight, score)
        masked = torch.count_nonzero(is_below(values, threshold))
        scores.append(values)
        thresholds.append(threshold)
        kept.append(((values.numel() - masked).double() / values.numel()).float())
        nonfinite.append(count_nonfinite(values))
    if not scores:
        empty = torch.empty(0, dtype=torch.float32, device=device)
        return Selection((), empty, empty.clone(), empty.int())
    return Selection(scores, torch.stack(thresholds), torch.stack(kept), torch.stack(nonfinite))


def rgp_threshold(
    nat_grads: Sequence[Tensor],
    adv_grads: Sequence[Tensor],
    *,
    percentile: float | Sequence[float],
    alpha: float | Sequence[float],
    score: Score = "abs",
) -> Tensor:
    """Return the percentile of each tensor's prominence, float32 [L].

    It is interpolated in float64 between two order statistics of the float32 scores. Unlike
    NumPy's it is NaN only if one of these two is: NaN counts as the largest score.

    Args:
        nat_grads: L gradients of the natural loss, one per weight tensor, floating, none empty.
        adv_grads: L gradients of the adversarial loss, same shapes.
        percentile: percent of weights below the threshold, in [0, 100]; one number or L.
        alpha: weight of the natural gradient, in [0, 1]; one number or L.
        score: how the two gradients are combined; see the module's docstring.

    Raises:
        TypeError: for what is no list of floating tensors, or no number.
        ValueError: for lists of different lengths, different shapes or devices, an empty tensor or
            a value out of range.
    """
    device, percentiles, alphas = _check(nat_grads, adv_grads, percentile, alpha, score)
    return dispatch.run(
        "select",
        rgp_threshold_ref,
        device,
        nat_grads,
        adv_grads,
        percentile=percentiles,
        alpha=alphas,
        score=score,
    )


@torch.no_grad()
def rgp_threshold_ref(
    nat_grads: Sequence[Tensor],
    adv_grads: Sequence[Tensor],
    *,
    percentile: float | Sequence[float],
    alpha: float | Sequence[float],
    score: Score = "abs",
) -> Tensor:
    """Compute :func:`rgp_threshold` by torch.kthvalue, tensor by tensor."""
    device, percentiles, alphas = _check(nat_grads, adv_grads, percentile, alpha, score)
    if not nat_grads:
        return torch.empty(0, dtype=torch.float32, device=device)
    values = [
        rgp_score(nat, adv, alpha=weight, score=score)
        for nat, adv, weight in zip(nat_grads, adv_grads, alphas, strict=True)
    ]
    return torch.stack([_percentile(v, p) for v, p in zip(values, percentiles, strict=True)])


def rgp_mask_(
    grads: Sequence[Tensor],
    nat_grads: Sequence[Tensor],
    adv_grads: Sequence[Tensor],
    *,
    percentile: float | Sequence[float],
    alpha: float | Sequence[float],
    score: Score = "abs",
) -> Tensor:
    """Zero in place the ``grads`` of low prominence; return the fraction kept, float32 [L].

    An entry is zeroed where its score is strictly below its tensor's percentile (CURE, Algorithm 1,
    line 20), so percentile 0 keeps all, and ties at the threshold are kept.

    Args:
        grads: L gradients to mask, changed in place; without gaps in memory.
        nat_grads: L gradients of the natural loss, same shapes, floating, none empty.
        adv_grads: L gradients of the adversarial loss, same shapes.
        percentile: percent of weights below the threshold, in [0, 100]; one number or L.
        alpha: weight of the natural gradient, in [0, 1]; one number or L.
        score: how the two gradients are combined; see the module's docstring.

    Raises:
        TypeError: for what is no list of floating tensors, or no number.
        ValueError: for lists of different lengths, different shapes or devices, an empty tensor or
            a value out of range, or a gradient to mask that has gaps in memory.
    """
    # Before the others: a list that is too short is then told from one that is too long.
    check_lists({"grads": grads, "nat_grads": nat_grads, "adv_grads": adv_grads})
    check_whole("grads", grads)
    device, percentiles, alphas = _check(nat_grads, adv_grads, percentile, alpha, score)
    return dispatch.run(
        "select",
        rgp_mask_ref,
        device,
        grads,
        nat_grads,
        adv_grads,
        percentile=percentiles,
        alpha=alphas,
        score=score,
    )


@torch.no_grad()
def rgp_mask_ref(
    grads: Sequence[Tensor],
    nat_grads: Sequence[Tensor],
    adv_grads: Sequence[Tensor],
    *,
    percentile: float | Sequence[float],
    alpha: float | Sequence[float],
    score: Score = "abs",
) -> Tensor:
    """Compute :func:`rgp_mask_` tensor by tensor."""
    device, percentiles, alphas = _check(nat_grads, adv_grads, percentile, alpha, score)
    kept = torch.ones(len(grads), dtype=torch.float64, device=device)
    for i, (grad, nat, adv) in enumerate(zip(grads, nat_grads, adv_grads, strict=True)):
        if percentiles[i] == 0:
            continue
        values, threshold = _scored(nat, adv, percentiles[i], alphas[i], score)
        below = is_below(values, threshold)
        zero_where_(grad, below)
        kept[i] = (values.numel() - torch.count_nonzero(below)).double() / values.numel()
    return kept.float()


def mask_below_(
    tensors: Sequence[Tensor], scores: Sequence[Tensor | None], thresholds: Tensor
) -> None:
    """Zero in place every entry whose score is strictly below its tensor's threshold.

    Args:
        tensors: L tensors, floating, changed in place; without gaps in memory.
        scores: L score tensors of the same shapes, floating; compared in float32. None leaves a
            tensor as it is.
        thresholds: float32 [L] or longer, on their device. Scores that are NaN count as largest.

    Raises:
        TypeError: for what is no list of floating tensors, or thresholds that are not float32.
        ValueError: for lists, shapes or devices that do not match, or a tensor with gaps.
    """
    device = check_scores("tensors", tensors, scores, thresholds)
    check_whole("tensors", tensors)
    dispatch.run("mask", mask_below_ref, device, tensors, scores, thresholds)


@torch.no_grad()
def mask_below_ref(
    tensors: Sequence[Tensor], scores: Sequence[Tensor | None], thresholds: Tensor
) -> None:
    """Compute :func:`mask_below_` tensor by tensor."""
    for tensor, values, threshold in zip(tensors, scores, thresholds, strict=False):
        if values is not None:
            zero_where_(tensor, is_below(values, threshold))


def select_in(
    workspace: Workspace, nat_grads: Sequence[Tensor], adv_grads: Sequence[Tensor]
) -> Selection:
    """Return what :func:`rgp_select` does, in the memory of ``workspace``, without a check.

    Args:
        workspace: built for tensors of these shapes and this memory order.
        nat_grads: L gradients of the natural loss; TensorLists for a CUDA graph.
        adv_grads: L gradients of the adversarial loss.
    """
    return dispatch.run("select", select_in_ref, workspace.device, workspace, nat_grads, adv_grads)


def select_in_ref(
    workspace: Workspace, nat_grads: Sequence[Tensor], adv_grads: Sequence[Tensor]
) -> Selection:
    """Compute :func:`select_in` by :func:`rgp_select_ref`."""
    found = rgp_select_ref(
        nat_grads,
        adv_grads,
        percentile=workspace.percentiles,
        alpha=workspace.alphas,
        score=workspace.score,  # pyright: ignore[reportArgumentType]
    )
    for result, values in zip(workspace.results, found[1:], strict=True):
        result.copy_(values)
    for kept, values in zip(workspace.scores, found.scores, strict=True):
        if values is not None:
            kept.copy_(values)
    return Selection(workspace.scores, *workspace.results)


def _scored(
    nat: Tensor, adv: Tensor, percentile: float, alpha: float, score: Score
) -> tuple[Tensor, Tensor]:
    """Return a tensor's scores, and the order statistic that the masked ones are below, 0-d."""
    values = rgp_score(nat, adv, alpha=alpha, score=score)
    return values, order_statistic(values, math.ceil(rank_of(percentile, values.numel())))


def is_below(scores: Tensor, threshold: Tensor) -> Tensor:
    """Return where a score is strictly below ``threshold`` (0-d), NaN counting as largest."""
    scores = scores.float()  # A 0-d tensor would be rounded to the dtype of the scores.
    if threshold.device.type == "cpu" and not threshold.isnan():
        return scores < threshold  # On the CPU reading it is free.
    return (scores < threshold) | (threshold.isnan() & ~scores.isnan())


def zero_where_(tensor: Tensor, condition: Tensor) -> None:
    """Set entries to 0 where a bool tensor of the same shape says so."""
    if tensor.device.type == "cpu" and tensor.dtype == torch.float32:
        # By bits, with vector instructions: a product would leave NaN as it is.
        tensor.view(torch.int32).bitwise_and_(condition.to(torch.int32).sub_(1))
    else:
        tensor.masked_fill_(condition, 0)


def order_statistic(scores: Tensor, rank: int) -> Tensor:
    """Return the value at ``rank`` (from 0) of the sorted scores, without reading it back.

    NaN counts as largest. NumPy, which torch goes without, selects with vector instructions on a
    CPU.
    """
    numpy = _numpy() if scores.device.type == "cpu" and scores.dtype == torch.float32 else None
    if numpy is None:
        return torch.kthvalue(scores.flatten(), rank + 1).values
    values = scores.detach().reshape(-1).numpy()
    return torch.from_numpy(numpy.partition(values, rank)[rank : rank + 1].copy())[0]


def _numpy() -> Any:
    """Return NumPy, which torch goes without; None where it is not installed."""
    try:
        import numpy
    except ImportError:
        return None
    return numpy


def count_nonfinite(scores: Tensor) -> Tensor:
    """Return how many scores are NaN or infinite, 0-d int32."""
    if scores.device.type == "cpu" and scores.sum().isfinite():
        return torch.zeros(
            (), dtype=torch.int32, device=scores.device
        )  # One of them would be seen in the sum.
    return (~scores.isfinite()).sum(dtype=torch.int32)


def _percentile(scores: Tensor, percentile: float) -> Tensor:
    """Return ``numpy.percentile(scores, percentile, method="linear")`` as a 0-d tensor."""
    rank = rank_of(percentile, scores.numel())
    above = order_statistic(scores, math.ceil(rank))
    if rank == math.ceil(rank):
        return above
    below = order_statistic(scores, math.floor(rank))
    # float64, as rounding the sum to float32 midway could leave the interval [below, above].
    fraction = rank - math.floor(rank)
    between = (below.double() + fraction * (above.double() - below.double())).float()
    # Two infinities have no difference.
    return torch.where(below == above, above, between)


def _check(
    nat_grads: Sequence[Tensor],
    adv_grads: Sequence[Tensor],
    percentile: float | Sequence[float],
    alpha: float | Sequence[float],
    score: Score,
) -> tuple[torch.device, list[float], list[float]]:
    """Return the device, and one percentile and one alpha per tensor."""
    device = check_lists({"nat_grads": nat_grads, "adv_grads": adv_grads}, empty=False)
    check_choice("score", score, SCORES)
    count = len(nat_grads)
    percentiles = per_tensor("percentile", percentile, count, 0, 100)
    return device, percentiles, per_tensor("alpha", alpha, count, 0, 1)
