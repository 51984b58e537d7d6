"""Rivals and kernels for the selection and the update of a whole model.

Each provider takes the tensors and returns a step: a function of no arguments that does the work
once and returns the tensors it changed. What can be prepared once is prepared before.

    numpy               the public CURE code's way: per tensor to the CPU, numpy.percentile there
    torch-quantile      torch.quantile per tensor; it refuses more than 2**24 elements
    torch-kthvalue      torch.kthvalue per tensor
    torch-sort          torch.sort per tensor
    compile-*           torch.compile of foreach code, replayed from a CUDA graph on a GPU
    triton              the operations of cure_fast.kernels on plain lists
    triton-prepared     the same with tables and memory built once (RGP, TensorList)
    triton-graph        triton-prepared, replayed from a CUDA graph
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from bench.capture import captured
from bench.kernel_inputs import ModelTensors, in_memory_order
from cure_fast.kernels import RGP, TensorList, masked_sgd_, rgp_mask_, rgp_select

PERCENTILE, ALPHA = 30, 0.1
LR, MOMENTUM, WEIGHT_DECAY, DECAY = 0.1, 0.9, 5e-4, 0.999

P = ParamSpec("P")
R = TypeVar("R")
Step = Callable[[], Sequence[Tensor]]
# From the prominence [n] of a tensor's weights to its threshold, a number or a 0-d tensor.
Threshold = Callable[[Tensor], Tensor | float]


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Return ``function`` compiled as one graph, for the shapes at hand alone."""
    return torch.compile(function, dynamic=False, fullgraph=True)


def rank_of(count: int) -> int:
    """Return the order statistic with which "strictly below the percentile" can be decided."""
    return math.ceil(PERCENTILE / 100 * (count - 1))


def prominence(nat: Tensor, adv: Tensor) -> Tensor:
    return ALPHA * nat.float().abs() + (1 - ALPHA) * adv.float().abs()


def numpy_threshold(scores: Tensor) -> float:
    return float(np.percentile(scores.cpu().numpy(), PERCENTILE))


def quantile_threshold(scores: Tensor) -> Tensor:
    return torch.quantile(scores, PERCENTILE / 100)


def kthvalue_threshold(scores: Tensor) -> Tensor:
    return torch.kthvalue(scores, rank_of(scores.numel()) + 1).values


def sort_threshold(scores: Tensor) -> Tensor:
    return torch.sort(scores).values[rank_of(scores.numel())]


def mask_each(
    grads: list[Tensor], nat: list[Tensor], adv: list[Tensor], threshold: Threshold
) -> None:
    """Mask gradients tensor by tensor."""
    for grad, n, a in zip(grads, nat, adv, strict=True):
        scores = prominence(n, a)
        grad.masked_fill_(scores < threshold(scores), 0)


def foreach_sgd(params: list[Tensor], grads: list[Tensor], momentum: list[Tensor]) -> None:
    """Step by SGD with weight decay and momentum, over all tensors at once."""
    decayed = torch._foreach_add(grads, params, alpha=WEIGHT_DECAY)  # pyright: ignore[reportPrivateImportUsage]
    torch._foreach_mul_(momentum, MOMENTUM)  # pyright: ignore[reportPrivateImportUsage]
    torch._foreach_add_(momentum, decayed)  # pyright: ignore[reportPrivateImportUsage]
    torch._foreach_add_(params, momentum, alpha=-LR)  # pyright: ignore[reportPrivateImportUsage]


def foreach_ema(averages: list[Tensor], params: list[Tensor]) -> None:
    torch._foreach_lerp_(averages, params, 1 - DECAY)  # pyright: ignore[reportPrivateImportUsage]


