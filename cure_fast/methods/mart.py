"""MART (Wang et al., ICLR 2020; official code YisenWang/MART).

L = BCE(x', y) + beta * mean[(1 - p_y(x)) * KL(p(x) || p(x'))], where BCE adds to the cross-entropy
-log(1 - the largest probability of another class); the attack raises the cross-entropy. Gradients
go through p(x), its weight 1 - p_y(x) included, and through p(x').

The constants that keep the official code's logarithms finite are kept, as they bound gradients:
1.0001 and 1e-12 in BCE, 1.0000001 in the weight, and 1e-12 beside p(x') in the KL. Two differences
remain. The official code rounds log p(x) where p(x) is below the smallest number, whose share of
the KL is zero both ways; and of several other classes of equal probability it takes the last one,
where here each has its share of the gradient.
"""

from __future__ import annotations

import torch.nn.functional as F

from cure_fast.batch import Batch
from cure_fast.config import MethodSettings
from cure_fast.config.checks import Weight
from cure_fast.losses import cross_entropy
from cure_fast.methods.pgd_at import attack
from cure_fast.methods.trades import unclamped_start
from cure_fast.step.method import EPS_031, Method, SetUp, rows
from cure_fast.step.run import Run, Terms


class MartSettings(MethodSettings):
    """MART."""

    beta: Weight = 5.0
    """Weight of the KL term, 0 or more (the paper's lambda: 5 for ResNet-18, 6 for wide ones)."""


def loss(run: Run, batch: Batch) -> Terms:
    """Return BCE(x', y) + beta * mean[(1 - p_y(x)) * KL(p(x) || p(x'))]."""
    logits, logits_adv = run.model(batch.x), run.model(batch.x_adv)
    own = batch.y[:, None]
    p, log_p, p_adv = logits.softmax(1), F.log_softmax(logits, 1), logits_adv.softmax(1)
    adversarial_ce = cross_entropy(logits_adv, batch.y).mean()
    runner_up = p_adv.scatter(1, own, 0).amax(dim=1)
    margin = -(1.0001 - runner_up + 1e-12).log().mean()
    each = (p * (log_p - (p_adv + 1e-12).log())).sum(dim=1)
    kl = ((1.0000001 - p.gather(1, own).squeeze(1)) * each).mean()
    return {
        "total": adversarial_ce + margin + run.settings.beta * kl,
        "adversarial_ce": adversarial_ce,
        "margin": margin,
        "weighted_kl": kl,
    }


MART = Method(
    name="mart",
    label="MART",
    title="MART: boosted cross-entropy plus KL weighted by the natural error",
    paper="Wang et al., Improving Adversarial Robustness Requires Revisiting Misclassified "
    "Examples, ICLR 2020",
    settings=MartSettings(),
    attack=attack,
    loss=loss,
    published={
        "*/wrn*": SetUp(
            "YisenWang/MART, wide ResNets",
            epochs=90,
            weight_decay=7e-4,
            milestones=(74 / 90, 89 / 90),
            beta=6.0,
            **EPS_031,
        ),
        "*": SetUp(
            "YisenWang/MART", schedule="mart", epochs=120, lr=0.01, weight_decay=3.5e-3, **EPS_031
        ),
    },
    rows=rows(
        "MART",
        ("cifar10", "resnet18", " (CURE's Table 1)", 80.70, 54.02, 49.35, 47.49),
        ("cifar100", "resnet18", " (CURE's Table 2)", 55.03, 28.25, 26.60, None),
        ("svhn", "resnet18", " (CURE's Table 2)", 88.10, 54.70, 48.95, None),
        ("cifar10", "wrn34-10", " (CURE's Table 1)", 83.62, 56.74, 53.16, 51.23),
    ),
    preset=unclamped_start,
)
