"""Methods under one budget: each trained with several seeds, or taken over where it is finished."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cure_fast.config import Config
from cure_fast.console import say, warn
from cure_fast.errors import (
    CureFastError,
    DivergedError,
    InputError,
    MemoryExhaustedError,
    StoppedError,
)
from cure_fast.evaluation.record import main_settings, same_settings, stored_record
from cure_fast.files import file_hash
from cure_fast.models.weights import WEIGHTS_FILE
from cure_fast.runs.checkpoint import has_checkpoints
from cure_fast.runs.environment import choose_device
from cure_fast.runs.folder import LOCK, changes_to, held, is_free
from cure_fast.runs.log import read_rows
from cure_fast.signals import StopSignals
from cure_fast.training.job import check_network, train
from cure_fast.training.side_by_side import several_gpus, train_side_by_side
from cure_fast.training.teachers import sources

# Fields that decide what is measured, in which all that is compared is equal.
MEASURED = ("attacks", "restarts", "limit", "aa_limit", "eval_batch_size")


@dataclass(frozen=True)
class Entry:
    """What is compared: its name as it was written, and its configuration for any seed."""

    name: str
    config: Config

    @property
    def slug(self) -> str:
        """What its run folders begin with."""
        return re.sub(r"[^A-Za-z0-9.+_]+", "-", self.name).strip("-")


@dataclass(frozen=True)
class Comparison:
    """Entries, each trained with each of the seeds, and the folder of all runs.

    Attributes:
        command: the command line, for the record.
        jobs: how many runs are trained at once, each in a process of its own where that is more
            than one; None takes one per GPU where there are several, else 1.
        flag: what names the entries, for messages.
    """

    entries: Sequence[Entry]
    seeds: Sequence[int]
    folder: Path
    command: str = ""
    jobs: int | None = None
    flag: str = "--methods"

    def run_folder(self, entry: Entry, seed: int) -> Path:
        """Return where an entry's run with the seed is."""
        return self.folder / f"{entry.slug}-s{seed}"

    def config(self, entry: Entry, seed: int) -> Config:
        """Return the configuration of an entry's run with the seed."""
        run = replace(entry.config.run, seed=seed, out=str(self.run_folder(entry, seed)))
        return replace(entry.config, run=run)

    def runs(self) -> list[tuple[Entry, int]]:
        """Return all runs, every entry with a seed before any with the next."""
        return [(entry, seed) for seed in self.seeds for entry in self.entries]


def compare(comparison: Comparison, stop: StopSignals | None = None) -> None:
    """Train and evaluate what is not finished yet, and write the tables after each run.

    Raises:
        InputError: if entries or folders do not fit, before anything is written.
        StoppedError: after a signal; called again it goes on from there.
        DivergedError, MemoryExhaustedError: at the end, if a run ended so; the others are done.
    """
    if stop is None:
        with StopSignals() as stop:
            return compare(comparison, stop)
    check_comparison(comparison)
    folder = comparison.folder
    anew = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {folder}: cannot make the folder: {error.strerror}.") from error
    busy = "Wait for its end, or name another folder with --out."
    denied = "Change that, or name another folder with --out."
    try:
        with held(folder, busy=busy, denied=denied):
            failures = train_all(comparison, stop)
    except InputError:
        # What is wrong with its first run is seen when that begins, and leaves nothing either.
        if anew and [path.name for path in folder.iterdir()] == [LOCK]:
            shutil.rmtree(folder)
        raise
    if failures:
        told = [f"{name} with seed {seed}" for name, seed in failures]
        raise type(next(iter(failures.values())))(
            f"{len(told)} of {len(comparison.runs())} runs ended without a result: "
            f"{', '.join(told)}. {folder / 'comparison.md'} says why and has the others."
        )


def train_all(comparison: Comparison, stop: StopSignals) -> dict[tuple[str, int], CureFastError]:
    """Train and evaluate each run that is not finished, and write the tables after it.

    Returns:
        What ended a run without a result, by entry and seed.
    """
    # Drawing takes what training does not.
    from cure_fast.report.comparison import Entrant, write_comparison
    from cure_fast.report.record import read_record

    entrants = {entry.name: Entrant(entry.name, entry.config) for entry in comparison.entries}
    failures: dict[tuple[str, int], CureFastError] = {}
    jobs = comparison.jobs or max(1, len(several_gpus(comparison.entries[0].config)))
    ended = train_unfinished(comparison, jobs, stop) if jobs > 1 else {}
    for number, (entry, seed) in enumerate(comparison.runs(), start=1):
        folder, config = comparison.run_folder(entry, seed), comparison.config(entry, seed)
        told = f"run {number} of {len(comparison.runs())}: {entry.name}, seed {seed}"
        finished = is_finished(folder, config)
        say(f"{told}: finished earlier, in {folder}" if finished else told)
        try:
            if stop():
                raise StoppedError("stopped by a signal")
            if (error := ended.get(folder.name)) is not None:
                raise error
            if not finished:
                train(config, resume=not is_free(folder), stop=stop)
            entrants[entry.name].records[seed] = read_record(folder)
        except StoppedError as error:
            raise StoppedError(
                f"stopped at {entry.name}, seed {seed}; the same command goes on from there."
            ) from error
        except (DivergedError, MemoryExhaustedError) as error:
            failures[entry.name, seed] = error
            entrants[entry.name].failures[seed] = str(error)
            warn(f"{entry.name}, seed {seed}: {error}")
        if not finished or number == len(comparison.runs()):
            write_comparison(comparison.folder, [*entrants.values()], comparison.command)
    say(f"comparison: {comparison.folder / 'comparison.md'}")
    return failures


