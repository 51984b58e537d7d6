"""SWA: the mean of the weights at the ends of epochs (Izmailov et al., UAI 2018).

As Chen et al., ICLR 2021, take it to adversarial training: BatchNorm statistics of the mean are
estimated anew on natural training images. Official code VITA-Group/Alleviate-Robust-Overfitting,
which shuffles and augments these once more; here they are those of the epoch that has just ended.
"""

from __future__ import annotations

from typing import Any

import torch

from cure_fast.config import MethodSettings
from cure_fast.config.checks import Count, Share
from cure_fast.kernels import ema_update_
from cure_fast.policies.average import estimate_statistics, frozen_copy
from cure_fast.step.policy import Policy, PolicyInfo
from cure_fast.step.run import Run


class SwaSettings(MethodSettings):
    """Mean of the weights at the ends of epochs, which is what is evaluated."""

    swa_start: Share = 0.275
    """Share of the run, 0 to 1, before which no epoch counts (KD+SWA: 0.275, epoch 55 of 200)."""
    swa_every: Count = 1
    """From there on every how many-th epoch counts, 1 or more (KD+SWA: 1)."""


class MeanOfEpochs(Policy):
    """Averages the trained weights over the ends of epochs; until the first it follows them."""

    moves_weights = False

    def __init__(self, run: Run, settings: SwaSettings) -> None:
        super().__init__()
        self.settings = settings
        self.network = frozen_copy(run.model)
        self.networks = {"swa": self.network}
        # Epochs that have ended since the start.
        self.since = torch.zeros((), dtype=torch.int64)
        self.state = {"since": self.since}

    def on_epoch_end(self, run: Run) -> None:
        """Take the epoch into the mean, where it counts."""
        started = run.epoch / run.config.optim.epochs >= self.settings.swa_start
        counted, beyond = divmod(int(self.since), self.settings.swa_every)
        self.since += started
        if beyond:
            return
        own, theirs = ([*net.parameters(), *net.buffers()] for net in (self.network, run.model))
        ema_update_(own, theirs, decay=counted / (counted + 1))
        if started:
            estimate_statistics(run, self.network)

    def epoch_metrics(self, run: Run) -> dict[str, Any]:
        """Return how many epochs the mean is of."""
        return {"swa_epochs": -(-int(self.since) // self.settings.swa_every)}


SWA = PolicyInfo(
    name="swa",
    label="SWA",
    title="SWA: mean of the weights at the ends of epochs; evaluates the mean",
    paper="Chen et al., Robust Overfitting may be mitigated by properly learned smoothening, "
    "ICLR 2021",
    settings=SwaSettings(),
    build=MeanOfEpochs,
    result="swa",
)
