"""FAT: friendly adversarial training (Zhang et al., ICML 2020, arXiv 2002.11242).

Its attack leaves an image alone that was misclassified and then took tau more steps: iterates that
are misclassified count, the start first, so that with tau = 0 such a start is used as it is. Tau
grows over the run. The loss is PGD-AT's, TRADES' or MART's; so is what the attack raises.

Official code: zjfheart/Friendly-Adversarial-Training. It takes finished images out of the batch,
which saves time and changes nothing else; here all images go through all steps, and finished ones
stay where they are. Its FAT adds noise after each step (``--fat-noise 0.001``), where the default
here is none; its other two forms add none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from cure_fast.batch import Batch
from cure_fast.config import MethodSettings
from cure_fast.config.checks import Weight, Whole, check
from cure_fast.losses import cross_entropy, kl_divergence_from
from cure_fast.methods import mart, pgd_at, trades
from cure_fast.step.method import EPS_031, Method, SetUp, rows
from cure_fast.step.run import Run


class FatSettings(MethodSettings):
    """FAT."""

    fat_tau: Whole = 0
    """Steps that an image takes after it was misclassified, 0 or more; --attack-steps is PGD."""
    fat_growth: tuple[float, ...] = (50 / 120, 90 / 120)
    """Shares of the run, 0 to 1, after each of which --fat-tau is one more; 1 keeps it."""
    fat_noise: Weight = 0.0
    """Deviation of the noise that each step adds, in pixel units, 0 or more (FAT: 0.001)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        within = all(0 <= share <= 1 for share in self.fat_growth)
        check(within, "fat_growth", self.fat_growth, "shares of the run, each between 0 and 1")


class FatTradesSettings(FatSettings, trades.TradesSettings):
    """FAT for TRADES."""

    fat_growth: tuple[float, ...] = (30 / 85, 50 / 85, 70 / 85)
    """Shares of the run, 0 to 1, after each of which --fat-tau is one more."""


class FatMartSettings(FatSettings, mart.MartSettings):
    """FAT for MART."""

    beta: Weight = 6.0
    """Weight of the KL term, 0 or more."""
    fat_growth: tuple[float, ...] = (20 / 90, 40 / 90, 60 / 90, 80 / 90)
    """Shares of the run, 0 to 1, after each of which --fat-tau is one more."""


def tau(run: Run) -> int:
    """Return how many steps an image takes in this epoch after it was misclassified."""
    done = run.epoch / run.config.optim.epochs
    return run.settings.fat_tau + sum(done >= share for share in run.settings.fat_growth)


def friendly(run: Run, batch: Batch, objective: Callable[[Tensor], Tensor]) -> Tensor:
    """Return early-stopped PGD images that raise ``objective``, from logits to a loss [N]."""
    noise, source = run.settings.fat_noise, run.generators["attack"]
    step = batch.x.new_full(batch.y.shape, run.config.attack.step_length)
    left = torch.zeros_like(step) + run.engine.number("tau", tau)

    def watched(logits: Tensor) -> Tensor:
        wrong = logits.argmax(dim=1) != batch.y
        step.masked_fill_(wrong & (left <= 0), 0)
        left.sub_(wrong.to(left.dtype))
        return objective(logits).sum()

    def jitter(x_adv: Tensor) -> Tensor:
        drawn = run.drawn(x_adv, lambda t: t.normal_(0, noise, generator=source))
        return x_adv + drawn * (step > 0).view(-1, 1, 1, 1)

    return run.pgd(batch.x, watched, step_size=step, after=jitter if noise else None)


def attack(run: Run, batch: Batch) -> Tensor:
    """Return early-stopped images that raise the cross-entropy."""
    return friendly(run, batch, lambda logits: cross_entropy(logits, batch.y))


def kl_attack(run: Run, batch: Batch) -> Tensor:
    """Return early-stopped images that raise KL(p(x) || p(x')), with p(x) fixed."""
    with torch.no_grad():
        kl = kl_divergence_from(run.model(batch.x))
    return friendly(run, batch, kl)


# Learning rates drop at the start of the epochs 60, 75 and so on, counted from 1.
OFFICIAL = "zjfheart/Friendly-Adversarial-Training"
CLAMPED = {**EPS_031, "clamp_start": True, "weight_decay": 2e-4}

FAT = Method(
    name="fat",
    label="FAT",
    title="FAT: PGD-AT whose attack stops soon after an image is misclassified",
    arxiv="2002.11242",
    paper="Zhang et al., Attacks Which Do Not Kill Training Make Adversarial Learning Stronger, "
    "ICML 2020",
    settings=FatSettings(),
    attack=attack,
    loss=pgd_at.loss,
    published={
        "*": SetUp(
            OFFICIAL,
            epochs=120,
            milestones=(59 / 120, 89 / 120, 109 / 120),
            lr_factors=(0.1, 0.01, 0.005),
            start="uniform",
            fat_noise=0.001,
            **CLAMPED,
        ),
    },
    # CURE's rows have more C&W than PGD, and for WRN-34-10 put three models of the README together.
    rows=rows("FAT", ("cifar10", "wrn32-10", " (FAT's README)", 89.34, 46.13, None, None)),
)
FAT_TRADES = replace(
    FAT,
    name="fat_trades",
    label="FAT for TRADES",
    title="FAT for TRADES: its attack stops soon after an image is misclassified",
    settings=FatTradesSettings(),
    attack=kl_attack,
    loss=trades.loss,
    published={"*": SetUp(OFFICIAL, epochs=85, milestones=(74 / 85,), **CLAMPED)},
    rows=rows(
        "FAT for TRADES", ("cifar10", "wrn34-10", " (FAT's README)", 86.60, 55.98, None, None)
    ),
)
FAT_MART = replace(
    FAT,
    name="fat_mart",
    label="FAT for MART",
    title="FAT for MART: its attack stops soon after an image is misclassified",
    settings=FatMartSettings(),
    loss=mart.loss,
    published={"*": SetUp(OFFICIAL, epochs=90, milestones=(59 / 90, 89 / 90), **CLAMPED)},
    rows={},
)
