"""Checks of user-facing values, and how numbers are written: ``8/255`` in and out."""

from __future__ import annotations

import difflib
import functools
import math
import re
import types
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

from cure_fast.errors import InputError

# The largest integer of torch and NumPy.
LARGEST = 2**63 - 1
# Characters of a value that a message repeats.
SHOWN = 80
DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,9})?")


def shown(value: object) -> str:
    """Return the value as a message repeats it: in quotes if text, on one line, not too long."""
    try:
        text = repr(value)
    except ValueError:  # a whole number of thousands of digits
        return f"a {type(value).__name__} of thousands of digits"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}... ({len(text)} characters)"


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return " Perhaps you meant X." with the choice most similar to ``word``, or nothing.

    A choice that begins or ends like the word, or the word like it, comes before one that is spelt
    alike.
    """
    bare = {choice.lstrip("-"): choice for choice in choices}
    typed = word[:SHOWN].lstrip("-").lower()
    begun = []
    for choice in bare:
        short, long = sorted((choice, typed), key=len)
        if len(short) > 2 and (long.startswith(short) or long.endswith(short)):
            begun.append(choice)
    near = sorted(begun, key=len, reverse=True) or difflib.get_close_matches(typed, bare, n=1)
    return f" Perhaps you meant {bare[near[0]]}." if near else ""


def check(condition: bool, flag: str, value: object, expected: str) -> None:
    """Raise :class:`InputError` naming ``flag`` unless ``condition`` holds."""
    if not condition:
        raise InputError(f"--{flag.replace('_', '-')}: expected {expected}, got {shown(value)}.")


def check_range(
    owner: object, name: str, low: float, high: float = math.inf, *, open_low: bool = False
) -> None:
    """Raise unless the number ``owner.name`` is finite and lies in [low, high] (or (low, high]).

    Without ``high`` a whole number may be as large as 64 bits hold.
    """
    value = getattr(owner, name)
    if isinstance(value, int):
        high = min(high, LARGEST)
    inside = (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and (isinstance(value, int) or math.isfinite(value))
        and (low < value if open_low else low <= value)
        and value <= high
    )
    bounds = f"{'more than' if open_low else 'at least'} {low:g}"
    if high == LARGEST:
        bounds += " and at most 2**63 - 1"
    elif high != math.inf:
        bounds += f" and at most {high:g}"
    check(inside, name, value, f"a number {bounds}")


def check_choice(owner: object, name: str, choices: tuple[str, ...]) -> None:
    """Raise unless the string ``owner.name`` is one of ``choices``."""
    value = getattr(owner, name)
    check(value in choices, name, value, f"one of {', '.join(choices)}")


@functools.cache
def field_types(kind: type) -> Mapping[str, Any]:
    """Return the type of each annotated field of a class, worked out once, as it takes long."""
    return types.MappingProxyType(get_type_hints(kind))


def check_literals(owner: object) -> None:
    """Raise unless every ``Literal`` field of the dataclass ``owner`` holds one of its values."""
    for name, hint in field_types(type(owner)).items():
        if get_origin(hint) is Literal:
            check_choice(owner, name, get_args(hint))


def parse_fraction(text: str) -> float:
    """Return the number that ``text`` writes, as a decimal or as a fraction such as ``8/255``.

    Raises:
        ValueError: if ``text`` is neither, or beyond the range of a float; the message says why
            where that is not plain.
    """
    numerator, slash, denominator = text.partition("/")
    value = _parse_decimal(numerator)
    if slash:
        divisor = _parse_decimal(denominator)
        if divisor == 0:
            raise ValueError("the denominator is zero")
        value /= divisor
    if not math.isfinite(value):
        raise ValueError("too large for a number")
    # Without the sign of zero, which would make two records of one setting differ.
    return value + 0.0


def _parse_decimal(text: str) -> float:
    """Return a decimal in the digits 0 to 9, as :func:`parse_fraction` takes it."""
    if not DECIMAL.fullmatch(text.strip()):
        raise ValueError
    value = float(text)
    if value == 0 and re.search("[1-9]", text.lower().split("e")[0]):
        raise ValueError("too small to tell from zero")
    return value


def format_pixel(value: float) -> str:
    """Return a distance in pixel units as ``8/255`` where it is a whole number of 255ths."""
    steps = value * 255 if abs(value) <= 1 else 0.0
    whole = round(steps)
    return f"{whole}/255" if whole and abs(steps - whole) < 1e-9 else f"{value:g}"
