"""Natural (standard) training: cross-entropy on natural images, no attack."""

from __future__ import annotations

from cure_fast.batch import Batch
from cure_fast.losses import cross_entropy
from cure_fast.step.method import Method, SetUp
from cure_fast.step.run import Run, Terms


def loss(run: Run, batch: Batch) -> Terms:
    """Return CE(x, y)."""
    total = cross_entropy(run.model(batch.x), batch.y).mean()
    return {"total": total, "natural_ce": total}


NATURAL = Method(
    name="natural",
    label="Natural training",
    title="Natural training: cross-entropy on natural images",
    paper="standard training",
    attack=lambda run, batch: batch.x,
    loss=loss,
    uses_attack=False,
    # CURE's start and, in most codes, the natural teacher.
    published={"*": SetUp("the common schedule of natural training, as in NeurAI-Lab/CURE")},
)
