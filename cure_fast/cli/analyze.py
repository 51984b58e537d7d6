"""``cure-fast analyze``: figures and numbers of runs and files of weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cure_fast import distributed
from cure_fast.analysis import Analysis, Settings
from cure_fast.analysis.shape import Result, Task, distinct, kept_for, subject_of, task_of
from cure_fast.cli.evaluate import Opened, opened_file, opened_folder, stoppable, threads_asked
from cure_fast.config.arguments import AnalyzeArgs
from cure_fast.console import say
from cure_fast.errors import InputError
from cure_fast.evaluation.record import main_settings
from cure_fast.files import user_path
from cure_fast.progress import Progress
from cure_fast.runs.environment import choose_device
from cure_fast.runs.folder import held, load_config
from cure_fast.runs.threads import threads

BUSY = "Wait for its end, or name another folder with --out."
DENIED = "Change that, or name another folder with --out."


def analyze_function(analysis: Analysis[Any]) -> Callable[..., None]:
    """Return what an analysis does with words and flags, as the command line takes it."""

    def of_networks(*targets: str, settings: Settings, args: AnalyzeArgs) -> None:
        """Write the figure as SVG, PNG and PDF, and its numbers as JSON and CSV.

        Args:
            targets: Run folders or files of weights.
            settings: Settings of the analysis.
            args: What to look at, and how.
        """
        run_analysis(analysis, [Path(target) for target in targets], settings, args)

    def of_runs(*targets: str, settings: Settings, out: str | None = None) -> None:
        """Write the figure as SVG, PNG and PDF, and its numbers as JSON and CSV.

        Args:
            targets: Run folders.
            settings: Settings of the analysis.
            out: Folder for figure and numbers; None takes the folder analysis of the first run,
                whose report shows them too.
        """
        run_analysis(analysis, [Path(target) for target in targets], settings, AnalyzeArgs(out=out))

    analyze = of_runs if analysis.of_runs else of_networks
    # Its own settings are its own flags.
    analyze.__annotations__["settings"] = type(analysis.settings)
    return analyze


def run_analysis(
    analysis: Analysis[Any],
    paths: Sequence[Path],
    settings: Settings,
    args: AnalyzeArgs,
    opened: Sequence[Opened] = (),
) -> Result:
    """Compute, draw, write and return an analysis; the first run's report shows it from then on.

    ``opened`` is what the paths were opened as, where that has been done.

    Raises:
        InputError: for runs, files or settings that do not fit, before anything is written.
        StoppedError: after a signal; the same command goes on from there.
    """
    analysis.check_count(len(paths))
    if not analysis.of_runs:
        opened = opened or [open_one(path, args) for path in paths]
    with stoppable(analysis.name, kept=True) as stop:
        if analysis.of_runs:
            task, threads_wanted = runs_alone(paths), 1
        else:
            task, threads_wanted = networks(analysis, opened, args)
        out, first = folder_for(paths[0], args), task.subjects[0].folder
        # A run's own folder is written to by one process at a time.
        own = first if first and out.resolve().is_relative_to(first.resolve()) else None
        alone = partial(held, own, busy=BUSY, denied=DENIED) if own else nullcontext
        with distributed.first_in(alone), threads(threads_wanted), Progress() as progress:
            kept = kept_for(out, analysis, settings, task, stop=stop, progress=progress)
            result = analysis.run(replace(task, kept=kept), settings)
            written = distributed.first(lambda: save(result, out, own))
        for path in written:
            say(f"{'report' if path.suffix == '.html' else analysis.name}: {path}")
    return result


def save(result: Result, out: Path, run: Path | None) -> list[Path]:
    """Write the result, and the report of the run that it is of; return the files."""
    written = result.save(out)
    if run is None:
        return written
    from cure_fast.report import write_report

    return [*written, write_report(run)]


def folder_for(path: Path, args: AnalyzeArgs) -> Path:
    """Return where the results of an analysis of this run or file go."""
    if args.out is not None:
        return user_path(args.out, "--out")
    return path / "analysis" if path.is_dir() else path.with_name(f"{path.stem}-analysis")


def runs_alone(paths: Sequence[Path]) -> Task:
    """Return the task of an analysis that reads the files of runs."""
    for path in paths:
        # Says what is wrong with a folder that is no run's.
        load_config(path)
    return Task(subjects=distinct([subject_of(path, None) for path in paths]))


def networks(
    analysis: Analysis[Any], opened: Sequence[Opened], args: AnalyzeArgs
) -> tuple[Task, int]:
    """Return the task of an analysis of networks, and how many threads to compute with."""
    first = opened[0]
    for other in opened[1:]:
        same = (other.config.data.data, other.test.image_size, len(other.test.classes))
        own = (first.config.data.data, first.test.image_size, len(first.test.classes))
        if same != own:
            raise InputError(
                f"{other.path}: expected a network of the same images as {first.path} "
                f"({described(own)}), got one of {described(same)}. Leave one of them out."
            )
    balls = [{k: main_settings(each.config)[k] for k in ("eps", "norm")} for each in opened]
    if args.eps is None and any(ball != balls[0] for ball in balls):
        told = ", ".join(
            f"{each.path} {b['eps']:.4g} in {b['norm']}"
            for each, b in zip(opened, balls, strict=True)
        )
        raise InputError(
            f"--eps: expected it with runs that are evaluated within different balls, got {told}."
        )
    count = len(first.test) if args.limit == "all" else args.limit or analysis.images
    test, device = (
        first.test.subset(np.arange(min(count, len(first.test)))),
        choose_device(distributed.device_name(args.device)),
    )
    subjects = distinct([subject_of(o.path, o.model.to(device).eval()) for o in opened])
    task = task_of(subjects, test, first.config, device)
    return task, threads_asked(args, first.model, test, first.config.eval)


def open_one(path: Path, args: AnalyzeArgs) -> Opened:
    """Return the network of a run, or in a file, with its images and attacks."""
    # Where an analysis writes says nothing of what it opens.
    return (opened_folder if path.is_dir() else opened_file)(path, replace(args, out=None))


def described(images: tuple[str, int, int]) -> str:
    """Return what a data set is, its images' size and number of classes in words."""
    name, size, classes = images
    return f"{name}, {size} pixels, {classes} classes"
