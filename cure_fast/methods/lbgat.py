"""LBGAT: a natural network, trained along, guides the robust one (Cui et al., ICCV 2021).

Arxiv 2011.11164, official code dvlab-research/LBGAT. With z the logits of the robust network and
z_N those of the natural one,

L = MSE(z(x'), z_N(x)) + CE(z_N(x), y) + beta * KL(p(x) || p(x')),

where MSE is the mean over images and classes. Nothing is detached: the MSE moves the natural
network too, which is in training mode throughout. Both are moved by the run's optimiser, and the
attack is that of TRADES. As in the official code natural images pass the robust network behind the
adversarial ones, also where beta is 0: its BatchNorm statistics are of both.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from cure_fast.batch import Batch
from cure_fast.config import Config, MethodSettings
from cure_fast.config.checks import Weight, find
from cure_fast.losses import cross_entropy, kl_divergence
from cure_fast.methods.trades import kl_attack, unclamped_start
from cure_fast.models import MODELS
from cure_fast.models.building import build_like
from cure_fast.step.method import EPS_031, Method, SetUp, rows
from cure_fast.step.run import Run, Terms


class LbgatSettings(MethodSettings):
    """LBGAT."""

    beta: Weight = 0.0
    """Weight of the KL term, 0 or more (paper: 0 and 6)."""
    guide: str | None = None
    """Architecture of the natural network; None takes ResNet-18 for a wide ResNet (paper), and for
    others another one like them."""


def loss(run: Run, batch: Batch) -> Terms:
    """Return MSE(z(x'), z_N(x)) + CE(z_N(x), y) + beta * KL(p(x) || p(x'))."""
    beta, logits_adv = run.settings.beta, run.model(batch.x_adv)
    with torch.set_grad_enabled(beta > 0):
        logits = run.model(batch.x)
    guide = run.networks["guide"](batch.x)
    guidance, kl = F.mse_loss(logits_adv, guide), kl_divergence(logits, logits_adv).mean()
    natural_ce = cross_entropy(guide, batch.y).mean()
    total = guidance + natural_ce + beta * kl
    return {"total": total, "guidance": guidance, "natural_ce": natural_ce, "kl": kl}


def architecture_beside(run: Run, chosen: str | None) -> str | None:
    """Return the architecture of a further network; None for the trained network's own."""
    wide = run.model.description.get("model", "").startswith("wrn")
    return "resnet18" if chosen is None and wide else chosen


def check_architecture(setting: str) -> Callable[[Config], None]:
    """Return a check that a setting names an architecture with the stem of --stem, or none."""

    def check(config: Config) -> None:
        chosen = getattr(config.settings, setting)
        if chosen is not None:
            stem = config.model.stem
            known = {name: info for name, info in MODELS.items() if stem in info.stems}
            find(f"--{setting}", known, chosen)

    return check


# The rate of the first epoch is a fifth of the next ones'.
official = partial(
    SetUp,
    "dvlab-research/LBGAT, wide ResNets",
    epochs=100,
    weight_decay=2e-4,
    milestones=(0.0, 0.01, 0.75, 0.9),
    lr_factors=(0.2, 1.0, 0.1, 0.01),
    **EPS_031,
)

LBGAT = Method(
    name="lbgat",
    label="LBGAT",
    title="LBGAT: a natural network, trained along, guides the robust one",
    arxiv="2011.11164",
    paper="Cui et al., Learnable Boundary Guided Adversarial Training, ICCV 2021",
    settings=LbgatSettings(),
    attack=kl_attack,
    loss=loss,
    networks=lambda run: {
        "guide": build_like(
            run.model,
            seed=run.config.run.seed,
            model=architecture_beside(run, run.settings.guide),
        )
    },
    check=check_architecture("guide"),
    published={"*/wrn*": official(), "*": official()},
    fixed=("guide",),
    # Within 0.031, by its official code.
    rows=rows(
        "LBGAT",
        ("cifar10", "wrn34-10", " (Table of its README, beta 0)", 88.22, None, None, 52.86),
        ("cifar100", "wrn34-10", " (Table of its README, beta 0)", 70.25, None, None, 27.16),
    ),
    preset=unclamped_start,
)
