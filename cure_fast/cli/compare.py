"""The words of ``cure-fast compare``: finished runs, or entries that are trained.

An entry is a method with policies and flags of its own.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import date
from itertools import chain, count, takewhile
from pathlib import Path
from typing import Any

from cure_fast.cli.configure import base_config, read_config
from cure_fast.cli.flags import OF_EACH, pointing_to, split_flags
from cure_fast.config.checks import check, shown
from cure_fast.console import say
from cure_fast.errors import InputError
from cure_fast.files import replacing, user_path
from cure_fast.training.compare import Comparison, Entry

# A stretch without commas, but for those in quotes.
ENTRY = re.compile(r"""(?:[^,"']|"[^"]*"|'[^']*')+""")
# Flags that a comparison gives each of its runs, and their types.
GIVEN = dict.fromkeys(OF_EACH["compare"], str)


def read_comparison(recipe: str, words: Sequence[str], switches: Mapping[str, Any]) -> Comparison:
    """Return what a recipe or run folder and the flags after it compare.

    ``--methods`` has entries with commas between, each METHOD[+POLICY...] and then flags of its
    own, as train takes them; in an entry a value that holds commas is in quotes. Other flags are
    for all entries, and an entry's own count where both give one. ``switches`` are the command's
    own flags, as for :func:`.read_config`.
    """
    own = given_to_all("cure-fast compare", words, switches)
    with pointing_to("cure-fast compare", "it"):
        refuse(own)
        split = split_entries(own.get("methods", ""))
    entries = []
    for entry in split:
        with naming("--methods", written := " ".join(entry)):
            entries.append((written, entry_words(entry)))
    return comparison_of(entries, "cure-fast compare", recipe, words, switches, seeds_of(own, 3))


def given_to_all(command: str, words: Sequence[str], switches: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is given of the command's own flags, and of those that it gives each run."""
    if any(word.partition("=")[0] in ("--resume", "--no-resume") for word in words):
        raise InputError(
            f"--resume: expected none, as the same {command} goes on where it stopped. Leave it "
            "out."
        )
    with pointing_to(command, "it"):
        return split_flags(words, {**GIVEN, **switches, "name": str, "out": str})[0]


@contextmanager
def naming(flag: str, entry: str) -> Iterator[None]:
    """Add the entry to an ``InputError`` of the block."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{flag}, {shown(entry)}: {error}") from error


def seeds_of(own: Mapping[str, Any], usual: int) -> range:
    """Return the seeds that ``--seeds`` asks for."""
    count = own.get("seeds", usual)
    check(0 < count <= 1000, "seeds", count, "a number from 1 to 1000")
    return range(count)


def comparison_of(
    entries: Sequence[tuple[str, Sequence[str]]],
    command: str,
    recipe: str,
    words: Sequence[str],
    switches: Mapping[str, Any],
    seeds: Sequence[int],
    flag: str = "--methods",
) -> Comparison:
    """Return the runs of entries, each a name and the words that come behind those for all.

    Args:
        entries: what is compared.
        command: such as ``cure-fast compare``.
        recipe: recipe or run folder.
        words: flags for all entries, and the command's own.
        switches: the command's own flags, as for :func:`.read_config`.
        seeds: of each entry.
        flag: what names the entries, for messages.

    Raises:
        InputError: for wrong words, with the entry.
    """
    prog = f"{command} {recipe}"
    own = given_to_all(command, words, switches)
    jobs = own.get("jobs")
    check(jobs is None or 0 < jobs <= 64, "jobs", jobs, "a number from 1 to 64")
    name, read = base_config(recipe, [], prog).name, []
    for written, more in entries:
        with naming(flag, written):
            config, _ = read_config(recipe, [*words, *more], prog, switches)
        # The folder is that of all runs.
        read.append(Entry(written, replace(config, run=replace(config.run, out=None))))
    usual = f"runs/{command.split()[-1]}-{own.get('name', name)}"
    folder = user_path(own.get("out", usual), "--out")
    written = shlex.join([*command.split(), recipe, *words])
    return Comparison(read, seeds, Path(folder), written, jobs, flag)


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
