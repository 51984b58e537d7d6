"""ARD: a student follows a robust teacher (Goldblum et al., AAAI 2020, arXiv 1905.09747).

L = alpha * tau^2 * KL(p_T(x) || p_S(x')) + (1 - alpha) CE(S(x), y), both softmaxes at temperature
tau; x' raises the student's cross-entropy. Official code goldblum/AdversariallyRobustDistillation:
its KL is a mean over images and classes, 1/K of the mean over images, so that with ten classes the
factor is 900/10 at tau = 30. The natural images pass through the student with alpha = 1 too, whose
BatchNorm statistics they move.
"""

from __future__ import annotations

from typing import Annotated, Literal

from torch import Tensor

from cure_fast.batch import Batch
from cure_fast.config import MethodSettings
from cure_fast.config.checks import POSITIVE, Bounds, Share
from cure_fast.losses import cross_entropy, kl_divergence
from cure_fast.methods.pgd_at import attack
from cure_fast.step.method import Method, SetUp, rows
from cure_fast.step.run import Run, Terms


class ArdSettings(MethodSettings):
    """ARD."""

    alpha: Share = 1.0
    """Weight of the teacher, 0 to 1 (1); labels of natural images have the rest."""
    temperature: Annotated[float, Bounds(POSITIVE)] = 30.0
    """What logits are divided by before the teacher is followed, above 0 (30; IAD: 1)."""
    kl_mean: Literal["elements", "images"] = "elements"
    """Mean of the KL over images and classes, as the code has it, or over images (IAD)."""


def distance(run: Run, batch: Batch, logits_adv: Tensor) -> Tensor:
    """Return tau^2 * KL(p_T(x) || p_S(x')) [N], over K where it is a mean over classes too."""
    settings, t = run.settings, run.settings.temperature
    kl = t**2 * kl_divergence(run.teachers["robust"](batch.x) / t, logits_adv / t)
    return kl / logits_adv.shape[1] if settings.kl_mean == "elements" else kl


def loss(run: Run, batch: Batch) -> Terms:
    """Return alpha * tau^2 * KL(p_T(x) || p_S(x')) + (1 - alpha) CE(S(x), y)."""
    alpha = run.settings.alpha
    kl = distance(run, batch, run.model(batch.x_adv)).mean()
    natural_ce = cross_entropy(run.model(batch.x), batch.y).mean()
    return {"total": alpha * kl + (1 - alpha) * natural_ce, "kl": kl, "natural_ce": natural_ce}


# Their code multiplies the first rate of all at each milestone: it drops once, and never again.
QUIRK = {"weight_decay": 2e-4, "milestones": (0.5,), "start": "uniform", "attack_mode": "train"}
CODE = "goldblum/AdversariallyRobustDistillation"

ARD = Method(
    name="ard",
    label="ARD",
    title="ARD: the adversarial prediction follows a robust teacher's natural one",
    arxiv="1905.09747",
    paper="Goldblum et al., Adversarially Robust Distillation, AAAI 2020",
    settings=ArdSettings(),
    attack=attack,
    loss=loss,
    teachers=("robust",),
    published={
        "cifar100/*": SetUp(CODE, batch_size=256, **QUIRK),
        "*": SetUp(CODE, **QUIRK),
    },
    rows=rows(
        "ARD",
        ("cifar10", "resnet18", " (CURE's Table 1)", 82.84, 51.41, None, None),
        ("cifar10", "wrn34-10", " (CURE's Table 1)", 85.18, 53.79, None, None),
    ),
)
