"""The words of ``cure-fast compare``: entries, each a method with policies and flags of its own."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cure_fast.cli.configure import read_config
from cure_fast.cli.words import pointing_to, read_words
from cure_fast.config.checks import shown
from cure_fast.errors import InputError
from cure_fast.files import user_path
from cure_fast.training.compare import Comparison, Entry

# A stretch without commas, but for those in quotes.
ENTRY = re.compile(r"""(?:[^,"']|"[^"]*"|'[^']*')+""")
# Flags that the comparison gives to each run itself, and their types.
GIVEN = {"method": str, "policies": str, "seed": str, "out": str}


def read_comparison(
    recipe: str, words: Sequence[str], prog: str, switches: Mapping[str, Any]
) -> Comparison:
    """Return what a recipe or run folder and the flags after it compare.

    ``--methods`` has entries with commas between, each METHOD[+POLICY...] and then flags of its
    own, as train takes them; in an entry a value that holds commas is in quotes. Other flags are
    for all entries, and an entry's own count where both give one.
    """
    with pointing_to(prog, "each flag"):
        _, own = read_words(words, {**GIVEN, **switches}, lambda name: None)
        refuse(own.keys() & GIVEN.keys() - {"out"}, "")
        if "methods" not in own:
            raise InputError(
                "--methods: expected entries such as cure,trades+piat,'trades --beta 5', got none."
            )
        entries = [
            Entry(" ".join(entry), read_config(recipe, [*words, *own_words], prog, switches)[0])
            for entry in split_entries(own["methods"])
            for own_words in [entry_words(entry)]
        ]
    first = entries[0].config
    folder = user_path(own["out"], "--out") if "out" in own else Path(f"runs/compare-{first.name}")
    # Of no entry: the runs have folders and seeds of their own.
    entries = [
        replace(e, config=replace(e.config, run=replace(e.config.run, out=None))) for e in entries
    ]
    return Comparison(entries, own.get("seeds", 3), folder, shlex.join([*prog.split(), *words]))


def split_entries(text: str) -> list[list[str]]:
    """Return the words of each entry.

    Raises:
        InputError: for an entry that is empty, or a quote that is not closed.
    """
    entries = [piece.strip() for piece in ENTRY.findall(text)]
    whole = ",".join(ENTRY.findall(text)) == text and all(entries)
    if not entries or not whole:
        raise InputError(
            "--methods: expected entries with commas between, and quotes in pairs, got "
            f"{shown(text)}."
        )
    return [shlex.split(entry) for entry in entries]


def entry_words(entry: Sequence[str]) -> list[str]:
    """Return the words for train of an entry: the flags of its method and policies, and its own."""
    names, flags = entry[0].split("+"), entry[1:]
    _, own = read_words(flags, GIVEN, lambda name: None)
    refuse(own.keys() & GIVEN.keys(), f" of the entry {shown(' '.join(entry))}")
    chosen = ["--policies", ",".join(names[1:])] if names[1:] else []
    return ["--method", names[0], *chosen, *flags]


def refuse(given: set[str], where: str) -> None:
    """Raise ``InputError`` for a flag that the comparison gives itself."""
    for name in sorted(given):
        raise InputError(
            f"--{name}{where}: expected none, as compare gives each run its own: write methods and "
            "policies as --methods METHOD+POLICY,..., seeds as --seeds N."
        )
