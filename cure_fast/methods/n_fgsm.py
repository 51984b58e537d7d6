"""N-FGSM: adversarial training by one step from noise wider than the ball (de Jorge et al.,
NeurIPS 2022, arXiv 2202.01181).

L = CE(x', y), where x' is one step of eps from x plus noise uniform in [-k eps, k eps], and is
clamped to [0, 1] alone: it lies within (k + 1) eps of x, outside of the ball. Official code:
pdejorge/N-FGSM. For SVHN that code lets eps, noise and step grow over the first five epochs, which
is not done here.

``--step-size`` and ``--start`` do not concern the training's attack.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from cure_fast.batch import Batch
from cure_fast.config.checks import Weight
from cure_fast.losses import cross_entropy
from cure_fast.methods.fgsm_rs import FGSM_RS, FgsmSettings, check_signs, cyclic
from cure_fast.step.run import Run


class NFgsmSettings(FgsmSettings):
    """Single-step attack from wide noise."""

    fgsm_step: Weight = 1.0
    """Length of the step as a multiple of --eps, 0 or more."""
    fgsm_noise: Weight = 2.0
    """Radius of the noise as a multiple of --eps, 0 or more (2; 3 and 4 at the largest eps)."""


def attack(run: Run, batch: Batch) -> Tensor:
    """Return images one step up the cross-entropy from x plus noise."""
    settings, eps = run.settings, run.config.attack.eps
    wide, step = settings.fgsm_noise * eps, settings.fgsm_step * eps
    source = run.generators["attack"]
    noise = run.drawn(batch.x, lambda t: t.uniform_(-wide, wide, generator=source))
    return run.pgd(
        batch.x,
        lambda logits: cross_entropy(logits, batch.y).sum(),
        start=noise,
        step_size=step,
        eps=wide + step,
    )


N_FGSM = replace(
    FGSM_RS,
    name="n_fgsm",
    label="N-FGSM",
    title="N-FGSM: cross-entropy on images of one step from noise wider than the ball",
    arxiv="2202.01181",
    paper="de Jorge et al., Make Some Noise: Reliable and Efficient Single-Step Adversarial "
    "Training, NeurIPS 2022",
    settings=NFgsmSettings(),
    attack=attack,
    check=check_signs,
    published={
        "svhn/*": cyclic(
            "pdejorge/N-FGSM", epochs=30, lr=0.05, milestones=(0.0, 0.4, 1.0), flip=False
        ),
        "*": cyclic("pdejorge/N-FGSM", epochs=30, lr=0.2, milestones=(0.0, 0.5, 1.0)),
    },
)
