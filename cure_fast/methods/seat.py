"""SEAT: the average of the weights over all steps (Wang and Wang, ICLR 2022, arXiv 2203.09678).

PGD-AT with the policy ``ema`` at SEAT's constants: of weights and buffers in step t, from 0, the
share min(0.999, (t+1)/(t+10)) stays. Official code whj363636/Self-Ensemble-Adversarial-Training;
it counts epochs from 1, so that its rate is an epoch ahead, and constant within an epoch.
"""

from __future__ import annotations

from functools import partial

from cure_fast.methods.pgd_at import PGD_AT
from cure_fast.policies.average import EMA
from cure_fast.step.method import EPS_031, SetUp, with_policies

seat = partial(
    SetUp,
    "whj363636/Self-Ensemble-Adversarial-Training",
    epochs=120,
    start="uniform",
    **(EPS_031 | {"clamp_start": True}),
)

SEAT = with_policies(
    PGD_AT,
    name="seat",
    title="SEAT: PGD-AT with --policies ema, whose average of all steps is evaluated",
    arxiv="2203.09678",
    paper=EMA.paper,
    policies={"ema": EMA.settings},
    published={
        # Its schedule falls to a twentieth there.
        "*/wrn*": seat(
            weight_decay=7e-4,
            schedule="linear",
            milestones=(1 / 3, 2 / 3, 1.0),
            lr_factors=(1.0, 0.1, 0.05),
        ),
        "*": seat(schedule="seat", lr=0.01, weight_decay=3.5e-3),
    },
)
