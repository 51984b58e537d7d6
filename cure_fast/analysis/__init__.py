"""Analyses of networks and runs: each a figure, its numbers, and a section of the report.

``cure_fast.analysis.NAME(models, images, labels)`` runs one from Python; see :mod:`.shape`.
"""

from __future__ import annotations

from typing import Any

from cure_fast.analysis.eps_sweep import EPS_SWEEP
from cure_fast.analysis.gradients import GRADIENTS
from cure_fast.analysis.overfitting import OVERFITTING
from cure_fast.analysis.shape import Analysis, Result, Settings

__all__ = ["ANALYSES", "Analysis", "Result", "Settings", "eps_sweep", "gradients", "overfitting"]

ANALYSES: dict[str, Analysis[Any]] = {
    each.name: each for each in (EPS_SWEEP, GRADIENTS, OVERFITTING)
}

# By the names of their files, whose place as attributes of this package they take.
eps_sweep = EPS_SWEEP
gradients = GRADIENTS
overfitting = OVERFITTING
