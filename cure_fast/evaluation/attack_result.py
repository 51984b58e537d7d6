"""What an attack on a finished model measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class AttackResult:
    """Accuracy under one attack.

    Attributes:
        correct: images classified right as they are and under the attack, of ``count``.
        seconds: time spent, over all the calls that it took.
        settings: all that decides the result besides model and images, as JSON types.
        warnings: what speaks against the result; where there is any it is not ``reliable``.
        precision: dtype of weights and attack.
        by_class: percent of each class's images, None for one without; empty in older results.
    """

    attack: str
    correct: int
    count: int
    seconds: float
    settings: dict[str, Any]
    warnings: tuple[str, ...] = ()
    reliable: bool = True
    precision: str = "float32"
    by_class: tuple[float | None, ...] = ()

    @property
    def accuracy(self) -> float:
        """Percent of the images, in [0, 100]."""
        return 100 * self.correct / self.count

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON types, with its accuracy."""
        names = ("attack", "correct", "count", "accuracy", "seconds", "precision", "settings")
        return {name: getattr(self, name) for name in names} | {
            "warnings": list(self.warnings),
            "reliable": self.reliable,
            "by_class": list(self.by_class),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AttackResult:
        """Return the result that :meth:`to_dict` wrote."""
        names = ("attack", "correct", "count", "seconds", "settings", "reliable", "precision")
        return cls(
            warnings=tuple(values["warnings"]),
            by_class=tuple(values.get("by_class", ())),
            **{name: values[name] for name in names},
        )


def nrr(natural: float, robust: float) -> float:
    """Return the natural-robustness ratio 2NR / (N + R) of two percentages, or 0 (CURE)."""
    total = natural + robust
    return 2 * natural * robust / total if total else 0.0
