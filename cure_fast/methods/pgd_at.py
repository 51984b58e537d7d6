"""PGD adversarial training (Madry et al., ICLR 2018): cross-entropy on PGD images."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from cure_fast.batch import Batch
from cure_fast.losses import cross_entropy
from cure_fast.step.method import Method, SetUp, rows
from cure_fast.step.run import Run, Terms


def attack(run: Run, batch: Batch, **other: Any) -> Tensor:
    """Return PGD images that raise the cross-entropy; ``other`` goes to ``run.pgd``."""
    return run.pgd(batch.x, lambda logits: cross_entropy(logits, batch.y).sum(), **other)


def loss(run: Run, batch: Batch) -> Terms:
    """Return CE(x', y)."""
    total = cross_entropy(run.model(batch.x_adv), batch.y).mean()
    return {"total": total, "adversarial_ce": total}


# Rice et al., Overfitting in adversarially robust deep learning, 2020: images are normalised, and
# the attack moves BatchNorm's statistics.
rice = partial(
    SetUp,
    "locuslab/robust_overfitting",
    schedule="rice",
    normalize="dataset",
    start="uniform",
    attack_mode="train",
)

PGD_AT = Method(
    name="pgd_at",
    label="PGD-AT",
    title="PGD adversarial training: cross-entropy on adversarial images",
    arxiv="1706.06083",
    paper="Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, ICLR 2018",
    attack=attack,
    loss=loss,
    published={
        "svhn/*": rice(step_share=1 / 8, lr=0.01, crop_padding=0, flip=False),
        "*": rice(crop_padding=4, crop_mode="reflect"),
    },
    # The paper of CURE gives AutoAttack 44.04 for WRN-34-10, which is of another network.
    rows=rows(
        "PGD-AT",
        ("cifar10", "resnet18", " (CURE's Table 1)", 82.78, 51.30, 49.72, 44.63),
        ("cifar100", "resnet18", " (CURE's Tables 2 and 4)", 57.27, 26.66, 24.89, 23.60),
        ("svhn", "resnet18", " (CURE's Table 2)", 89.21, 51.18, 48.39, None),
        ("cifar10", "wrn34-10", " (CURE's Table 1)", 85.17, 55.08, 52.91, None),
        ("cifar10", "preactresnet18", ", best epoch (CURE's Table 3)", 82.50, None, None, 48.21),
    ),
)
