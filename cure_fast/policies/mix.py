"""Mixup (Zhang et al., ICLR 2018) and CutMix (Yun et al., ICCV 2019) of a batch with itself.

Each image meets the one at its place from the batch's other end, as in timm: one draw per batch
decides whether, how and how much. A method that has this policy learns from two labels.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from cure_fast.batch import Batch
from cure_fast.step.policy import Policy
from cure_fast.step.run import Run

# Of the two shares' Beta distributions.
MIXUP, CUTMIX = 0.8, 1.0
# Probability of CutMix rather than mixup.
SWITCH = 0.5


class Mix(Policy):
    """Mixes a batch with probability ``prob``, by the run's seed and the step.

    It notes the label of the ``partner`` [N] int64 and the ``share`` [N] of the own label, also
    where nothing is mixed, with a share of 1.
    """

    moves_weights = False

    def __init__(self, prob: float) -> None:
        super().__init__()
        self.prob = prob

    def before(self, run: Run, batch: Batch) -> Batch:
        """Return the mixed batch."""
        random = np.random.default_rng((run.config.run.seed, run.step))
        x, share = batch.x, 1.0
        if random.random() < self.prob:
            cut = random.random() < SWITCH
            alpha = CUTMIX if cut else MIXUP
            share = random.beta(alpha, alpha)
            # An image's partner may be another process's.
            whole = run.of_all(x)
            mixed, share = cutmix(whole, share, random) if cut else mixup(whole, share)
            x = run.own_of(mixed)
        noted = {
            "partner": run.own_of(run.of_all(batch.y).flip(0)),
            "share": torch.full_like(batch.y, share, dtype=x.dtype),
        }
        return replace(batch, x=x, notes=batch.notes | noted)


def mixup(x: Tensor, share: float) -> tuple[Tensor, float]:
    """Return ``share`` of each image [N, C, H, W] plus the rest of its partner, and the share."""
    return (share * x + (1 - share) * x.flip(0)).clamp_(0, 1), share


def cutmix(x: Tensor, share: float, random: np.random.Generator) -> tuple[Tensor, float]:
    """Return images [N, C, H, W] with a box of their partners', and the share of own pixels.

    The box would leave ``share`` of the pixels; what of it lies outside the image is lost.
    """
    limits = []
    for size in x.shape[2:]:
        half, centre = int(size * (1 - share) ** 0.5) // 2, int(random.integers(size))
        limits.append((max(centre - half, 0), min(centre + half, size)))
    (top, bottom), (left, right) = limits
    mixed = x.clone()
    mixed[:, :, top:bottom, left:right] = x.flip(0)[:, :, top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (x.shape[2] * x.shape[3])