class Vectors:
    """The same tensors as vectors in memory order: no copies where they lie channels-last."""

    def __init__(self, tensors: ModelTensors) -> None:
        def vectors(several: list[Tensor]) -> list[Tensor]:
            return [in_memory_order(t) for t in several]

        self.nat = vectors(tensors.of_masked(tensors.nat))
        self.adv = vectors(tensors.of_masked(tensors.adv))
        self.masked_grads = vectors(tensors.of_masked(tensors.grads))
        self.grads = vectors(tensors.grads)
        self.params = vectors(tensors.params)
        self.momentum = vectors(tensors.momentum)
        self.averages = vectors(tensors.averages)

    def finish(self, *, update: bool, ema: bool) -> None:
        """Do what follows the mask."""
        if update:
            foreach_sgd(self.params, self.grads, self.momentum)
        if ema:
            foreach_ema(self.averages, self.params)


def changed(tensors: ModelTensors, *, update: bool, ema: bool) -> list[Tensor]:
    """Return the tensors whose values the operation defines."""
    if not update:
        return tensors.of_masked(tensors.grads)
    return [*tensors.params, *tensors.momentum, *(tensors.averages if ema else ())]


def eager(tensors: ModelTensors, *, threshold: Threshold, update: bool, ema: bool) -> Step:
    """Return a step of plain PyTorch, one tensor after the other; the update by foreach."""
    vectors = Vectors(tensors)
    outputs = changed(tensors, update=update, ema=ema)

    def step() -> Sequence[Tensor]:
        mask_each(vectors.masked_grads, vectors.nat, vectors.adv, threshold)
        vectors.finish(update=update, ema=ema)
        return outputs

    return step


def compiled_each(tensors: ModelTensors, *, threshold: Threshold, update: bool, ema: bool) -> Step:
    """Return the step of :func:`eager`, compiled as a whole."""
    whole = compiled(eager(tensors, threshold=threshold, update=update, ema=ema))
    outputs = changed(tensors, update=update, ema=ema)

    def step() -> Sequence[Tensor]:
        whole()
        return outputs

    return captured(step)


# Width of the rows of compiled_bisect: few enough rows, little padding of small tensors.
ROW = 2048
# Two bits of a threshold are found per pass, from the highest: 16 passes for 31 bits.
SHIFTS = range(30, -1, -2)
LARGEST = 2**31 - 1


def digit_steps(device: torch.device) -> list[Tensor]:
    """Return what each pass of :func:`find_digit` can add, from the highest bits to the lowest."""
    digits = [(1,) if shift == 30 else (1, 2, 3) for shift in SHIFTS]
    values = [[d << shift for d in several] for several, shift in zip(digits, SHIFTS, strict=True)]
    return [torch.tensor(several, dtype=torch.int32, device=device) for several in values]


def find_digit(
    bits: Tensor, segments: Tensor, found: Tensor, ranks: Tensor, steps: Tensor
) -> Tensor:
    """Return ``found`` [L] with two more bits of each tensor's order statistic.

    A candidate is right so long as at most ``rank`` scores are below it.

    Args:
        bits: int32 [C, ROW], bit patterns of scores, whose order is that of the scores.
        segments: int64 [C], tensor of each row.
        found: int32 [L], the bits known so far.
        ranks: int32 [L].
        steps: int32 [D], what the next digit can add.
    """
    candidates = found[:, None] + steps
    below = [
        (bits < candidates[segments, i][:, None]).sum(1, dtype=torch.int32)
        for i in range(len(steps))
    ]
    counts = torch.zeros_like(candidates).index_add_(0, segments, torch.stack(below, 1))
    accepted = (counts <= ranks[:, None]).sum(1, dtype=torch.int32)
    return found + accepted * steps[0]


