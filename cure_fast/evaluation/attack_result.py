"""What an attack on a finished model measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class AttackResult:
    """Accuracy under one attack.

    Attributes:
        attack: name of the attack.
        correct: images classified right as they are and under the attack.
        count: images looked at.
        seconds: time spent, over all the calls that it took.
        settings: all that decides the result besides model and images, as JSON types.
        warnings: what speaks against the result.
        reliable: False if there is a warning.
        precision: dtype of weights and attack.
    """

    attack: str
    correct: int
    count: int
    seconds: float
    settings: dict[str, Any]
    warnings: tuple[str, ...] = ()
    reliable: bool = True
    precision: str = "float32"

    @property
    def accuracy(self) -> float:
        """Percent of the images, in [0, 100]."""
        return 100 * self.correct / self.count

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON types, with its accuracy."""
        return {
            "attack": self.attack,
            "correct": self.correct,
            "count": self.count,
            "accuracy": self.accuracy,
            "seconds": self.seconds,
            "precision": self.precision,
            "settings": self.settings,
            "warnings": list(self.warnings),
            "reliable": self.reliable,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AttackResult:
        """Return the result that :meth:`to_dict` wrote."""
        names = ("attack", "correct", "count", "seconds", "settings", "reliable", "precision")
        return cls(warnings=tuple(values["warnings"]), **{name: values[name] for name in names})


def nrr(natural: float, robust: float) -> float:
    """Return the natural-robustness ratio 2NR / (N + R) in percent; 0 if both are 0 (CURE).

    Args:
        natural: natural accuracy in percent.
        robust: accuracy under an attack in percent.
    """
    total = natural + robust
    return 2 * natural * robust / total if total else 0.0
