"""Attacks by name, and what one of them measured: plain data, without a dependency."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from cure_fast.checks import nearest, shown
from cure_fast.errors import InputError

# What `attacks` takes, for listings.
ATTACKS = {
    "natural": "no attack",
    "fgsm": "one step of length eps along the sign of the gradient of the cross-entropy",
    "pgdK": "K steps (1 to 1000) on the cross-entropy, uniform start, last iterate",
    "cwK": "K steps (1 to 1000) on the margin loss (Carlini, Wagner), uniform start, last iterate",
    "aa": "AutoAttack, version standard: APGD-CE, targeted APGD-DLR, targeted FAB, Square",
}
MAX_STEPS = 1000
# A wrong name is compared with these.
EXAMPLES = ("natural", "fgsm", "pgd20", "cw20", "aa")

Family = Literal["natural", "fgsm", "pgd", "cw", "aa"]


@dataclass(frozen=True)
class AttackSpec:
    """An attack by name.

    Attributes:
        name: as the user writes it.
        family: kind of attack.
        steps: number of gradient steps; 0 for natural and aa.
    """

    name: str
    family: Family
    steps: int = 0


def parse_attack(text: str) -> AttackSpec:
    """Return the attack that ``text`` names, such as ``pgd20``.

    Raises:
        InputError: if it names none; the message lists the valid forms.
    """
    if text == "natural":
        return AttackSpec(text, "natural")
    if text == "fgsm":
        return AttackSpec(text, "fgsm", 1)
    if text == "aa":
        return AttackSpec(text, "aa")
    found = re.fullmatch(r"(pgd|cw)([1-9][0-9]{0,3})", text)
    if found and int(found[2]) <= MAX_STEPS:
        return AttackSpec(text, "pgd" if found[1] == "pgd" else "cw", int(found[2]))
    raise InputError(
        f"--attacks: expected {', '.join(ATTACKS)} with K from 1 to {MAX_STEPS} (such as pgd20), "
        f"with commas between, got {shown(text)}.{nearest(text, EXAMPLES)}"
    )


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
