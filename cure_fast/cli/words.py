"""Words of a command line, read by the dataclasses and functions that say what they may hold.

tyro writes the help from the same types. It does not read the words, because it answers a wrong one
with a box of several lines; here each is refused in one line, by the name of its flag.
"""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from cure_fast.config.checks import field_types, nearest, parse_fraction, shown
from cure_fast.errors import InputError

WHOLE_NUMBER = re.compile(r"[+-]?[0-9]+")
# Enough for any setting, and few enough for Python to convert.
MOST_DIGITS = 40


class UnknownFlagError(InputError):
    """A flag that is none; ``name`` is the field it would have."""

    def __init__(self, flag: str, flags: Iterable[str]) -> None:
        self.name = flag.removeprefix("--").removeprefix("no-").replace("-", "_")
        super().__init__(f"unknown flag {shown(flag)}.{nearest(flag, flag_words(flags))}")


def flags_of(*kinds: type) -> dict[str, Any]:
    """Return the type of each field of the dataclasses by its name."""
    return {
        field.name: field_types(kind)[field.name]
        for kind in kinds
        for field in dataclasses.fields(kind)
    }


def read_words(words: Sequence[str], flags: Mapping[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """Return the words that belong to no flag, and the values of the flags by field.

    A flag is written ``--batch-size 8`` or ``--batch-size=8``, one that is on or off ``--flip`` or
    ``--no-flip``. Of a flag given twice the last counts.

    Args:
        words: what follows the command.
        flags: type by field name: bool, int, float, str, a Literal of strings, a tuple of one of
            them of any length, or a union of these and None.

    Raises:
        InputError: for an unknown flag, and a value that is missing or not of the type.
    """
    free, values, left = [], {}, list(words)
    while left:
        word = left.pop(0)
        if not word.startswith("-") or word == "-":
            free.append(word)
            continue
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_") if flag.startswith("--") else ""
        off = name.removeprefix("no_") if name not in flags else ""
        if name not in flags and flags.get(off) is not bool:
            raise UnknownFlagError(flag, flags)
        if flags.get(off or name) is bool:
            if equals:
                raise InputError(
                    f"{flag}: expected the flag alone, on, or {negated(flag)}, got {shown(word)}."
                )
            values[off or name] = not off
            continue
        if not equals:
            if not left or left[0].startswith("--"):
                came = f"the flag {shown(left[0])}" if left else "nothing"
                raise InputError(f"{flag}: expected {expected(flags[name])} after it, got {came}.")
            value = left.pop(0)
        values[name] = convert(flag, flags[name], value)
    return free, values


def flag_words(flags: Iterable[str]) -> list[str]:
    """Return the flags of fields as they are written."""
    return [f"--{name.replace('_', '-')}" for name in flags]


def negated(flag: str) -> str:
    """Return the word that turns a flag off, or the one that turns it on for such a word."""
    return flag.replace("--no-", "--", 1) if flag.startswith("--no-") else f"--no-{flag[2:]}"


def convert(flag: str, hint: Any, word: str) -> Any:
    """Return what ``word`` writes as a value of the type ``hint``.

    Raises:
        InputError: naming ``flag``, what was expected and what came.
    """
    kinds, why = alternatives(hint), ""
    for kind in kinds:
        try:
            return read_value(kind, word)
        except ValueError as error:
            why = f" ({error})" if str(error) else ""
    choices = [c for kind in kinds if get_origin(kind) is Literal for c in get_args(kind)]
    raise InputError(
        f"{flag}: expected {expected(hint)}, got {shown(word)}{why}.{nearest(word, choices)}"
    )


def read_value(kind: Any, word: str) -> Any:
    """Return the value of one plain type that ``word`` writes, or raise ``ValueError`` with why."""
    if kind is type(None) and word == "None":
        return None
    if get_origin(kind) is Literal and word in get_args(kind):
        return word
    if kind is int and WHOLE_NUMBER.fullmatch(word):
        if len(word) > MOST_DIGITS:
            raise ValueError("too large")
        return int(word)
    if kind is float:
        return parse_fraction(word)
    if kind is str and word.strip():
        if word.startswith("~"):
            _check_home(word)
        return word
    if get_origin(kind) is tuple:
        items = [item for item in word.replace(" ", "").split(",") if item]
        if items:
            return tuple(read_value(get_args(kind)[0], item) for item in items)
    raise ValueError


def _check_home(word: str) -> None:
    """Raise ``ValueError`` where a path begins with a home folder that is not known."""
    try:
        Path(word).expanduser()
    except RuntimeError as error:
        raise ValueError("there is no such home folder; write the path from /") from error


def alternatives(hint: Any) -> list[Any]:
    """Return the plain types of a union, None first and text last, or the type alone."""
    if get_origin(hint) not in (Union, types.UnionType):
        return [hint]
    return sorted(get_args(hint), key=lambda kind: (kind is not type(None), kind is str))


def expected(hint: Any) -> str:
    """Return what a value of the type looks like, in words."""
    parts = []
    for kind in alternatives(hint):
        if get_origin(kind) is Literal:
            words = ", ".join(get_args(kind))
            parts.append(f"one of {words}" if ", " in words else f"the word {words}")
        elif get_origin(kind) is tuple:
            item = get_args(kind)[0]
            words = {float: "numbers", str: "names"}.get(item)
            words = words or f"any of {', '.join(get_args(item))},"
            parts.append(f"{words} with commas between")
        elif kind is not type(None):
            parts.append(
                {int: "a whole number", float: "a number such as 0.03 or 8/255"}.get(
                    kind, "a text that is not empty"
                )
            )
    return " or ".join(parts)
