"""FAWA: average the weights of epochs that leave no class behind (CFA, Wei et al., CVPR 2023).

The first epoch that is accepted is copied. Until then the average follows the trained network,
where the official code has random weights.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch

from cure_fast.config import MethodSettings
from cure_fast.config.checks import Bounds, Share
from cure_fast.kernels import ema_update_
from cure_fast.policies.average import frozen_copy
from cure_fast.step.policy import Policy, PolicyInfo
from cure_fast.step.run import Run


class FawaSettings(MethodSettings):
    """Average of weights and buffers over fair epochs, which is what is evaluated."""

    fawa_decay: Share = 0.88
    """Share of the average that stays at an epoch that is accepted, 0 to 1."""
    fawa_threshold: Annotated[float, Bounds(0, 100)] = 20.0
    """Robust accuracy in percent, 0 to 100, that the worst class must reach on validation images
    (the code's default: 24). A method without attack needs that natural accuracy of all."""


class FairAverage(Policy):
    """Moves a second network towards the trained one after validations that accept it."""

    moves_weights = False

    def __init__(self, run: Run, settings: FawaSettings) -> None:
        super().__init__()
        self.settings = settings
        self.network = frozen_copy(run.model)
        self.networks = {"fawa": self.network}
        # On the host, which asks for it.
        self.accepted = torch.zeros((), dtype=torch.int64)
        self.state = {"accepted": self.accepted}

    def on_validation(self, run: Run, found: dict[str, Any]) -> None:
        """Take the epoch in, if its worst class reaches the threshold."""
        worst = min(found["robust_by_class"] or [found["natural"]])
        accepted = worst >= self.settings.fawa_threshold
        if accepted or not self.accepted:
            own, theirs = ([*net.parameters(), *net.buffers()] for net in (self.network, run.model))
            ema_update_(own, theirs, decay=self.settings.fawa_decay if self.accepted else 0.0)
        self.accepted += accepted

    def epoch_metrics(self, run: Run) -> dict[str, Any]:
        """Return how many epochs were accepted before this one."""
        return {"fawa_accepted": int(self.accepted)}


FAWA = PolicyInfo(
    name="fawa",
    label="FAWA",
    title="CFA's average of weights over validated epochs whose worst class is robust enough; "
    "evaluates the average",
    paper="Wei et al., CFA: Class-wise Calibrated Fair Adversarial Training, CVPR 2023",
    settings=FawaSettings(),
    build=FairAverage,
    result="fawa",
)
