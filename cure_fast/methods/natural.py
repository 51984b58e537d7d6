"""Natural (standard) training: cross-entropy on natural images, no attack."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from cure_fast.config import MethodSettings
from cure_fast.losses import cross_entropy
from cure_fast.step.method import Method, Terms

if TYPE_CHECKING:
    from cure_fast.training.trainer import Run


def attack(run: Run, x: Tensor, y: Tensor) -> Tensor:
    """Return the natural images."""
    return x


def loss(run: Run, x: Tensor, x_adv: Tensor, y: Tensor) -> Terms:
    """Return CE(x, y)."""
    total = cross_entropy(run.model(x), y).mean()
    return {"total": total, "natural_ce": total}


NATURAL = Method(
    name="natural",
    label="Natural training",
    title="Natural training: cross-entropy on natural images",
    paper="standard training",
    settings=MethodSettings(),
    attack=attack,
    loss=loss,
    uses_attack=False,
)
