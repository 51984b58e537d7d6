"""ALP: adversarial logit pairing (Kannan, Kurakin and Goodfellow 2018, arXiv 1803.06373).

L = CE + weight * MSE(z(x), z(x')), gradient through both logits; the attack raises the
cross-entropy. The paper's CE is of a batch half natural, half adversarial (``alp_mix``); PIAT's
text adds the pairing to PGD-AT, whose CE is of x' alone (``alp``). Its distance is squared and
summed over the classes, with a weight that is not legible; public code takes the mean over batch
and classes.

No official code exists for CIFAR. What ``alp_mix`` publishes is of ShawnXYang/AT_HE, whose two
cross-entropies count half each; MTandHJ/PyTorch-Robust adds them whole to half the MSE, on a small
network.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from cure_fast.batch import Batch
from cure_fast.config import Config, MethodSettings
from cure_fast.config.checks import Weight
from cure_fast.losses import cross_entropy
from cure_fast.methods.nmse import NMSE
from cure_fast.methods.pgd_at import attack
from cure_fast.step.method import EPS_031, Method, SetUp, rows
from cure_fast.step.run import Run, Terms


class AlpSettings(MethodSettings):
    """ALP."""

    alp_weight: Weight = 0.5
    """Weight of the distance between the logits, 0 or more (public codes: 0.5 and 1)."""
    alp_ce: Literal["adv", "mix"] = "adv"
    """Cross-entropy of the adversarial images alone (adv), or half of it and half of the natural
    images' (mix)."""
    alp_reduce: Literal["mean", "sum"] = "mean"
    """Squared differences of an image's logits: their mean over the classes, or their sum."""


def loss(run: Run, batch: Batch) -> Terms:
    """Return CE(x', y), or its mean with CE(x, y), plus weight * MSE(z(x), z(x'))."""
    logits, logits_adv = run.model(batch.x), run.model(batch.x_adv)
    ce = adversarial_ce = cross_entropy(logits_adv, batch.y).mean()
    apart = (logits_adv - logits).square()
    pairing = apart.mean() if run.settings.alp_reduce == "mean" else apart.sum(dim=1).mean()
    terms = {"adversarial_ce": adversarial_ce, "pairing": pairing}
    if run.settings.alp_ce == "mix":
        terms["natural_ce"] = cross_entropy(logits, batch.y).mean()
        ce = (terms["natural_ce"] + adversarial_ce) / 2
    return {"total": ce + run.settings.alp_weight * pairing, **terms}


def mix(config: Config) -> Config:
    """Return ``config`` with the cross-entropy of natural and adversarial images."""
    return replace(config, settings=replace(config.settings, alp_ce="mix"))


ALP = Method(
    name="alp",
    label="ALP",
    title="ALP: cross-entropy on PGD images plus distance of natural and adversarial logits",
    arxiv="1803.06373",
    paper="Kannan, Kurakin and Goodfellow, Adversarial Logit Pairing, 2018",
    settings=AlpSettings(),
    attack=attack,
    loss=loss,
    published=NMSE.published,
    # PIAT's table contradicts itself in the row for SVHN.
    rows=rows(
        "ALP",
        ("cifar10", "resnet18", ", best epoch (PIAT's Table I)", 79.74, 52.37, 49.60, 46.13),
        ("cifar100", "resnet18", ", best epoch (PIAT's Table I)", 57.29, 28.12, 26.84, 23.57),
        ("cifar10", "wrn32-10", " (PIAT's Table II)", 84.18, 53.55, None, 49.68),
        ("cifar100", "wrn32-10", " (PIAT's Table II)", 58.11, 28.59, None, 24.45),
    ),
)
ALP_MIX = replace(
    ALP,
    name="alp_mix",
    title="ALP as in its paper: cross-entropy on natural and PGD images plus distance of logits",
    preset=mix,
    published={
        "*": SetUp(
            "ShawnXYang/AT_HE, wide ResNets",
            epochs=77,
            milestones=(74 / 77,),
            weight_decay=2e-4,
            alp_weight=1.0,
            **EPS_031,
        ),
    },
    rows={},
)
