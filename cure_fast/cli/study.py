"""``cure-fast study``: lists of runs under one budget, each with a figure."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from cure_fast.analysis.kept import Kept, identity_of
from cure_fast.analysis.shape import Result, Settings
from cure_fast.cli.compare import GIVEN, comparison_of, given_to_all, seeds_of
from cure_fast.cli.configure import read_config
from cure_fast.cli.flags import parameters
from cure_fast.config import Config
from cure_fast.config.checks import check
from cure_fast.console import say
from cure_fast.errors import InputError
from cure_fast.files import user_path
from cure_fast.progress import Progress
from cure_fast.training.compare import Comparison
from cure_fast.training.studies import STUDIES, Study
from cure_fast.training.studies.shape import run_alone, run_study


def of_runs(recipe: str = "quickstart", *, seeds: int = 1, jobs: int | None = None) -> None:
    """Train the runs under one budget, and draw what they recorded.

    Called again it goes on where it stopped.

    Args:
        recipe: Name of a recipe (see `cure-fast list`), a run folder or a configuration file.
        seeds: Number of seeds, 1 or more: 0, 1, 2 and so on.
        jobs: Runs at once, 1 or more, each in a process of its own; None takes one per GPU where
            there are several, else 1.
    """


def alone_function(study: Study) -> Callable[..., None]:
    """Return what a study without runs does with flags, as the command line takes it."""

    def alone(
        *, settings: Settings, seeds: int = study.seeds, out: str = f"runs/{study.name}"
    ) -> None:
        """Compute it, and write figure and numbers.

        Args:
            settings: Settings of the study.
            seeds: Number of seeds, 1 or more: 0, 1, 2 and so on.
            out: Folder for figure and numbers.
        """
        run_without_runs(study, settings, seeds, out)

    # Its own settings are its own flags.
    alone.__annotations__["settings"] = type(study.settings)
    return alone


def check_folder(study: Study, folder: Path) -> None:
    """Raise ``InputError`` if the folder has the numbers of another study."""
    for other in STUDIES:
        if other != study.name and (folder / f"{other}.json").exists():
            raise InputError(
                f"--out {folder}: expected a folder for {study.name} alone, got one that holds "
                f"{other}.json. Name another."
            )


def run_without_runs(study: Study, settings: Settings, seeds: int, out: str) -> None:
    """Compute, draw and write a study without runs."""
    check(0 < seeds <= 1000, "seeds", seeds, "a number from 1 to 1000")
    folder = Path(user_path(out, "--out"))
    check_folder(study, folder)
    identity = identity_of({"study": study.name, "settings": vars(settings)})
    with Progress() as progress:
        kept = Kept(folder / "parts" / f"{study.name}-{identity}.json", progress=progress)
        result = run_alone(study, settings, seeds, kept)
    tell(result, folder)


def read_study(study: Study, recipe: str, words: Sequence[str]) -> tuple[Comparison, Config]:
    """Return the runs of a study, and the configuration that they share.

    Flags after the recipe are for all runs; those of an entry count where both give one.
    """
    switches = {k: v for k, v in parameters(of_runs).items() if k != "recipe"}
    command = f"cure-fast study {study.name}"
    own = given_to_all(command, words, switches)
    for given in (given for given in GIVEN if given in own):
        raise InputError(
            f"--{given}: expected none, as each run of a study has its own, and --seeds N says "
            "how many seeds. Leave it out."
        )
    method = ["--method", study.method]
    base, _ = read_config(recipe, [*words, *method], f"{command} {recipe}", switches)
    # The folder is that of the study.
    base = replace(base, run=replace(base.run, out=None))
    assert study.entries is not None
    entries = [(name, [*method, *shlex.split(own)]) for name, own in study.entries(base).items()]
    seeds = seeds_of(own, study.seeds)
    return comparison_of(entries, command, recipe, words, switches, seeds, study.name), base


def run_runs(study: Study, comparison: Comparison, base: Config) -> None:
    """Train, draw and write a study of runs."""
    check_folder(study, comparison.folder)
    tell(run_study(study, comparison, base), comparison.folder)


def tell(result: Result, folder: Path) -> None:
    """Write figure and numbers, and say where they are."""
    for path in result.save(folder):
        say(f"{result.analysis.name}: {path}")
