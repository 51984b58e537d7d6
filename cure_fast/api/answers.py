"""What the functions of ``cure_fast`` return: a run's folder, and results of an evaluation."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cure_fast.config import Config
from cure_fast.evaluation.record import stored_record
from cure_fast.runs.folder import load_config


@dataclass(frozen=True, repr=False)
class Results:
    """Accuracy of a model under attacks.

    Attributes:
        accuracy: percent of the images classified right under each attack, by its name.
        warnings: what speaks against these numbers, a sentence each; empty is good.
        record: all of it as ``results.json`` has it of a model, JSON types.
    """

    accuracy: dict[str, float]
    warnings: tuple[str, ...] = ()
    record: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        warned = f"; {len(self.warnings)} warnings" if self.warnings else ""
        return f"Results({_percentages(self.accuracy)}{warned})"


@dataclass(frozen=True, repr=False)
class RunFolder(os.PathLike[str]):
    """The folder of a run; taken wherever a path is."""

    path: Path

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def config(self) -> Config:
        """What was trained, on what, and how; ``InputError`` where the folder is no run's."""
        return load_config(self.path)

    @property
    def record(self) -> dict[str, Any]:
        """What ``results.json`` holds now; empty before the first evaluation has finished."""
        return stored_record(self.path / "results.json") or {}

    @property
    def accuracy(self) -> dict[str, float]:
        """Percent of the test images that the result gets right under each attack, by its name."""
        trained = self.record.get("models", {}).get("trained", {"attacks": {}})
        return {name: result["accuracy"] for name, result in trained["attacks"].items()}

    def __repr__(self) -> str:
        found = _percentages(self.accuracy) or "no results yet"
        return f"RunFolder({str(self.path)!r}: {found})"


def _percentages(accuracy: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {percent:.1f} %" for name, percent in accuracy.items())
