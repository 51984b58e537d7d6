"""The words of ``cure-fast compare``: finished runs, or entries that are trained.

An entry is a method with policies and flags of its own.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date
from itertools import chain, count, takewhile
from pathlib import Path
from typing import Any

from cure_fast.cli.configure import base_config, read_config
from cure_fast.cli.flags import pointing_to, split_flags
from cure_fast.config.checks import shown
from cure_fast.console import say
from cure_fast.errors import InputError
from cure_fast.files import replacing, user_path
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


def names_runs(words: Sequence[str]) -> bool:
    """Return whether the words after ``compare`` name finished runs, and nothing to train.

    They do without ``--methods``, if more than one word is before the flags, or the folder of a
    run.
    """
    if any(word.partition("=")[0] == "--methods" for word in words):
        return False
    named = list(takewhile(lambda word: not word.startswith("-"), words))
    return len(named) > 1 or (len(named) == 1 and (Path(named[0]) / "config.json").is_file())


def compare_runs(*runs: str, out: str | None = None, reproducibility: str | None = None) -> None:
    """Write tables of finished runs beside published results; runs of several seeds are one row.

    Markdown, CSV and LaTeX, and natural against robust accuracy as a picture.

    Args:
        runs: Folders of finished runs, of the same data and evaluated alike.
        out: Folder for the tables, whose former ones are replaced; without it a new one,
            runs/compare-DATE.
        reproducibility: File to write in place of the tables, such as REPRODUCIBILITY.md: which of
            the papers' rows the runs reproduce; they may be of any data.
    """
    # Reading records takes what training does not.
    from cure_fast.report.reproducibility import reproducibility as page_of
    from cure_fast.report.run_tables import read_entrants, write_run_tables

    flags = {"--out": out, "--reproducibility": reproducibility}
    given = [word for flag, value in flags.items() if value is not None for word in (flag, value)]
    told = shlex.join(["cure-fast", "compare", *runs, *given])
    if reproducibility is not None:
        if out is not None:
            raise InputError("--out: expected none with --reproducibility, got both. Leave it out.")
        path = user_path(reproducibility, "--reproducibility")
        if path.is_dir():
            raise InputError(f"--reproducibility {path}: expected a file, got a folder.")
        text = page_of(read_entrants([Path(run) for run in runs]), told)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
        say(f"reproducibility: {path}")
        return
    entrants = read_entrants([Path(run) for run in runs])
    folder = new_folder() if out is None else user_path(out, "--out")
    for path in write_run_tables(folder, entrants, told):
        say(f"comparison: {path}")


def new_folder() -> Path:
    """Return where tables go that nobody named a folder for: of the day, with a number."""
    base = Path("runs") / f"compare-{date.today().isoformat()}"
    names = (base.with_name(f"{base.name}-{number}") for number in count(2))
    return next(path for path in chain([base], names) if not path.exists())