def compiled_bisect(tensors: ModelTensors, *, update: bool, ema: bool) -> Step:
    """Return a step that finds all thresholds at once, by counting over rows of all scores."""
    vectors = Vectors(tensors)
    device = vectors.nat[0].device
    sizes = [n.numel() for n in vectors.nat]
    rows = [-(-size // ROW) for size in sizes]
    segments = torch.repeat_interleave(torch.tensor(rows)).to(device)
    ranks = torch.tensor([rank_of(size) for size in sizes], dtype=torch.int32, device=device)
    padding = torch.full((ROW,), LARGEST, dtype=torch.int32, device=device).view(torch.float32)
    steps = digit_steps(device)
    outputs = changed(tensors, update=update, ema=ema)

    def score() -> list[Tensor]:
        return [prominence(n, a) for n, a in zip(vectors.nat, vectors.adv, strict=True)]

    def apply(scores: list[Tensor], thresholds: Tensor) -> None:
        for i, grad in enumerate(vectors.masked_grads):
            grad.masked_fill_(scores[i] < thresholds[i], 0)
        vectors.finish(update=update, ema=ema)

    all_scores, next_digit, finish = compiled(score), compiled(find_digit), compiled(apply)

    def step() -> Sequence[Tensor]:
        scores = all_scores()
        pieces = [
            part
            for values, count in zip(scores, rows, strict=True)
            for part in (values, padding[: count * ROW - values.numel()])
        ]
        bits = torch.cat(pieces).view(torch.int32).view(-1, ROW)
        found = torch.zeros_like(ranks)
        for added in steps:
            found = next_digit(bits, segments, found, ranks, added)
        finish(scores, found.view(torch.float32))
        return outputs

    return captured(step)


def functional(tensors: ModelTensors, *, update: bool, ema: bool) -> Step:
    """Return a step of the public operations on plain lists: tables are built at each call."""
    outputs = changed(tensors, update=update, ema=ema)
    if not update:
        nat, adv = tensors.of_masked(tensors.nat), tensors.of_masked(tensors.adv)

        def mask() -> Sequence[Tensor]:
            rgp_mask_(outputs, nat, adv, percentile=PERCENTILE, alpha=ALPHA)
            return outputs

        return mask
    # Percentile 0 exempts a tensor from the mask.
    percentiles = [float(PERCENTILE * masked) for masked in tensors.masked]
    coin = torch.tensor(ema, device=tensors.params[0].device)

    def step() -> Sequence[Tensor]:
        selection = rgp_select(tensors.nat, tensors.adv, percentile=percentiles, alpha=ALPHA)
        masked_sgd_(
            tensors.params,
            tensors.grads,
            tensors.momentum,
            lr=LR,
            momentum=MOMENTUM,
            weight_decay=WEIGHT_DECAY,
            scores=selection.scores,
            thresholds=selection.thresholds,
            averages=tensors.averages,
            decay=DECAY,
            moved=coin,
        )
        return outputs

    return step


def prepared(tensors: ModelTensors, *, update: bool, ema: bool) -> Step:
    """Return a step of the public operations for which nothing is built at a call."""
    named = [(n, nn.Parameter(p)) for n, p in zip(tensors.names, tensors.params, strict=True)]
    rgp = RGP(
        named,
        percentile=PERCENTILE,
        alpha=ALPHA,
        scope=list(map(re.escape, tensors.of_masked(tensors.names))),
    )
    nat, adv = (TensorList(tensors.of_masked(t)) for t in (tensors.nat, tensors.adv))
    outputs = changed(tensors, update=update, ema=ema)
    if not update:
        grads = TensorList(outputs)

        def mask() -> Sequence[Tensor]:
            rgp.mask_(nat, adv, grads)
            return outputs

        return mask
    coin = torch.tensor(ema, device=tensors.params[0].device)
    options = {"lr": LR, "momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY, "decay": DECAY}
    masked = _update_lists(tensors, of_masked=True)
    exempt = _update_lists(tensors, of_masked=False)

    def step() -> Sequence[Tensor]:
        selection = rgp.select(nat, adv)
        masked_sgd_(
            *masked[:3],
            **options,
            scores=selection.scores,
            thresholds=selection.thresholds,
            averages=masked[3],
            moved=coin,
        )
        if len(exempt[0]):
            masked_sgd_(*exempt[:3], **options, averages=exempt[3], moved=coin)
        return outputs

    return step


def _update_lists(tensors: ModelTensors, *, of_masked: bool) -> list[TensorList]:
    """Return weights, gradients, momentum and averages of the masked tensors, or the others."""
    several = (tensors.params, tensors.grads, tensors.momentum, tensors.averages)
    return [
        TensorList([t for t, m in zip(each, tensors.masked, strict=True) if m == of_masked])
        for each in several
    ]
