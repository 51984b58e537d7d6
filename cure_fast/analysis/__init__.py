"""Analyses of networks and runs: each a figure, its numbers, and a section of the report.

``cure_fast.analysis.NAME(models, images, labels)`` runs one from Python; see :mod:`.shape`.
"""

from __future__ import annotations

from typing import Any

from cure_fast.analysis.cka import CKA
from cure_fast.analysis.classes import CLASSES
from cure_fast.analysis.confidence import CONFIDENCE
from cure_fast.analysis.corruptions import CORRUPTIONS
from cure_fast.analysis.eps_sweep import EPS_SWEEP
from cure_fast.analysis.gradients import GRADIENTS
from cure_fast.analysis.landscape import LANDSCAPE
from cure_fast.analysis.overfitting import OVERFITTING
from cure_fast.analysis.perturbation import PERTURBATION
from cure_fast.analysis.shape import Analysis, Result, Settings
from cure_fast.analysis.transfer import TRANSFER

__all__ = [
    "ANALYSES",
    "Analysis",
    "Result",
    "Settings",
    "cka",
    "classes",
    "confidence",
    "corruptions",
    "eps_sweep",
    "gradients",
    "landscape",
    "overfitting",
    "perturbation",
    "transfer",
]

ANALYSES: dict[str, Analysis[Any]] = {
    each.name: each
    for each in (
        CKA,
        CLASSES,
        CONFIDENCE,
        CORRUPTIONS,
        EPS_SWEEP,
        GRADIENTS,
        LANDSCAPE,
        OVERFITTING,
        PERTURBATION,
        TRANSFER,
    )
}

# By the names of their files, whose place as attributes of this package they take.
cka = CKA
classes = CLASSES
confidence = CONFIDENCE
corruptions = CORRUPTIONS
eps_sweep = EPS_SWEEP
gradients = GRADIENTS
landscape = LANDSCAPE
overfitting = OVERFITTING
perturbation = PERTURBATION
transfer = TRANSFER
