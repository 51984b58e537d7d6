"""PGD adversarial training (Madry et al., ICLR 2018): cross-entropy on PGD images."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from cure_fast.batch import Batch
from cure_fast.config import AttackConfig, Config, MethodSettings, OptimConfig, PretrainConfig
from cure_fast.losses import cross_entropy
from cure_fast.step.method import Method, paper_rows
from cure_fast.step.run import Run, Terms


def attack(run: Run, batch: Batch) -> Tensor:
    """Return PGD images that raise the cross-entropy."""
    return run.pgd(batch.x, lambda logits: cross_entropy(logits, batch.y).sum())


def loss(run: Run, batch: Batch) -> Terms:
    """Return CE(x', y)."""
    total = cross_entropy(run.model(batch.x_adv), batch.y).mean()
    return {"total": total, "adversarial_ce": total}


def published(config: Config) -> Config:
    """Return the set-up of Rice et al., Overfitting in adversarially robust deep learning (2020).

    Their code normalises images, mirrors the border of crops and lets the attack move BatchNorm's
    statistics; SVHN is neither cropped nor flipped.
    """
    svhn = config.data.data == "svhn"
    crop = {"crop_padding": 0} if svhn else {"crop_padding": 4, "crop_mode": "reflect"}
    return replace(
        config,
        data=replace(config.data, flip=not svhn, **crop),
        model=replace(config.model, normalize="dataset"),
        pretrain=PretrainConfig(),
        attack=AttackConfig(
            step_size=(1 if svhn else 2) / 255, start="uniform", attack_mode="train"
        ),
        optim=OptimConfig(lr=0.01 if svhn else 0.1),
    )


PGD_AT = Method(
    name="pgd_at",
    label="PGD-AT",
    title="PGD adversarial training: cross-entropy on adversarial images",
    paper="Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, ICLR 2018",
    settings=MethodSettings(),
    attack=attack,
    loss=loss,
    published=published,
    # The paper of CURE gives AutoAttack 44.04 for WRN-34-10, which is of another network.
    rows=paper_rows(
        "PGD-AT",
        ("cifar10", "resnet18", " (CURE's Table 1)", 82.78, 51.30, 49.72, 44.63),
        ("cifar100", "resnet18", " (CURE's Tables 2 and 4)", 57.27, 26.66, 24.89, 23.60),
        ("svhn", "resnet18", " (CURE's Table 2)", 89.21, 51.18, 48.39, None),
        ("cifar10", "wrn34-10", " (CURE's Table 1)", 85.17, 55.08, 52.91, None),
        ("cifar10", "preactresnet18", ", best epoch (CURE's Table 3)", 82.50, None, None, 48.21),
    ),
)
