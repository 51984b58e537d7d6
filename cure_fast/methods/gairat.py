"""GAIRAT: cross-entropy weighted by steps to the boundary (Zhang et al., ICLR 2021, arXiv
2010.01736).

Kappa counts how many of an attack's K iterates, before each step, are still classified correctly.
An image's weight is w = (1 + tanh(lambda + 5 * (1 - 2 kappa / K))) / 2, over its mean in the batch,
and L = mean[w * CE(x', y)]; until the burn-in is over, w is 1.

Official code: zjfheart/Geometry-aware-Instance-reweighted-Adversarial-Training, of which the weight
called Tanh with a fixed lambda is here. For an odd K it halves K - 1. Networks trained so are far
less robust to AutoAttack than to PGD: report ``aa``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import torch
from torch import Tensor

from cure_fast.batch import Batch
from cure_fast.config import Config, MethodSettings
from cure_fast.config.checks import Bounds, Share, check
from cure_fast.losses import cross_entropy
from cure_fast.step.method import EPS_031, Method, SetUp, rows
from cure_fast.step.policy import Policy
from cure_fast.step.run import Run, Terms


class GairatSettings(MethodSettings):
    """GAIRAT."""

    gairat_lambda: Annotated[float, Bounds(-100, 100)] = -1.0
    """Lifts all weights before they are normalised, -100 to 100: the higher, the more equal they
    are."""
    gairat_burn_in: Share = 59 / 120
    """Share of the run, 0 to 1, in whose epochs all weights are 1."""


def weighs(run: Run) -> bool:
    """Return whether the burn-in is over."""
    return run.epoch / run.config.optim.epochs >= run.settings.gairat_burn_in


def attack(run: Run, batch: Batch) -> Tensor:
    """Return PGD images that raise the cross-entropy; note how often each was still correct."""
    kappa = batch.x.new_zeros(batch.y.shape)

    def objective(logits: Tensor) -> Tensor:
        kappa.add_(logits.argmax(dim=1) == batch.y)
        return cross_entropy(logits, batch.y).sum()

    x_adv = run.pgd(batch.x, objective)
    batch.notes["kappa"] = kappa
    return x_adv


class Weigh(Policy):
    """Notes the weights of the whole batch, which passes over parts of it could not normalise."""

    moves_weights = False

    @contextmanager
    def around(self, run: Run, batch: Batch) -> Iterator[None]:
        """Turn the attack's counts into weights [N] of mean 1 for the loss."""
        if weighs(run):
            far = 1 - 2 * batch.notes["kappa"] / run.attack_steps
            # (1 + tanh(z)) / 2, which rounds to 0 for small z.
            w = torch.sigmoid(2 * (run.settings.gairat_lambda + 5 * far))
            batch.notes["weight"] = w / run.mean(w)
        yield


def loss(run: Run, batch: Batch) -> Terms:
    """Return mean[w * CE(x', y)]."""
    each = cross_entropy(run.model(batch.x_adv), batch.y)
    total = (batch.notes["weight"] * each if weighs(run) else each).mean()
    return {"total": total, "adversarial_ce": each.mean()}


def check_steps(config: Config) -> None:
    """Raise ``InputError`` for an attack without steps to count."""
    steps = config.attack.attack_steps
    check(steps > 0, "attack_steps", steps, "at least 1 with --method gairat, which counts them")


# The rate's drops and the burn-in's end come with epochs 60, 90, 110 or 30, 60, counted from 1.
OFFICIAL = "zjfheart/Geometry-aware-Instance-reweighted-Adversarial-Training"
ATTACK = {**EPS_031, "clamp_start": True, "start": "uniform"}

GAIRAT = Method(
    name="gairat",
    label="GAIRAT",
    title="GAIRAT: cross-entropy on PGD images weighted by their distance from the boundary",
    arxiv="2010.01736",
    paper="Zhang et al., Geometry-aware Instance-reweighted Adversarial Training, ICLR 2021",
    settings=GairatSettings(),
    attack=attack,
    loss=loss,
    policies=lambda run: (Weigh(),),
    phase=weighs,
    check=check_steps,
    published={
        "*/wrn*": SetUp(
            OFFICIAL,
            epochs=120,
            weight_decay=2e-4,
            milestones=(59 / 120, 89 / 120, 109 / 120),
            lr_factors=(0.1, 0.01, 0.005),
            **ATTACK,
        ),
        "*": SetUp(
            OFFICIAL,
            epochs=100,
            weight_decay=2e-4,
            milestones=(29 / 100, 59 / 100),
            gairat_burn_in=29 / 100,
            **ATTACK,
        ),
    },
    rows=rows(
        "GAIRAT",
        ("cifar10", "wrn32-10", ", best epoch (GAIRAT's README)", 85.75, 57.81, None, None),
    ),
)
