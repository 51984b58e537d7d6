"""TRADES (Zhang et al., ICML 2019, arXiv 1901.08573; official code yaodongyu/TRADES).

L = CE(x, y) + beta * KL(p(x) || p(x')), gradient through both p(x) and p(x').
The attack raises the same KL, from a start that is not clamped to [0, 1], as in the official code.
That code recomputes the logits of x in every attack step; the weights do not move meanwhile, so
here they are computed once, with equal result. It computes them twice in the loss too, which moves
BatchNorm's running statistics once more: ``natural_twice``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cure_fast.config import Config, MethodSettings
from cure_fast.config.checks import check_range
from cure_fast.losses import cross_entropy, kl_divergence, kl_divergence_from
from cure_fast.step.method import Method, Terms

if TYPE_CHECKING:
    from cure_fast.training.trainer import Run


@dataclass(frozen=True, kw_only=True)
class TradesSettings(MethodSettings):
    """TRADES."""

    beta: float = 6.0
    """Weight of the KL term, 0 or more (paper: 1 and 6); more of it trades natural for robust."""
    natural_twice: bool = False
    """Pass the natural images once more, behind the adversarial, for the KL's p(x) (official code).
    Same loss and gradients, slower; BatchNorm's running statistics count natural images twice."""

    def __post_init__(self) -> None:
        check_range(self, "beta", 0)


def kl_attack(run: Run, x: Tensor, y: Tensor) -> Tensor:
    """Return PGD images that raise KL(p(x) || p(x')), with p(x) fixed."""
    with torch.no_grad():
        kl = kl_divergence_from(run.model(x))
    return run.pgd(x, lambda logits: kl(logits).sum())


def loss(run: Run, x: Tensor, x_adv: Tensor, y: Tensor) -> Terms:
    """Return CE(x, y) + beta * KL(p(x) || p(x'))."""
    logits, logits_adv = run.model(x), run.model(x_adv)
    natural_ce = cross_entropy(logits, y).mean()
    target = run.model(x) if run.settings.natural_twice else logits
    kl = kl_divergence(target, logits_adv).mean()
    return {"total": natural_ce + run.settings.beta * kl, "natural_ce": natural_ce, "kl": kl}


def unclamped_start(config: Config) -> Config:
    """Return ``config`` with the attack's start as the noise leads, also outside of [0, 1]."""
    return replace(config, attack=replace(config.attack, clamp_start=False))


TRADES = Method(
    name="trades",
    label="TRADES",
    title="TRADES: cross-entropy on natural images plus KL to the adversarial prediction",
    paper="Zhang et al., Theoretically Principled Trade-off between Robustness and Accuracy, 2019",
    settings=TradesSettings(),
    attack=kl_attack,
    loss=loss,
    preset=unclamped_start,
)
