"""NMSE: cross-entropy on PGD images plus distance of normalised logits (PIAT, TIFS 2025).

L = CE(x', y) + mu * mean[(1 - p_y(x)) * ||u(x') - u(x)||^2], where u are the logits over their
length, so that the distance is 2 - 2 cos in [0, 4]. Arxiv 2303.13955 and 2511.00836.

The paper's code is not public. Its text leaves open whether gradients go through the weight
1 - p_y(x) and through u(x); by default they go through both, as in later public code of the same
group (MiJia128/SADD), which has mu = 4.
"""

from __future__ import annotations

import torch.nn.functional as F

from cure_fast.batch import Batch
from cure_fast.config import MethodSettings
from cure_fast.config.checks import Weight
from cure_fast.losses import cross_entropy
from cure_fast.methods.pgd_at import attack
from cure_fast.policies.piat import PIAT
from cure_fast.step.method import Method, SetUp, rows, with_policies
from cure_fast.step.run import Run, Terms


class NmseSettings(MethodSettings):
    """NMSE."""

    mu: Weight = 4.0
    """Weight of the distance, 0 or more (4 in later code of the same group; the paper's own number
    is not legible, and its results hardly change around it)."""
    nmse_detach_weight: bool = False
    """Stop the gradient through the weight 1 - p_y(x)."""
    nmse_detach_natural: bool = False
    """Stop the gradient through u(x), so that the adversarial logits alone move."""


def loss(run: Run, batch: Batch) -> Terms:
    """Return CE(x', y) + mu * mean[(1 - p_y(x)) * ||u(x') - u(x)||^2], u the unit logits."""
    logits, logits_adv = run.model(batch.x), run.model(batch.x_adv)
    adversarial_ce = cross_entropy(logits_adv, batch.y).mean()
    natural = logits.detach() if run.settings.nmse_detach_natural else logits
    weighing = logits.detach() if run.settings.nmse_detach_weight else logits
    apart = (F.normalize(logits_adv, dim=1) - F.normalize(natural, dim=1)).square().sum(dim=1)
    true = weighing.softmax(dim=1).gather(1, batch.y[:, None]).squeeze(1)
    nmse = ((1 - true) * apart).mean()
    total = adversarial_ce + run.settings.mu * nmse
    return {"total": total, "adversarial_ce": adversarial_ce, "nmse": nmse}


NMSE = Method(
    name="nmse",
    label="NMSE",
    title="NMSE: cross-entropy on PGD images plus distance of normalised logits",
    arxiv="2303.13955",
    paper="Liu, He et al., Parameter Interpolation Adversarial Training, TIFS 2025",
    settings=NmseSettings(),
    attack=attack,
    loss=loss,
    # Their weight decay is not legible; it is that of the code whose set-up the paper follows.
    published={
        "*/wrn*": SetUp(
            "PIAT, Section IV", schedule="piat", epochs=180, weight_decay=7e-4, start="uniform"
        ),
        "*": SetUp(
            "PIAT, Section IV",
            schedule="piat",
            epochs=120,
            lr=0.01,
            weight_decay=3.5e-3,
            start="uniform",
        ),
    },
    rows=rows(
        "NMSE",
        ("cifar10", "resnet18", " (PIAT's Table V)", 84.77, 51.56, None, 46.60),
        ("cifar100", "resnet18", " (PIAT's Table V)", 58.88, 29.55, None, 24.82),
    ),
)
PIAT_NMSE = with_policies(
    NMSE,
    name="piat_nmse",
    title="NMSE with --policies piat, as the paper trains",
    policies={"piat": PIAT.settings},
    rows=rows(
        "PIAT + NMSE",
        ("cifar10", "resnet18", ", best epoch (Table I)", 80.96, 53.74, 51.72, 48.80),
        ("cifar100", "resnet18", ", best epoch (Table I)", 56.04, 31.45, 28.74, 26.09),
        ("svhn", "resnet18", ", best epoch (Table I)", 91.70, 61.21, 55.88, 51.29),
        ("cifar10", "wrn32-10", " (Table II)", 85.04, 58.04, None, 53.83),
        ("cifar100", "wrn32-10", " (Table II)", 61.04, 35.15, None, 30.07),
    ),
)
