"""TRADES (Zhang et al., ICML 2019, arXiv 1901.08573; official code yaodongyu/TRADES).

L = CE(x, y) + beta * KL(p(x) || p(x')), gradient through both p(x) and p(x').
The attack raises the same KL, from a start that is not clamped to [0, 1], as in the official code.
That code recomputes the logits of x in every attack step; the weights do not move meanwhile, so
here they are computed once, with equal result. It computes them twice in the loss too, which moves
BatchNorm's running statistics once more: ``natural_twice``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cure_fast.batch import Batch
from cure_fast.config import Config, MethodSettings
from cure_fast.config.checks import Weight
from cure_fast.losses import cross_entropy, kl_divergence, kl_divergence_from
from cure_fast.step.method import EPS_031, Method, SetUp, rows
from cure_fast.step.run import Run, Terms


class TradesSettings(MethodSettings):
    """TRADES."""

    beta: Weight = 6.0
    """Weight of the KL term, 0 or more (paper: 1 and 6); more of it trades natural for robust."""
    natural_twice: bool = False
    """Pass the natural images once more, behind the adversarial, for the KL's p(x) (official code).
    Same loss and gradients, slower; BatchNorm's running statistics count natural images twice."""


def kl_attack(run: Run, batch: Batch, **other: Any) -> Tensor:
    """Return PGD images that raise KL(p(x) || p(x')), p(x) fixed; ``other`` goes to ``run.pgd``."""
    with torch.no_grad():
        kl = kl_divergence_from(run.model(batch.x))
    return run.pgd(batch.x, lambda logits: kl(logits).sum(), **other)


def loss(run: Run, batch: Batch) -> Terms:
    """Return CE(x, y) + beta * KL(p(x) || p(x'))."""
    logits, logits_adv = run.model(batch.x), run.model(batch.x_adv)
    natural_ce = cross_entropy(logits, batch.y).mean()
    target = run.model(batch.x) if run.settings.natural_twice else logits
    kl = kl_divergence(target, logits_adv).mean()
    return {"total": natural_ce + run.settings.beta * kl, "natural_ce": natural_ce, "kl": kl}


def unclamped_start(config: Config) -> Config:
    """Return ``config`` with the attack's start as the noise leads, also outside of [0, 1]."""
    return replace(config, attack=replace(config.attack, clamp_start=False))


TRADES = Method(
    name="trades",
    label="TRADES",
    title="TRADES: cross-entropy on natural images plus KL to the adversarial prediction",
    arxiv="1901.08573",
    paper="Zhang et al., Theoretically Principled Trade-off between Robustness and Accuracy, "
    "ICML 2019",
    settings=TradesSettings(),
    attack=kl_attack,
    loss=loss,
    published={
        "*/wrn*": SetUp(
            "yaodongyu/TRADES", schedule="trades76", epochs=76, weight_decay=2e-4, **EPS_031
        ),
        "*": SetUp("later codes' ResNet-18, such as NeurAI-Lab/CURE's", **EPS_031),
    },
    rows=rows(
        "TRADES",
        ("cifar10", "resnet18", " (CURE's Table 1)", 82.41, 52.76, 50.43, 48.37),
        ("cifar100", "resnet18", " (CURE's Tables 2 and 4)", 57.94, 29.25, 25.88, 24.71),
        ("svhn", "resnet18", " (CURE's Table 2)", 90.20, 54.49, 52.09, None),
        ("cifar10", "wrn34-10", " (CURE's Table 1)", 84.73, 56.82, 54.29, 52.95),
        ("cifar10", "preactresnet18", ", best epoch (CURE's Table 3)", 81.19, None, None, 49.03),
    ),
    preset=unclamped_start,
)
