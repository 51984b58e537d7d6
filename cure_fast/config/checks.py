"""Checks of user-facing values, and how numbers are written: ``8/255`` in and out."""

from __future__ import annotations

import difflib
import functools
import math
import re
import types
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from cure_fast.errors import InputError

T = TypeVar("T")

# The largest integer of torch and NumPy.
LARGEST = 2**63 - 1
# The lowest bound of a number above 0.
POSITIVE = math.ulp(0.0)
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
    """Return " Perhaps you meant X." with the choice most similar to ``word``, or nothing."""
    bare = {choice.lstrip("-"): choice for choice in choices}
    typed = word[:SHOWN].lstrip("-").lower()
    begun = []
    for choice in bare:
        short, long = sorted((choice, typed), key=len)
        if len(short) > 2 and (long.startswith(short) or long.endswith(short)):
            begun.append(choice)
    # What begins or ends alike comes before what is spelt alike.
    near = sorted(begun, key=len, reverse=True) or difflib.get_close_matches(typed, bare, n=1)
    return f" Perhaps you meant {bare[near[0]]}." if near else ""


def find(flag: str, table: Mapping[str, T], name: str, *, expected: str = "one of") -> T:
    """Return the entry called ``name``, or raise ``InputError`` with the flag and all entries."""
    if name in table:
        return table[name]
    raise InputError(
        f"{flag}: expected {expected} {', '.join(table)}, got {shown(name)}.{nearest(name, table)}"
    )


def check(condition: bool, flag: str, value: object, expected: str) -> None:
    """Raise :class:`InputError` naming ``flag`` unless ``condition`` holds."""
    if not condition:
        raise InputError(f"--{flag.replace('_', '-')}: expected {expected}, got {shown(value)}.")


@functools.cache
def field_types(kind: type) -> Mapping[str, Any]:
    """Return the type of each annotated field of a class, worked out once, as it takes long."""
    return types.MappingProxyType(get_type_hints(kind))


def alternatives(hint: Any) -> list[Any]:
    """Return the types of a union, None first and text last, or the type alone."""
    if get_origin(hint) not in (Union, types.UnionType):
        return [hint]
    return sorted(get_args(hint), key=lambda kind: (kind is not type(None), kind is str))


def check_fields(owner: object, **bounds: tuple[float] | tuple[float, float]) -> None:
    """Raise unless ``Literal`` fields hold one of their values, and numbers are in ``bounds``.

    These are the lowest and, where there is one, the highest value by field, both allowed;
    ``POSITIVE`` as the lowest means more than 0. What else a field's type has, as None, passes.
    Without a highest value a whole number may be as large as 64 bits hold.
    """
    hints = field_types(type(owner))
    for name, hint in hints.items():
        if get_origin(hint) is Literal:
            value, choices = getattr(owner, name), get_args(hint)
            check(value in choices, name, value, f"one of {', '.join(choices)}")
    for name, (low, *highest) in bounds.items():
        value = getattr(owner, name)
        words = [word for kind in alternatives(hints[name]) for word in get_args(kind)]
        if value in words or (value is None and type(None) in alternatives(hints[name])):
            continue
        high = highest[0] if highest else math.inf
        expected = "a number more than 0" if low == POSITIVE else f"a number at least {low:g}"
        if highest:
            expected += f" and at most {high:g}"
        elif isinstance(value, int):
            high = LARGEST
            expected += " and at most 2**63 - 1"
        inside = (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and low <= value <= high
            and value != math.inf
        )
        check(inside, name, value, expected)


def parse_fraction(text: str) -> float:
    """Return the number that ``text`` writes, as a decimal or as a fraction such as ``8/255``.

    Raises ``ValueError`` for other text, and beyond the range of a float; says why if not plain.
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


def as_word(value: object) -> str:
    """Return a value as a command line takes it; floats of many decimals as fractions of 255."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if isinstance(value, float):
        return format_pixel(value) if len(f"{value:.9g}") > 8 else f"{value:g}"
    return str(value)
