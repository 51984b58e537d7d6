"""What an attack on a finished model measured, and what is kept of it for later calls."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from cure_fast.errors import InputError
from cure_fast.files import write_json


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
        return json.loads(json.dumps(asdict(self) | {"accuracy": self.accuracy}))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AttackResult:
        """Return the result that :meth:`to_dict` wrote."""
        known: dict[str, Any] = {"by_class": (), **values}
        known |= {name: tuple(known[name]) for name in ("warnings", "by_class")}
        return cls(**{field.name: known[field.name] for field in fields(cls)})


def nrr(natural: float, robust: float) -> float:
    """Return the natural-robustness ratio 2NR / (N + R) of two percentages, or 0 (CURE)."""
    total = natural + robust
    return 2 * natural * robust / total if total else 0.0


def strongest(attacks: Mapping[str, AttackResult]) -> AttackResult | None:
    """Return the result to quote: AutoAttack's where it ran, else of the attack that left least."""
    others = [result for name, result in attacks.items() if name != "natural"]
    weakest = min(others, key=lambda result: result.accuracy, default=None)
    return attacks.get("aa", weakest)


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write what :func:`read_state` reads, with a checksum of it all, whole or not at all."""
    write_json(path, {**state, "sha256": _state_hash(state)})


def read_state(path: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """Return what an earlier evaluation stored at ``path``, or nothing if it stored nothing.

    Raises:
        InputError: if it is not readable, is damaged, or is of another model, set of images,
            version or settings.
    """
    if not path.exists():
        return {}
    remedy = f"Delete {path} or evaluate into another folder to start over."
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        stored = dict(state["identity"])
        told = state.pop("sha256")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: not a stored evaluation ({error!r}). {remedy}") from error
    if told != _state_hash(state):
        raise InputError(
            f"{path}: its checksum is not that of its content, so it is damaged or was edited. "
            f"{remedy}"
        )
    here = json.loads(json.dumps(identity))
    different = [
        f"{name} ({_short(stored.get(name))} there, {_short(here.get(name))} here)"
        for name in {**stored, **here}
        if stored.get(name) != here.get(name)
    ]
    if different:
        raise InputError(f"{path}: stored with other {', '.join(different)}. {remedy}")
    return state


def _state_hash(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) < 64 else text[:8]
