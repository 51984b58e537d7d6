"""CFA: radius and weight by class, from each class's robust accuracy (Wei et al., CVPR 2023).

Arxiv 2303.14460, official code PKU-ML/CFA. With t_k the share of class k's training images that
the last epoch classified right under attack, the attack on images of class k has the radius

    eps_k = (lambda1 + t_k) * eps,

from half of eps to one and a half, and TRADES' two terms are mixed by class:

    L = mean[(1 - b_y) CE(x, y) + b_y KL(p(x) || p(x'))],  b_k = v_k / (1 + v_k),
    v_k = (lambda2 + t_k) * beta.

In the first epochs every radius is eps and every v is beta. The paper's average of weights is the
policy ``fawa``, which comes with either form. The official code has ten classes of equal size and
divides by the mean size; here each class is divided by its own.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from cure_fast.batch import Batch
from cure_fast.config import MethodSettings
from cure_fast.config.checks import Count, Weight
from cure_fast.losses import cross_entropy, kl_divergence
from cure_fast.methods import pgd_at
from cure_fast.methods.trades import kl_attack, unclamped_start
from cure_fast.policies.fawa import FAWA
from cure_fast.step.method import Method, SetUp, rows, with_policies
from cure_fast.step.policy import Policy
from cure_fast.step.run import Run, Terms


class CfaSettings(MethodSettings):
    """CFA."""

    cfa_radius: Weight = 0.5
    """lambda1, 0 or more: the radius of a class is (lambda1 + its robust accuracy) * eps."""
    cfa_warmup: Count = 10
    """Epochs at first in which all classes are treated alike, 1 or more."""


class CfaTradesSettings(CfaSettings):
    """CFA with TRADES."""

    beta: Weight = 6.0
    """Weight of the KL term over that of the cross-entropy, 0 or more."""
    cfa_beta: Weight = 0.5
    """lambda2, 0 or more: the beta of a class is (lambda2 + its robust accuracy) * beta."""


class Classes(Policy):
    """Counts each class's images that withstand the attack.

    Attributes:
        accuracy: share of them in the last epoch by class [K], 0 to 1; 0 in the first.
    """

    moves_weights = False

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.accuracy = next(run.model.parameters()).new_zeros(run.loader.num_classes)
        self.seen = torch.zeros_like(self.accuracy, dtype=torch.int64)
        self.robust = torch.zeros_like(self.seen)
        self.state = {"seen": self.seen, "robust": self.robust, "accuracy": self.accuracy}

    def on_step(self, run: Run, batch: Batch) -> None:
        """Count the step's images."""
        counted = torch.ones_like(batch.y)
        if run.engine.skip is not None:
            counted *= ~run.engine.skip
        self.seen.index_add_(0, batch.y, counted)
        self.robust.index_add_(0, batch.y, counted * batch.notes["robust"])

    def on_epoch_end(self, run: Run) -> None:
        """Keep the epoch's accuracy for the next one, and count anew."""
        self.accuracy.copy_(self.robust / self.seen.clamp(min=1))
        self.seen.zero_()
        self.robust.zero_()

    def epoch_metrics(self, run: Run) -> dict[str, Any]:
        """Return the accuracy of the worst and of the mean class."""
        accuracy = self.accuracy.tolist()
        return {"class_accuracy": {"worst": min(accuracy), "mean": fmean(accuracy)}}


def by_class(run: Run) -> bool:
    """Return whether classes are treated by their accuracy."""
    return run.epoch >= run.settings.cfa_warmup


def factor(run: Run, shift: float, y: Tensor) -> float | Tensor:
    """Return ``shift`` plus the accuracy of each label's class [N]; 1 in the first epochs."""
    return shift + run.policy(Classes).accuracy[y] if by_class(run) else 1.0


def radius(run: Run, batch: Batch) -> float | Tensor:
    """Return the attack's radius in pixel units, one per image [N] or one for all."""
    return run.config.attack.eps * factor(run, run.settings.cfa_radius, batch.y)


