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
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Score = Literal["abs", "signed", "abs_of_sum"]


def rgp_score(nat_grad: Tensor, adv_grad: Tensor, *, alpha: float, score: Score = "abs") -> Tensor:
    """Return the prominence of each weight, float32, in the shape of ``nat_grad``.

    Args:
        nat_grad: gradient of the natural loss, any shape and floating dtype.
        adv_grad: gradient of the adversarial loss, same shape.
        alpha: weight of the natural gradient, in [0, 1].
        score: how the two are combined; see the module's docstring.
    """
    nat, adv = nat_grad.float(), adv_grad.float()
    if score == "abs":
        return alpha * nat.abs() + (1 - alpha) * adv.abs()
    total = alpha * nat + (1 - alpha) * adv
    if score == "signed":
        return total
    if score == "abs_of_sum":
        return total.abs()
    raise ValueError(f"score: expected abs, signed or abs_of_sum, got {score!r}.")


def rgp_threshold(
    nat_grads: Sequence[Tensor],
    adv_grads: Sequence[Tensor],
    *,
    percentile: float | Sequence[float],
    alpha: float | Sequence[float],
    score: Score = "abs",
) -> Tensor:
    """Return the percentile of each tensor's prominence, float32 [L].

    Args:
        nat_grads: L gradients of the natural loss, one per weight tensor, none empty.
        adv_grads: L gradients of the adversarial loss, same shapes.
        percentile: percent of weights below the threshold, in [0, 100]; one number or L.
        alpha: weight of the natural gradient, in [0, 1]; one number or L.
        score: how the two gradients are combined; see the module's docstring.

    Raises:
        ValueError: for lists of different lengths, different shapes, an empty tensor or a value
            out of range.
    """
    percentiles, alphas = _check(nat_grads, adv_grads, percentile, alpha)
    if not nat_grads:
        return torch.empty(0)
    scores = zip(nat_grads, adv_grads, percentiles, alphas, strict=True)
    return torch.stack(
        [_percentile(rgp_score(n, a, alpha=w, score=score), p) for n, a, p, w in scores]
    )


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
        grads: L gradients to mask, changed in place.
        nat_grads: L gradients of the natural loss, same shapes.
        adv_grads: L gradients of the adversarial loss, same shapes.
        percentile: percent of weights below the threshold, in [0, 100]; one number or L.
        alpha: weight of the natural gradient, in [0, 1]; one number or L.
        score: how the two gradients are combined; see the module's docstring.

    Raises:
        ValueError: for lists of different lengths, different shapes, an empty tensor or a value
            out of range.
    """
    percentiles, alphas = _check(nat_grads, adv_grads, percentile, alpha)
    if [g.shape for g in grads] != [g.shape for g in nat_grads]:
        raise ValueError("grads: expected the shapes of nat_grads, one tensor for each.")
    if not grads:
        return torch.empty(0)
    kept = []
    for grad, nat, adv, p, w in zip(grads, nat_grads, adv_grads, percentiles, alphas, strict=True):
        scores = rgp_score(nat, adv, alpha=w, score=score)
        low = scores < _order_statistic(scores, math.ceil(_rank(p, scores.numel())))
        grad.masked_fill_(low, 0)
        kept.append(1 - low.float().mean())
    return torch.stack(kept)


def _rank(percentile: float, count: int) -> float:
    """Return the position of the percentile among ``count`` sorted values, as NumPy computes it."""
    return percentile / 100 * (count - 1)


def _order_statistic(scores: Tensor, rank: int) -> Tensor:
    """Return the value at ``rank`` (from 0) of the sorted scores, without reading it back."""
    return torch.kthvalue(scores.flatten(), rank + 1).values


def _percentile(scores: Tensor, percentile: float) -> Tensor:
    """Return ``numpy.percentile(scores, percentile, method="linear")`` as a 0-d tensor."""
    rank = _rank(percentile, scores.numel())
    below = _order_statistic(scores, math.floor(rank))
    if rank == math.floor(rank):
        return below
    above = _order_statistic(scores, math.ceil(rank))
    # float64, as rounding the sum to float32 midway could leave the interval [below, above].
    fraction = rank - math.floor(rank)
    return (below.double() + fraction * (above.double() - below.double())).float()


def _check(
    nat_grads: Sequence[Tensor],
    adv_grads: Sequence[Tensor],
    percentile: float | Sequence[float],
    alpha: float | Sequence[float],
) -> tuple[list[float], list[float]]:
    """Return one percentile and one alpha per tensor, or raise ``ValueError``."""
    if [g.shape for g in nat_grads] != [g.shape for g in adv_grads]:
        raise ValueError("nat_grads and adv_grads: expected the same number of tensors and shapes.")
    if any(g.numel() == 0 for g in nat_grads):
        raise ValueError("nat_grads: an empty tensor has no percentile.")
    return (
        _per_tensor("percentile", percentile, len(nat_grads), 100),
        _per_tensor("alpha", alpha, len(nat_grads), 1),
    )


def _per_tensor(name: str, value: float | Sequence[float], count: int, high: float) -> list[float]:
    values = list(value) if isinstance(value, Sequence) else [value] * count
    if len(values) != count:
        raise ValueError(f"{name}: expected one number or {count}, got {len(values)}.")
    if not all(0 <= v <= high for v in values):
        raise ValueError(f"{name}: expected numbers in [0, {high}], got {value}.")
    return values
