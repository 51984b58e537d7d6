"""The words of ``cure-fast compare``: entries, each a method with policies and flags of its own."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cure_fast.cli.configure import base_config, read_config
from cure_fast.cli.flags import pointing_to, split_flags
from cure_fast.config.checks import shown
from cure_fast.errors import InputError
from cure_fast.files import user_path
from cure_fast.training.compare import Comparison, Entry

# A stretch without commas, but for those in quotes.
ENTRY = re.compile(r"""(?:[^,"']|"[^"]*"|'[^']*')+""")
# Flags that a comparison gives each of its runs, and their types.
GIVEN = {"method": str, "policies": str, "seed": str}


def read_comparison(
    recipe: str, words: Sequence[str], prog: str, switches: Mapping[str, Any]
) -> Comparison:
    """Return what a recipe or run folder and the flags after it compare.

    ``--methods`` has entries with commas between, each METHOD[+POLICY...] and then flags of its
    own, as train takes them; in an entry a value that holds commas is in quotes. Other flags are
    for all entries, and an entry's own count where both give one. ``prog`` and ``switches`` are
    those of :func:`.read_config`.
    """
    name = base_config(recipe, [], prog).name
    with pointing_to("cure-fast compare", "it"):
        own, _ = split_flags(words, {**GIVEN, **switches, "name": str, "out": str})
        refuse(own)
        entries = split_entries(own.get("methods", ""))
    read = []
    for entry in entries:
        written = " ".join(entry)
        try:
            config, _ = read_config(recipe, [*words, *entry_words(entry)], prog, switches)
        except InputError as error:
            raise InputError(f"--methods, {shown(written)}: {error}") from error
        # The folder is that of the comparison.
        read.append(Entry(written, replace(config, run=replace(config.run, out=None))))
    folder = user_path(own.get("out", f"runs/compare-{own.get('name', name)}"), "--out")
    command = shlex.join([*prog.split(), *words])
    return Comparison(read, own.get("seeds", 3), Path(folder), command)


def split_entries(text: str) -> list[list[str]]:
    """Return the words of each entry.

    Raises:
        InputError: for an entry that is empty, or a quote that is not closed.
    """
    found = ENTRY.findall(text)
    if ",".join(found) != text or not all(map(str.strip, found)) or not found:
        raise InputError(
            "--methods: expected entries with commas between, and quotes in pairs, such as "
            f'"cure,trades+piat,trades --beta 5", got {shown(text) if text else "nothing"}.'
        )
    return [shlex.split(entry) for entry in found]


def entry_words(entry: Sequence[str]) -> list[str]:
    """Return the words of an entry for train: the flags of its method and policies, and its own."""
    (method, *policies), flags = entry[0].split("+"), entry[1:]
    own, _ = split_flags(flags, {**GIVEN, "out": str})
    refuse(own)
    chosen = ["--policies", ",".join(policies)] if policies else []
    return ["--method", method, *chosen, *flags]


def refuse(given: Mapping[str, Any]) -> None:
    """Raise ``InputError`` for a flag that a comparison gives each of its runs."""
    for name in (name for name in GIVEN if name in given):
        raise InputError(
            f"--{name}: expected none, as each run has its own. Write methods and policies as "
            "--methods METHOD+POLICY,..., and the number of seeds as --seeds N."
        )
