"""Schedules as pure functions of progress, the share of the run's steps that is done, in [0, 1)."""

from __future__ import annotations

import math

from cure_fast.config import OptimConfig

# Share of a one-cycle run during which the learning rate rises.
RISE = 0.25


def lr_at(optim: OptimConfig, progress: float) -> float:
    """Return the learning rate for the step that starts at ``progress`` in [0, 1)."""
    if optim.schedule == "multistep":
        return optim.lr * optim.lr_decay ** sum(progress >= m for m in optim.milestones)
    if optim.schedule == "onecycle":
        rise, fall = progress / RISE, (1 - progress) / (1 - RISE)
        # A hundredth of the peak at the start: a first step of length zero would do nothing.
        return optim.lr * max(0.01, min(rise, fall))
    if optim.schedule == "cosine":
        return optim.lr * (1 + math.cos(math.pi * progress)) / 2
    return optim.lr
