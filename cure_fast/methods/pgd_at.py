"""PGD adversarial training (Madry et al., ICLR 2018): cross-entropy on PGD images."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from cure_fast.config import MethodSettings
from cure_fast.losses import cross_entropy
from cure_fast.step.method import Method, Terms

if TYPE_CHECKING:
    from cure_fast.training.trainer import Run


def attack(run: Run, x: Tensor, y: Tensor) -> Tensor:
    """Return PGD images that raise the cross-entropy."""
    return run.pgd(x, lambda logits: cross_entropy(logits, y).sum())


def loss(run: Run, x: Tensor, x_adv: Tensor, y: Tensor) -> Terms:
    """Return CE(x', y)."""
    total = cross_entropy(run.model(x_adv), y).mean()
    return {"total": total, "adversarial_ce": total}


PGD_AT = Method(
    name="pgd_at",
    label="PGD-AT",
    title="PGD adversarial training: cross-entropy on adversarial images",
    paper="Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, ICLR 2018",
    settings=MethodSettings(),
    attack=attack,
    loss=loss,
)
