"""IAD: the student trusts its teachers as far as they are right (Zhu et al., ICLR 2022).

Arxiv 2106.04928. With A_i = p_T(y_i | x'_i)^beta of the robust teacher T, not differentiated,

- IAD-I adds mean[(1 - A_i) KL_i(p_S(x) || p_S(x'))] to ARD at temperature 1,
- IAD-II takes A_i KL_i(p_T(x') || p_S(x')) + (1 - A_i) KL_i(p_S(x) || p_S(x')) for the robust
  teacher's term of a loss like KD's, of whose teachers the other one is trained naturally.

Temperatures squared weigh both parts of the latter, the student's own KL too, which has none.
Before ``--iad-start`` all A_i are 1. Gradients go through p_S(x). Official code ZFancy/IAD, whose
IAD-I passes the natural images a second time for p_S(x): same loss, but BatchNorm's running
statistics count them twice. The paper lets A_i weigh IAD-I's teacher too: ``iad_weight_teacher``.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from cure_fast.batch import Batch
from cure_fast.config import MethodSettings
from cure_fast.config.checks import Share, Weight
from cure_fast.losses import cross_entropy, kl_divergence
from cure_fast.methods.ard import ARD, QUIRK, ArdSettings, distance
from cure_fast.methods.kd_swa import KdSettings
from cure_fast.step.method import SetUp, rows
from cure_fast.step.run import Run, Terms


class Trust(MethodSettings):
    """Trust in the robust teacher."""

    beta: Weight = 0.1
    """Exponent of the teacher's probability of the label, 0 or more: 0 trusts it always (0.1)."""
    iad_start: Share = 0.3
    """Share of the run, 0 to 1, before which the teacher is trusted always (IAD-I: 0.3, epoch 60
    of 200; IAD-II: 0.2, epoch 40)."""


class IadSettings(Trust, ArdSettings):
    """IAD-I."""

    iad_weight_teacher: bool = False
    """Let the trust weigh the teacher's term too (paper; the code leaves it out)."""


class Iad2Settings(Trust, KdSettings):
    """IAD-II."""


def is_active(run: Run) -> bool:
    """Return whether the trust is computed in this epoch."""
    return run.epoch / run.config.optim.epochs >= run.settings.iad_start


def trust(run: Run, batch: Batch, taught: Tensor) -> Tensor:
    """Return A [N], from the robust teacher's logits at the adversarial images [N, K]."""
    return taught.softmax(dim=1).gather(1, batch.y[:, None]).squeeze(1) ** run.settings.beta


def loss(run: Run, batch: Batch) -> Terms:
    """Return ARD's loss and, once active, alpha * mean[(1 - A) KL(p_S(x) || p_S(x'))]."""
    settings = run.settings
    logits_adv, logits = run.model(batch.x_adv), run.model(batch.x)
    kl = distance(run, batch, logits_adv)
    own = torch.zeros_like(kl)
    if is_active(run):
        trusted = trust(run, batch, run.teachers["robust"](batch.x_adv))
        own = (1 - trusted) * kl_divergence(logits, logits_adv)
        kl = trusted * kl if settings.iad_weight_teacher else kl
    terms = {"kl": kl.mean(), "own_kl": own.mean()}
    natural_ce = cross_entropy(logits, batch.y).mean()
    total = settings.alpha * (terms["kl"] + terms["own_kl"]) + (1 - settings.alpha) * natural_ce
    return {"total": total, **terms, "natural_ce": natural_ce}


def loss_of_two(run: Run, batch: Batch) -> Terms:
    """Return CE(x', y), the natural teacher's KL, and the robust one's weighed by its trust."""
    settings, t = run.settings, run.settings.temperature
    logits_adv = run.model(batch.x_adv)
    taught = {name: teacher(batch.x_adv) for name, teacher in run.teachers.items()}
    kl = {name: kl_divergence(z / t, logits_adv / t) for name, z in taught.items()}
    robust, natural = kl["robust"], t**2 * kl["natural"].mean()
    if is_active(run):
        trusted = trust(run, batch, taught["robust"])
        robust = trusted * robust + (1 - trusted) * kl_divergence(run.model(batch.x), logits_adv)
    robust = t**2 * robust.mean()
    adversarial_ce = cross_entropy(logits_adv, batch.y).mean()
    a, b = settings.natural_weight, settings.robust_weight
    return {
        "total": (1 - a - b) * adversarial_ce + a * natural + b * robust,
        "adversarial_ce": adversarial_ce,
        "natural_kl": natural,
        "robust_kl": robust,
    }


IAD = replace(
    ARD,
    name="iad",
    label="IAD-I",
    title="IAD-I: ARD whose student trusts itself where the teacher is wrong",
    arxiv="2106.04928",
    paper="Zhu et al., Reliable Adversarial Distillation with Unreliable Teachers, ICLR 2022",
    settings=IadSettings(temperature=1.0, kl_mean="images"),
    loss=loss,
    phase=is_active,
    published={"*": SetUp("ZFancy/IAD", **QUIRK)},
    # The table does not say whether these are IAD-I's or IAD-II's.
    rows=rows(
        "IAD",
        ("cifar10", "resnet18", " (CURE's Table 1)", 80.63, 53.84, 51.60, 50.17),
        ("cifar10", "wrn34-10", " (CURE's Table 1)", 83.06, 56.17, 53.99, 52.68),
    ),
)
IAD2 = replace(
    IAD,
    name="iad2",
    label="IAD-II",
    title="IAD-II: two teachers, and trust in itself where the robust one is wrong",
    settings=Iad2Settings(robust_weight=0.5, natural_weight=0.25, temperature=1.0, iad_start=0.2),
    loss=loss_of_two,
    teachers=("natural", "robust"),
)
