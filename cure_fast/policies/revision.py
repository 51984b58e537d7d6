"""Revision: a slow average of the weights teaches the network (CURE, Gowda et al., ICLR 2024).

To the method's loss it adds weight * [KL(p_rev(x) || p(x)) + KL(p_rev(x') || p(x'))] (Eq. 8), where
rev is the revision model, without gradient, and x' the step's adversarial images. Logits that the
method's own loss computed of them are taken from there. With probability r in a step the revision
model moves: rev = d * rev + (1-d) * theta (Eq. 7).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from cure_fast.batch import Batch
from cure_fast.config import MethodSettings
from cure_fast.config.checks import Share, Weight, check
from cure_fast.losses import kl_divergence
from cure_fast.policies.average import Average, frozen_copy
from cure_fast.step.policy import Policy, PolicyInfo
from cure_fast.step.run import Run, Terms


class RevisingSettings(MethodSettings):
    """How the revision model moves and predicts."""

    revision_rate: Share = 0.2
    """Probability of a revision update in a step, 0 to 1 (paper and code: 0.2)."""
    revision_decay: Share = 0.999
    """Share of the revision model that stays in an update, 0 to 1 (paper and code: 0.999)."""
    revision_warmup: bool = True
    """Bound that share by 1 - 1/(t+1) in step t (code; the paper has no such bound)."""
    revision_rate_decay: Literal["none", "freeze", "halve", "cosine"] = "none"
    """Decay of the rate: none (code's default), 0 after revision_decay_start (freeze), halved in
    each step after it (code's ema_dynamic), or cosine over the run. The paper gives no rule."""
    revision_decay_start: Share = 0.5
    """Share of the run after which freeze and halve act (code: epoch 100 of 200)."""
    revision_order: Literal["after", "before"] = "after"
    """Revision update after the optimiser's step (code), or before the loss (Algorithm 1)."""
    revision_buffers: Literal["own", "average"] = "own"
    """BatchNorm statistics of the revision model: from its own forwards (code), or averaged."""
    revision_mode: Literal["train", "eval"] = "train"
    """BatchNorm of the revision model: batch statistics (code), or running ones."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self.revision_mode == "train" or self.revision_buffers == "average",
            "revision_mode",
            self.revision_mode,
            "--revision-buffers average with it: without train-mode forwards its own would never "
            "move",
        )

    def rate_at(self, run: Run) -> float:
        """Return the probability of a revision update at the current step."""
        rate, decay = self.revision_rate, self.revision_rate_decay
        if decay == "cosine":
            return rate * (1 + math.cos(math.pi * run.progress)) / 2
        if decay == "none" or run.progress < self.revision_decay_start:
            return rate
        past = run.position - int(self.revision_decay_start * run.total_steps) + 1
        return 0.0 if decay == "freeze" else rate * 0.5 ** min(past, 1000)

    def decay_at(self, run: Run) -> float:
        """Return the share of the revision model that stays in a move at the current step."""
        # The public code's bound counts steps from 1.
        bound = 1 - 1 / (run.step + 2) if self.revision_warmup else 1.0
        return min(bound, self.revision_decay)


class Revise(Average):
    """Moves a revision model after the trained network, and teaches that to predict as it does.

    Args:
        weight: of the consistency loss.
        active: from the run to whether the step under way has it; before that the revision model
            rests.
    """

    def __init__(
        self,
        network: nn.Module,
        settings: RevisingSettings,
        *,
        weight: float,
        active: Callable[[Run], bool] = lambda run: True,
    ) -> None:
        super().__init__(
            "revision",
            network,
            decay=settings.decay_at,
            rate=lambda run: settings.rate_at(run) if active(run) else 0.0,
            buffers=settings.revision_buffers,
            order=settings.revision_order,
        )
        self.weight, self.active = weight, active
        self.trains = settings.revision_mode == "train"

    def on_loss(
        self, run: Run, batch: Batch, terms: Terms, logits: Callable[[Tensor], Tensor]
    ) -> None:
        """Add the term ``consistency``, a batch mean (Eq. 8)."""
        if not self.active(run):
            return
        self.network.train(self.trains)
        # A method without an attack has the images themselves for adversarial ones.
        several = (batch.x,) if batch.x_adv is batch.x else (batch.x, batch.x_adv)
        with torch.no_grad():
            taught = [self.network(images) for images in several]
        losses = [
            kl_divergence(target, logits(images)).mean()
            for target, images in zip(taught, several, strict=True)
        ]
        terms["consistency"] = losses[0] if len(losses) == 1 else losses[0] + losses[1]
        terms["total"] = terms["total"] + self.weight * terms["consistency"]


class RevisionSettings(RevisingSettings):
    """CURE's revision for any method."""

    revision_weight: Weight = 1.0
    """Weight of the consistency loss, CURE's gamma (paper: 1, or 0.5 for WRN-34-10)."""


def build_revision(run: Run, settings: RevisionSettings) -> Policy:
    """Return the revision model and its consistency loss."""
    return Revise(frozen_copy(run.model), settings, weight=settings.revision_weight)


REVISION = PolicyInfo(
    name="revision",
    label="revision",
    title="CURE's revision: a slow average of the weights, to whose predictions the loss ties",
    arxiv="2401.14948",
    paper="Gowda et al., Conserve-Update-Revise to Cure Generalization and Robustness, ICLR 2024",
    settings=RevisionSettings(),
    build=build_revision,
    fixed=("revision_buffers",),
)
