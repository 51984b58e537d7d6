"""Tables and memory of a selection over tensors of fixed shapes, built once for many calls."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .layout import ALIGNMENT, check_dense
from .tables import TensorList, upload

# Bins of the widest digit. The first digit has 8 bits, the other two 11 or 12.
BINS = 4096
# Elements after which the next tensor's scores begin on a multiple of 16 bytes.
SCORE_STEP = ALIGNMENT // 4
EXEMPT = float("-inf")


def rank_of(percentile: float, count: int) -> float:
    """Return the position of a percentile among ``count`` sorted values, as NumPy computes it."""
    return percentile / 100 * (count - 1)


class Workspace:
    """Everything that a selection reads and writes besides the gradients.

    A tensor whose percentile is 0 keeps all its weights: it is exempt and has no scores.

    Args:
        tensors: L dense tensors whose shapes and memory order the scores take.
        percentiles: percent of weights below the threshold, one per tensor.
        alphas: weight of the natural gradient in the score, one per tensor.
        score: how the two gradients are combined; see :mod:`.rgp`.
        keep_exempt: score exempt tensors too, for whoever wants their smallest score.

    Raises:
        ValueError: for a tensor that is not dense, by its number.
        RuntimeError: while a CUDA graph is being captured.

    Attributes:
        device: where it lies, that of the tensors.
        scores: L score tensors, float32, or None for exempt ones.
        thresholds: float32 [L], the order statistic that a kept score reaches; -inf where exempt.
        kept: float32 [L], fraction of the weights kept; 1 where exempt.
        nonfinite: int32 [L], number of scores that are NaN or infinite; 0 where exempt.
    """

    # In inference mode its memory would be tensors that nothing could change afterwards.
    @torch.inference_mode(mode=False)
    def __init__(
        self,
        tensors: Sequence[Tensor],
        *,
        percentiles: Sequence[float],
        alphas: Sequence[float],
        score: str,
        keep_exempt: bool = False,
    ) -> None:
        count = len(tensors)
        self.device = device = tensors[0].device if tensors else torch.device("cpu")
        for i, tensor in enumerate(tensors):
            check_dense(f"tensors[{i}]", tensor)
        self.percentiles, self.alphas, self.score = tuple(percentiles), tuple(alphas), score
        scored = [keep_exempt or percentile > 0 for percentile in percentiles]
        self.scores = TensorList(_score_tensors(tensors, scored, device), device=device)
        exact = [rank_of(p, t.numel()) for p, t in zip(percentiles, tensors, strict=True)]
        self.ranks = upload([math.ceil(rank) for rank in exact], torch.int32, device)
        # Of the way from the order statistic below to the one at the rank; 1 where they coincide.
        fractions = [rank - math.floor(rank) or 1 for rank in exact]
        self.fractions = upload(fractions, torch.float64, device)
        weights = [number for alpha in alphas for number in (alpha, 1 - alpha)]
        self.weights = upload(weights, torch.float32, device).view(count, 2)
        self.histogram = torch.zeros(count, BINS, dtype=torch.int32, device=device)
        self.tickets = torch.zeros(count, dtype=torch.int32, device=device)
        # Of each tensor: the digits found so far, the rank that is left, non-finite scores so far,
        # and the key of the largest score below the threshold.
        self.state = torch.zeros(count, 4, dtype=torch.int32, device=device)
        self.thresholds = torch.full((count,), EXEMPT, dtype=torch.float32, device=device)
        self.kept = torch.ones(count, dtype=torch.float32, device=device)
        self.nonfinite = torch.zeros(count, dtype=torch.int32, device=device)

    @property
    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """Thresholds, fractions kept and counts of non-finite scores."""
        return self.thresholds, self.kept, self.nonfinite


def _score_tensors(
    tensors: Sequence[Tensor], scored: Sequence[bool], device: torch.device
) -> list[Tensor | None]:
    """Return float32 tensors of one storage, shaped as ``tensors`` and in their memory order."""
    lengths = [
        -(-tensor.numel() // SCORE_STEP) * SCORE_STEP if wanted else 0
        for tensor, wanted in zip(tensors, scored, strict=True)
    ]
    storage = torch.empty(sum(lengths), dtype=torch.float32, device=device)
    parts = storage.split(lengths)
    return [
        part[: tensor.numel()].as_strided(tensor.shape, tensor.stride()) if wanted else None
        for part, tensor, wanted in zip(parts, tensors, scored, strict=True)
    ]
