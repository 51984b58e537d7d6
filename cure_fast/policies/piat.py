"""PIAT: interpolate the weights with the last epoch's, and train on from there (TIFS 2025)."""

from __future__ import annotations

from typing import Any, Literal

import torch

from cure_fast.config import MethodSettings
from cure_fast.config.checks import Share
from cure_fast.kernels import ema_update_
from cure_fast.policies.average import estimate_statistics
from cure_fast.step.policy import Policy, PolicyInfo
from cure_fast.step.run import Run


class PiatSettings(MethodSettings):
    """PIAT. Weights after epoch n (from 0): share * weights before it + (1 - share) * weights."""

    piat_share: Share | None = None
    """Share of the weights that the epoch began with, 0 to 1; None takes (n+1)/(n+10)."""
    piat_skip_first: bool = False
    """Leave the first epoch's weights as they are: the ones before it are drawn at random."""
    piat_buffers: Literal["interpolate", "keep", "estimate"] = "interpolate"
    """BatchNorm statistics: interpolated too, kept as the epoch left them, or estimated anew on the
    epoch's natural training images."""

    def share(self, epoch: int) -> float:
        """Return the share of the former weights at the end of the 0-based ``epoch``."""
        if self.piat_skip_first and epoch == 0:
            return 0.0
        return (epoch + 1) / (epoch + 10) if self.piat_share is None else self.piat_share


class Interpolate(Policy):
    """Moves the trained weights towards those that the epoch began with, once per epoch."""

    moves_weights = False  # in no step

    def __init__(self, run: Run, settings: PiatSettings) -> None:
        super().__init__()
        self.settings = settings
        self.tensors = list(run.model.parameters())
        if settings.piat_buffers == "interpolate":
            self.tensors += list(run.model.buffers())
        self.former = [tensor.detach().clone() for tensor in self.tensors]
        self.state = {f"former.{place}": tensor for place, tensor in enumerate(self.former)}

    @torch.no_grad()
    def on_epoch_end(self, run: Run) -> None:
        """Interpolate; momentum and learning rate stay as they are."""
        ema_update_(self.former, self.tensors, decay=self.settings.share(run.epoch))
        for tensor, interpolated in zip(self.tensors, self.former, strict=True):
            tensor.copy_(interpolated)
        if self.settings.piat_buffers == "estimate":
            estimate_statistics(run, run.model)

    def epoch_metrics(self, run: Run) -> dict[str, Any]:
        """Return the share of the former weights."""
        return {"piat_share": self.settings.share(run.epoch)}


PIAT = PolicyInfo(
    name="piat",
    label="PIAT",
    title="PIAT: interpolate weights with the former epoch's at the end of each epoch",
    paper="Liu, He et al., Parameter Interpolation Adversarial Training, TIFS 2025",
    settings=PiatSettings(),
    build=Interpolate,
    fixed=("piat_buffers",),
)
