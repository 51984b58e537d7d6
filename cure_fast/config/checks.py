"""Checks of user-facing values, and how numbers are written: ``8/255`` in and out."""

from __future__ import annotations

import difflib
import functools
import math
import re
import sys
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from cure_fast.errors import InputError
from cure_fast.plugins.lookup import Kind, installed, is_outside, load

T = TypeVar("T")

# The largest integer of torch and NumPy.
LARGEST = 2**63 - 1
# The lowest bound of a number above 0.
POSITIVE = math.ulp(0.0)
# Names that a message lists.
MOST = 16
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


def listed(names: Iterable[str]) -> str:
    """Return names with commas between, of many the first ones."""
    names = list(names)
    more = f" and {len(names) - MOST} more (`cure-fast list` shows them)"
    return ", ".join(names[:MOST]) + (more if len(names) > MOST else "")


def find(flag: str, table: Mapping[str, T], name: str, *, expected: str = "one of") -> T:
    """Return the entry called ``name``, or raise ``InputError`` with the flag and the entries."""
    if name in table:
        return table[name]
    raise _unknown(flag, table, name, expected)


def find_any(
    flag: str, table: Mapping[str, T], name: str, *, plugins: Kind, expected: str = "one of"
) -> T:
    """Return what :func:`find` does, or an entry of the same type from outside of the package.

    That is what ``package.module:name`` names, or an installed plug-in of the kind ``plugins``.
    """
    if name in table:
        return table[name]
    if not is_outside(plugins, name):
        raise _unknown(flag, {**table, **installed(plugins)}, name, expected)
    found, problem = load(plugins, name)
    kind = type(next(iter(table.values())))
    if not problem and not isinstance(found, kind):
        problem = f"expected a {kind.__name__}, got {type(found).__name__}."
    if problem:
        raise InputError(f"{flag} {name}: {problem}")
    return found


def _unknown(flag: str, names: Iterable[str], name: str, expected: str) -> InputError:
    """Return the error for a name that is none of those known."""
    names = list(names)
    return InputError(
        f"{flag}: expected {expected} {listed(names)}, got {shown(name)}.{nearest(name, names)}"
    )


def flag_of(name: str) -> str:
    """Return the flag of a field."""
    return f"--{name.replace('_', '-')}"


def check(condition: bool, flag: str, value: object, expected: str) -> None:
    """Raise :class:`InputError` naming ``flag`` unless ``condition`` holds."""
    if not condition:
        raise InputError(f"{flag_of(flag)}: expected {expected}, got {shown(value)}.")


@functools.cache
def field_types(kind: type, *, extras: bool = False) -> Mapping[str, Any]:
    """Return the type of each field, worked out once as it takes long; ``extras`` keep bounds."""
    hints = get_type_hints(kind, include_extras=extras)
    own = {name: hint for name, hint in hints.items() if get_origin(hint) is not ClassVar}
    return types.MappingProxyType(own)


def alternatives(hint: Any) -> list[Any]:
    """Return the types of a union, None first and text last, or the type alone."""
    if get_origin(hint) not in (Union, types.UnionType):
        return [hint]
    return sorted(get_args(hint), key=lambda kind: (kind is not type(None), kind is str))


@dataclass(frozen=True)
class Bounds:
    """Lowest and highest value of a number, both allowed; ``POSITIVE`` as the lowest excludes 0.

    Without a highest value a whole number may be as large as 64 bits hold, others any but infinite.
    """

    low: float
    high: float | None = None

    def check(self, name: str, value: float) -> None:
        """Raise unless the value of the field ``name`` lies inside."""
        whole = isinstance(value, int)
        high = self.high or (LARGEST if whole else sys.float_info.max)
        expected = f"at least {self.low:g}" if self.low != POSITIVE else "more than 0"
        if self.high or whole:
            expected += f" and at most {f'{high:g}' if self.high else '2**63 - 1'}"
        check(self.low <= value <= high, name, value, f"a number {expected}")


Count = Annotated[int, Bounds(1)]
Whole = Annotated[int, Bounds(0)]
Share = Annotated[float, Bounds(0, 1)]
Weight = Annotated[float, Bounds(0)]


class Checked:
    """Base of dataclasses that check themselves: words by ``Literal``, numbers by ``Bounds``."""

    def __post_init__(self) -> None:
        for name, hint in field_types(type(self), extras=True).items():
            value = getattr(self, name)
            if get_origin(hint) is Literal:
                check(value in get_args(hint), name, value, f"one of {', '.join(get_args(hint))}")
            for kind in (hint, *get_args(hint)):
                for bounds in getattr(kind, "__metadata__", ()):
                    # None, and a word in a number's place, are what else the type has.
                    if value is not None and not isinstance(value, str):
                        bounds.check(name, value)


def parse_fraction(text: str) -> float:
    """Return the number that ``text`` writes, as a decimal or as a fraction such as ``8/255``.

    Raises ``ValueError`` for other text, and beyond the range of a float; says why if not plain.
    """
    numerator, slash, denominator = text.partition("/")
    divisor = _parse_decimal(denominator) if slash else 1.0
    if divisor == 0:
        raise ValueError("the denominator is zero")
    value = _parse_decimal(numerator) / divisor
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
    steps = value * 255 if abs(value) < 1 else 0.0
    whole = round(steps)
    return f"{whole}/255" if whole and abs(steps - whole) < 1e-9 else f"{value:g}"


def format_radius(eps: float, norm: str) -> str:
    """Return the radius of a ball as results write it: ``eps 8/255``, or ``eps 0.5 in L2``."""
    return f"eps {format_pixel(eps)}{' in L2' if norm == 'l2' else ''}"


# What stands for None on a command line and in a file, the first where it is written.
NONE = ("none", "None")


def as_word(value: object) -> str:
    """Return a value as a command line takes it; floats of many decimals as fractions of 255."""
    if value is None or value == ():
        return NONE[0]
    if isinstance(value, tuple):
        return ",".join(map(as_word, value))
    if isinstance(value, float):
        return format_pixel(value) if len(f"{value:.9g}") > 8 else f"{value:g}"
    return str(value)