def attack(run: Run, batch: Batch) -> Tensor:
    """Return PGD images, within the radius of each image's class, that raise CE(x', y)."""
    return pgd_at.attack(run, batch, eps=radius(run, batch))


def loss(run: Run, batch: Batch) -> Terms:
    """Return CE(x', y); note which images withstood the attack."""
    logits_adv = run.model(batch.x_adv)
    batch.notes["robust"] = logits_adv.argmax(dim=1) == batch.y
    total = cross_entropy(logits_adv, batch.y).mean()
    return {"total": total, "adversarial_ce": total}


def trades_attack(run: Run, batch: Batch) -> Tensor:
    """Return PGD images, within the radius of each image's class, that raise KL(p(x) || p(x'))."""
    return kl_attack(run, batch, eps=radius(run, batch))


def trades_loss(run: Run, batch: Batch) -> Terms:
    """Return the mixture of CE(x, y) and KL(p(x) || p(x')); note what withstood the attack."""
    logits, logits_adv = run.model(batch.x), run.model(batch.x_adv)
    batch.notes["robust"] = logits_adv.argmax(dim=1) == batch.y
    ce, kl = cross_entropy(logits, batch.y), kl_divergence(logits, logits_adv)
    beta = run.settings.beta * factor(run, run.settings.cfa_beta, batch.y)
    share = beta / (1 + beta)
    total = ((1 - share) * ce + share * kl).mean()
    return {"total": total, "natural_ce": ce.mean(), "kl": kl.mean()}


# As in PGD-AT's own code, images are normalised and padded by their mirror image.
code = partial(SetUp, "PKU-ML/CFA", normalize="dataset", crop_padding=4, crop_mode="reflect")
wide = {"epochs": 100, "milestones": (75 / 100, 90 / 100)}
at = {"start": "uniform", "attack_mode": "train"}

# The paper's average of weights.
OWN = {"fawa": FAWA.settings}

CFA = Method(
    name="cfa_at",
    label="CFA",
    title="CFA: PGD-AT with a radius for each class, and the average of fair epochs (--policies "
    "fawa)",
    arxiv="2303.14460",
    paper="Wei et al., CFA: Class-wise Calibrated Fair Adversarial Training, CVPR 2023",
    settings=CfaSettings(),
    attack=attack,
    loss=loss,
    policies=lambda run: (Classes(run),),
    phase=by_class,
    published={"*/wrn*": code(**at, **wide), "*": code(**at, schedule="rice")},
)
CFA_AT = with_policies(
    CFA,
    name="cfa_at",
    policies=OWN,
    # The tables do not say of which form they are; their natural accuracy is that of this one.
    rows=rows(
        "CFA",
        ("cifar10", "resnet18", ", best epoch (PIAT's Table I)", 82.80, 53.24, 51.45, 48.40),
        ("cifar100", "resnet18", ", best epoch (PIAT's Table I)", 56.28, 30.64, 27.74, 24.26),
        ("svhn", "resnet18", ", best epoch (PIAT's Table I)", 92.23, 60.77, 55.17, 49.64),
        ("cifar10", "wrn32-10", " (PIAT's Table II)", 86.44, 57.84, None, 52.96),
        ("cifar100", "wrn32-10", " (PIAT's Table II)", 63.37, 33.89, None, 28.98),
    ),
)
CFA_TRADES = with_policies(
    replace(CFA, name="cfa_trades", preset=unclamped_start),
    name="cfa_trades",
    label="CFA-TRADES",
    title="CFA: TRADES with radius and weight for each class, and the average of fair epochs",
    settings=CfaTradesSettings(),
    attack=trades_attack,
    loss=trades_loss,
    published={
        "*/wrn*": code(clamp_start=False, **wide),
        "*": code(clamp_start=False, schedule="rice"),
    },
    policies=OWN,
)