def train_unfinished(
    comparison: Comparison, jobs: int, stop: StopSignals
) -> dict[str, CureFastError]:
    """Train and evaluate what is not finished, several runs at once.

    Returns:
        What ended a run without a result, by the name of its folder.
    """
    runs = {}
    for entry, seed in comparison.runs():
        folder, config = comparison.run_folder(entry, seed), comparison.config(entry, seed)
        if not is_finished(folder, config):
            runs[folder.name] = config
    return train_side_by_side(runs, jobs, stop)


def check_comparison(comparison: Comparison) -> None:
    """Raise ``InputError`` where something is wrong that can be seen before training."""
    entries, folder = comparison.entries, comparison.folder
    for place, entry in enumerate(entries):
        for other in entries[:place]:
            if other.slug == entry.slug or other.config == entry.config:
                raise InputError(
                    f"{comparison.flag}: expected entries that differ in method, policies or "
                    f"flags, and in the name of their folders, got {other.name!r} and "
                    f"{entry.name!r}. Leave one of them out."
                )
        if differing := other_measure(entries[0].config, entry.config):
            raise InputError(
                f"{comparison.flag}: expected entries that are evaluated alike, got "
                f"{entry.name!r} with another {', '.join(differing)} than "
                f"{entries[0].name!r}. Set it for all of them, outside of {comparison.flag}."
            )
        choose_device(entry.config.run.device)
        sources(entry.config)
        check_network(entry.config)
    if (folder / "config.json").exists() or (folder.exists() and not folder.is_dir()):
        raise InputError(
            f"--out {folder}: expected a folder for the runs of a comparison, got "
            f"{'the folder of a run' if folder.is_dir() else 'a file'}. Name another."
        )
    check_tables(folder, comparison.command)
    for entry, seed in comparison.runs():
        check_run(comparison.run_folder(entry, seed), comparison.config(entry, seed))


def check_tables(folder: Path, command: str) -> None:
    """Raise ``InputError`` if the folder has tables that are not of this study, or comparison."""
    page = folder / "comparison.md"
    if not page.exists():
        return
    kind = re.compile(r"^`?cure-fast (study \S+|compare|sweep)\b", re.MULTILINE)
    own, found = kind.search(command), kind.search(page.read_text("utf-8", "replace"))
    if own and found and own[1] != found[1]:
        raise InputError(
            f"--out {folder}: expected no tables but those of cure-fast {own[1]}, got those of "
            f"cure-fast {found[1]}. Name another folder."
        )


def check_run(folder: Path, config: Config) -> None:
    """Raise ``InputError`` if a run that is there cannot be taken over into the comparison."""
    if is_free(folder):
        return
    if changes := changes_to(folder, config):
        raise InputError(
            f"{folder}: expected a run of this configuration, got one with another: "
            f"{'; '.join(changes.values())}. Repeat the flags that it was made with, or name "
            "another folder with --out."
        )
    if (
        is_trained(folder, config)
        and has_checkpoints(folder / "checkpoints")
        and not (folder / WEIGHTS_FILE).exists()
    ):
        # No later epoch would write them.
        raise InputError(
            f"{folder}: expected {WEIGHTS_FILE} of a run that is trained to its end, got none. "
            "Delete the folder, and the same command trains it again."
        )
    record = stored_record(folder / "results.json") or {"models": {}, "test_images": 0}
    results = record["models"].get("trained", {"attacks": {}})["attacks"]
    for attack, count in counts_asked(config, record["test_images"]).items():
        if attack in results and results[attack]["count"] > count:
            raise InputError(
                f"{folder}: expected {attack} on {count:,} test images as for all, got results on "
                f"{results[attack]['count']:,}. Take a higher --limit and --aa-limit."
            )


def other_measure(first: Config, second: Config) -> list[str]:
    """Return the names of what two configurations measure differently."""
    found = ["data"] * (first.data.data != second.data.data)
    found += [name for name in MEASURED if getattr(first.eval, name) != getattr(second.eval, name)]
    ours, theirs = main_settings(first), main_settings(second)
    return found + [
        f"eval_{name}" for name in ("eps", "norm", "step_size") if ours[name] != theirs[name]
    ]


def counts_asked(config: Config, test_images: int) -> dict[str, int]:
    """Return on how many of the test images each attack is asked for."""
    limit = min(config.eval.limit or test_images, test_images)
    counts = dict.fromkeys(config.eval.attacks, limit)
    if "aa" in counts:
        counts["aa"] = min(config.eval.aa_limit or limit, limit)
    return counts


def is_trained(folder: Path, config: Config) -> bool:
    """Return whether a run has recorded its last epoch."""
    rows = read_rows(folder / "metrics.jsonl")
    epochs = [r["epoch"] for r in rows if (r["event"], r["stage"]) == ("epoch", "train")]
    return max(epochs, default=0) >= config.optim.epochs


def is_finished(folder: Path, config: Config) -> bool:
    """Return whether a run has trained its last epoch and has all results that are asked for."""
    record, weights = stored_record(folder / "results.json"), folder / WEIGHTS_FILE
    if record is None or not weights.exists():
        return False
    trained = record["models"].get("trained", {"attacks": {}})
    return (
        is_trained(folder, config)
        and same_settings(record, main_settings(config))
        and trained.get("weights") == file_hash(weights)
        and set(config.eval.networks) <= record["models"].keys()
        and all(
            trained["attacks"].get(attack, {"count": 0})["count"] >= count
            for attack, count in counts_asked(config, record["test_images"]).items()
        )
    )
