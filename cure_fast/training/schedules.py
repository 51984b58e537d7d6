"""Schedules as pure functions of progress, the share of the run's steps that is done, in [0, 1)."""

from __future__ import annotations

import math

import numpy as np

from cure_fast.config import OptimConfig

# Drops to a tenth by published name, as shares of the run, and lines through (share, factor). The
# codes of TRADES and MART count epochs from 1: what drops at epoch 75 drops after 74.
DROPS = {
    "rice": (0.5, 0.75),
    "trades76": (74 / 76,),
    "mart": (74 / 120, 89 / 120, 99 / 120),
}
LINES = {
    "seat": ((1 / 3, 1.0), (2 / 3, 0.1), (1.0, 0.01)),
    "piat": ((1 / 2, 1.0), (3 / 4, 0.1), (1.0, 0.01)),
}
# Share of a one-cycle run during which the learning rate rises.
RISE = 0.25


def lr_at(optim: OptimConfig, progress: float, step: float = 0.0) -> float:
    """Return the learning rate for the step that starts at ``progress``.

    ``step`` is the share of the run that one step is, 1 / steps.
    """
    milestones, factors = optim.milestones, optim.lr_factors
    if optim.schedule in LINES:
        milestones, factors = zip(*LINES[optim.schedule], strict=True)
    elif optim.schedule in DROPS:
        milestones, factors = DROPS[optim.schedule], None
    if factors is None:
        factors = tuple(0.1 ** (place + 1) for place in range(len(milestones)))
    if optim.schedule == "linear" or optim.schedule in LINES:
        return optim.lr * float(np.interp(progress, (0.0, *milestones), (1.0, *factors)))
    if optim.schedule == "multistep" or optim.schedule in DROPS:
        passed = sum(progress >= milestone for milestone in milestones)
        return optim.lr * (1.0, *factors)[passed]
    if optim.schedule == "onecycle":
        rise, fall = progress / RISE, (1 - progress) / (1 - RISE)
        # A hundredth of the peak at the start: a first step of length zero would do nothing.
        return optim.lr * max(0.01, min(rise, fall))
    if optim.schedule == "onecycle-cosine":
        start = optim.lr / 25
        return one_cycle(progress, step, start, optim.lr, start / 1e4)
    if optim.schedule == "cosine":
        return optim.lr * (1 + math.cos(math.pi * progress)) / 2
    return optim.lr


def momentum_at(optim: OptimConfig, progress: float, step: float = 0.0) -> float:
    """Return the momentum for the step that starts at ``progress``; see :func:`lr_at`."""
    if optim.schedule != "onecycle-cosine" or not optim.momentum:
        return optim.momentum
    return one_cycle(progress, step, 0.95, 0.85, 0.95)


def one_cycle(progress: float, step: float, start: float, peak: float, end: float) -> float:
    """Return what torch.optim.lr_scheduler.OneCycleLR with ``pct_start=RISE`` sets for a step.

    It is at ``peak`` one step before the share RISE, and at ``end`` in the last step.
    """
    top = RISE - step
    if progress < top:
        return start + (peak - start) * (1 - math.cos(math.pi * progress / top)) / 2
    fallen = (progress - top) / (1 - RISE)
    return end + (peak - end) * (1 + math.cos(math.pi * fallen)) / 2
