"""Words of a command line, read by the dataclasses and functions that say what they may hold.

tyro writes the help from the same types. It does not read the words, because it answers a wrong one
with a box of several lines; here each is refused in one line, by the name of its flag.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args, get_origin

from cure_fast.config.checks import alternatives, field_types, nearest, parse_fraction, shown
from cure_fast.errors import InputError

# Digits enough for any setting, and few enough for Python to convert.
WHOLE_NUMBER = re.compile(r"[+-]?[0-9]{1,40}")


@contextmanager
def pointing_to(prog: str, what: str) -> Iterator[None]:
    """Add the command that explains ``what`` to an ``InputError`` of the block."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{error} `{prog} --help` explains {what}.") from error


def flags_of(*kinds: type) -> dict[str, Any]:
    """Return the type of each field of the dataclasses by its name."""
    return {
        field.name: field_types(kind)[field.name]
        for kind in kinds
        for field in dataclasses.fields(kind)
    }


def read_words(
    words: Sequence[str],
    flags: Mapping[str, Any],
    of_others: Callable[[str], str | None] = lambda name: "",
) -> tuple[list[str], dict[str, Any]]:
    """Return the words that belong to no flag, and the values of the flags by field.

    A flag is written ``--batch-size 8`` or ``--batch-size=8``, one that is on or off ``--flip`` or
    ``--no-flip``. Of a flag given twice the last counts. The types of ``flags`` are bool, int,
    float, str, a Literal of strings, a tuple of one of them of any length, or a union of these and
    None. ``of_others`` says what is wrong with another field; "" if it is unknown, and None lets
    its flag pass, whose value is then a word that belongs to no flag.
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
            why = of_others(off)
            if why is None:
                continue
            near = nearest(flag, flag_words(flags))
            raise InputError(why or f"unknown flag {shown(flag)}.{near}")
        if flags.get(off or name) is bool:
            if equals:
                other = flag.replace("--no-", "--", 1) if off else f"--no-{flag[2:]}"
                raise InputError(
                    f"{flag}: expected the flag alone, on, or {other}, got {shown(word)}."
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


def convert(flag: str, hint: Any, word: str) -> Any:
    """Return what ``word`` writes as a value of the type ``hint``, or raise ``InputError``."""
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
        return int(word)
    if kind is float:
        return parse_fraction(word)
    if kind is str and word.strip():
        if word.startswith("~") and os.path.expanduser(word).startswith("~"):
            raise ValueError("there is no such home folder; write the path from /")
        return word
    if get_origin(kind) is tuple:
        items = [item for item in word.replace(" ", "").split(",") if item]
        if items:
            return tuple(read_value(get_args(kind)[0], item) for item in items)
    raise ValueError


def expected(hint: Any) -> str:
    """Return what a value of the type looks like, in words."""
    kinds = [kind for kind in alternatives(hint) if kind is not type(None)]
    return " or ".join(map(expected_of, kinds))


def expected_of(kind: Any) -> str:
    """Return the same for one plain type."""
    if get_origin(kind) is Literal:
        words = ", ".join(get_args(kind))
        return f"one of {words}" if ", " in words else f"the word {words}"
    if get_origin(kind) is tuple:
        item = get_args(kind)[0]
        items = {float: "numbers", str: "names"}.get(item) or f"any of {', '.join(get_args(item))},"
        return f"{items} with commas between"
    plain = {int: "a whole number", float: "a number such as 0.03 or 8/255"}
    return plain.get(kind, "a text that is not empty")
