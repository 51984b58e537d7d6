"""Checks of user-facing values, and how numbers are written: ``8/255`` in and out."""

from __future__ import annotations

import math
from typing import Literal, get_args, get_origin, get_type_hints

from cure_fast.errors import InputError


def check(condition: bool, flag: str, value: object, expected: str) -> None:
    """Raise :class:`InputError` naming ``flag`` unless ``condition`` holds."""
    if not condition:
        raise InputError(f"--{flag.replace('_', '-')}: expected {expected}, got {value!r}.")


def check_range(
    owner: object, name: str, low: float, high: float = math.inf, *, open_low: bool = False
) -> None:
    """Raise unless the number ``owner.name`` is finite and lies in [low, high] (or (low, high])."""
    value = getattr(owner, name)
    inside = (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and (low < value if open_low else low <= value)
        and value <= high
    )
    bounds = f"{'more than' if open_low else 'at least'} {low:g}"
    if high != math.inf:
        bounds += f" and at most {high:g}"
    check(inside, name, value, f"a number {bounds}")


def check_choice(owner: object, name: str, choices: tuple[str, ...]) -> None:
    """Raise unless the string ``owner.name`` is one of ``choices``."""
    value = getattr(owner, name)
    check(value in choices, name, value, f"one of {', '.join(choices)}")


def check_literals(owner: object) -> None:
    """Raise unless every ``Literal`` field of the dataclass ``owner`` holds one of its values."""
    for name, hint in get_type_hints(type(owner)).items():
        if get_origin(hint) is Literal:
            check_choice(owner, name, get_args(hint))


def parse_fraction(text: str) -> float:
    """Return the number that ``text`` writes, as a decimal or as a fraction such as ``8/255``.

    Raises:
        ValueError: if ``text`` is neither.
    """
    numerator, slash, denominator = text.partition("/")
    if slash and float(denominator) == 0:
        raise ValueError(f"the denominator of {text!r} is zero")
    value = float(numerator) / float(denominator) if slash else float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text!r} is not a finite number")
    return value


def format_pixel(value: float) -> str:
    """Return a distance in pixel units as ``8/255`` where it is a whole number of 255ths."""
    steps = value * 255
    whole = round(steps)
    return f"{whole}/255" if whole and abs(steps - whole) < 1e-9 else f"{value:g}"
