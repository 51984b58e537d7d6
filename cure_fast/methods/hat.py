"""HAT: helper examples beyond the adversarial ones (Rade and Moosavi-Dezfooli, ICLR 2022).

L = CE(x, y) + beta * KL(p(x) || p(x')) + gamma * CE(x + h (x' - x), argmax g(x')), where g is a
naturally trained teacher and the helper x + h (x' - x) is not clamped to [0, 1]. x' raises the same
KL, from a start that is not clamped either. Official code imrahulr/hat; no difference is known.
Its helper net is trained for 50 epochs by the schedule that ``published`` gives.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from cure_fast.batch import Batch
from cure_fast.config import MethodSettings
from cure_fast.config.checks import Weight
from cure_fast.losses import cross_entropy, kl_divergence
from cure_fast.methods import pgd_at
from cure_fast.methods.trades import kl_attack, unclamped_start
from cure_fast.step.method import Method, SetUp, rows
from cure_fast.step.run import Run, Terms


class HatSettings(MethodSettings):
    """HAT."""

    beta: Weight = 2.5
    """Weight of the robust term, 0 or more (CIFAR-10: 2.5)."""
    gamma: Weight = 0.5
    """Weight of the helper term, 0 or more (CIFAR-10: 0.5)."""
    helper_length: Weight = 2.0
    """How far helpers lie along the perturbation, 0 or more: 1 is the adversarial image (2)."""
    robust_loss: Literal["kl", "ce"] = "kl"
    """Robust term: KL between natural and adversarial prediction, or the adversarial images'
    cross-entropy; the attack raises the same."""


def attack(run: Run, batch: Batch) -> Tensor:
    """Return PGD images that raise the robust term."""
    return (kl_attack if run.settings.robust_loss == "kl" else pgd_at.attack)(run, batch)


def loss(run: Run, batch: Batch) -> Terms:
    """Return CE(x, y) + beta * KL(p(x) || p(x')) + gamma * CE(helper, argmax g(x'))."""
    helper = batch.x + run.settings.helper_length * (batch.x_adv - batch.x)
    seen = run.teachers["natural"](batch.x_adv).argmax(dim=1)
    logits, logits_adv, logits_helper = (run.model(x) for x in (batch.x, batch.x_adv, helper))
    natural_ce = cross_entropy(logits, batch.y).mean()
    if run.settings.robust_loss == "kl":
        robust = kl_divergence(logits, logits_adv).mean()
    else:
        robust = cross_entropy(logits_adv, batch.y).mean()
    helper_ce = cross_entropy(logits_helper, seen).mean()
    return {
        "total": natural_ce + run.settings.beta * robust + run.settings.gamma * helper_ce,
        "natural_ce": natural_ce,
        "robust": robust,
        "helper_ce": helper_ce,
    }


HAT = Method(
    name="hat",
    label="HAT",
    title="HAT: TRADES, and helpers beyond the adversarial images that a natural teacher labels",
    paper="Rade and Moosavi-Dezfooli, Reducing Excessive Margin to Achieve a Better Accuracy vs. "
    "Robustness Trade-off, ICLR 2022",
    settings=HatSettings(),
    attack=attack,
    loss=loss,
    teachers=("natural",),
    preset=unclamped_start,
    published={
        "*": SetUp(
            "imrahulr/hat",
            epochs=50,
            lr=0.21,
            nesterov=True,
            schedule="onecycle-cosine",
            clamp_start=False,
        ),
    },
    rows=rows(
        "HAT",
        ("cifar100", "resnet18", " (CURE's Table 2)", 58.73, 27.92, 24.60, None),
        ("svhn", "resnet18", " (CURE's Table 2)", 92.06, 57.35, 54.77, None),
    ),
)
