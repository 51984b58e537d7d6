"""KD+SWA: two teachers smooth the logits, SWA the weights (Chen et al., ICLR 2021).

L = (1 - a - b) CE(x', y) + a KD(natural) + b KD(robust), where KD is T^2 times the cross-entropy
of softmax(z/T) at x' to that of the teacher, not the KL: same gradients, another value. Teachers
see x' too. Official code VITA-Group/Alleviate-Robust-Overfitting, which also rotates images of
CIFAR-100 by up to 15 degrees; here they are not. The policy ``swa`` comes with the method.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated

import torch.nn.functional as F
from torch import Tensor

from cure_fast.batch import Batch
from cure_fast.config import MethodSettings
from cure_fast.config.checks import POSITIVE, Bounds, Share, check
from cure_fast.losses import cross_entropy
from cure_fast.methods.pgd_at import attack
from cure_fast.policies.swa import SWA
from cure_fast.step.method import Method, SetUp, rows, with_policies
from cure_fast.step.run import Run, Terms


class KdSettings(MethodSettings):
    """Two teachers; the labels have the rest of the weight."""

    natural_weight: Share = 0.1
    """Weight of the naturally trained teacher, 0 to 1 (KD+SWA: 0.1)."""
    robust_weight: Share = 0.6
    """Weight of the robust teacher, 0 to 1 less --natural-weight (KD+SWA: 0.6)."""
    temperature: Annotated[float, Bounds(POSITIVE)] = 2.0
    """What logits are divided by before teachers are followed, above 0 (KD+SWA: 2)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        left = self.natural_weight + self.robust_weight <= 1
        check(left, "robust_weight", self.robust_weight, "at most 1 less --natural-weight")


def loss(run: Run, batch: Batch) -> Terms:
    """Return CE(x', y) and the cross-entropies to both teachers' answers, by their weights."""
    settings, t = run.settings, run.settings.temperature
    logits = run.model(batch.x_adv)
    log_p = F.log_softmax(logits / t, dim=1)

    def taught(teacher: str) -> Tensor:
        target = F.softmax(run.teachers[teacher](batch.x_adv) / t, dim=1)
        return -(t**2) * (target * log_p).sum(dim=1).mean()

    adversarial_ce = cross_entropy(logits, batch.y).mean()
    natural, robust = taught("natural"), taught("robust")
    a, b = settings.natural_weight, settings.robust_weight
    return {
        "total": (1 - a - b) * adversarial_ce + a * natural + b * robust,
        "adversarial_ce": adversarial_ce,
        "natural_kd": natural,
        "robust_kd": robust,
    }


smoothened = partial(
    SetUp,
    "VITA-Group/Alleviate-Robust-Overfitting",
    milestones=(0.25, 0.75),
    normalize="dataset",
    start="uniform",
    attack_mode="train",
)

KD = Method(
    name="kd_swa",
    label="KD",
    title="KD+SWA: two teachers smooth the logits, and --policies swa averages the weights",
    paper="Chen et al., Robust Overfitting may be mitigated by properly learned smoothening, "
    "ICLR 2021",
    settings=KdSettings(),
    attack=attack,
    loss=loss,
    teachers=("natural", "robust"),
    published={"cifar*/*": smoothened(val_images=5000), "*": smoothened()},
)
KD_SWA = with_policies(
    KD,
    name="kd_swa",
    policies={"swa": SWA.settings},
    rows=rows(
        "SWA + KD",
        ("cifar10", "preactresnet18", ", best epoch (CURE's Table 3)", 84.51, None, None, 49.87),
    ),
)
