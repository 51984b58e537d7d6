"""The one shape of all studies: runs under one budget, and a figure of what they recorded."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import mean
from typing import TYPE_CHECKING, Any

from cure_fast.analysis.kept import Kept, identity_of
from cure_fast.analysis.shape import Numbers, Result, Settings
from cure_fast.config import Config
from cure_fast.config.attack_names import parse_attack
from cure_fast.config.values import to_dict
from cure_fast.errors import InputError, StoppedError
from cure_fast.files import file_hash
from cure_fast.models.weights import WEIGHTS_FILE
from cure_fast.progress import Progress
from cure_fast.runs.folder import changes_to, is_free
from cure_fast.runs.threads import threads
from cure_fast.signals import StopSignals
from cure_fast.training.compare import Comparison, compare, is_finished

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from cure_fast.report.record import Record
    from cure_fast.runs.epochs import Epoch

FORMAT = 1
# What papers print of a network, in the order in which studies quote them.
PRINTED = ("natural", "pgd20", "cw20", "aa")


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a study computes on.

    Attributes:
        records: of each entry, by its name, the finished runs in the order of the seeds.
        config: what all entries share; None for a study without runs.
        settings: the study's own.
        seeds: how many seeds there are, from 0.
        kept: where finished parts are of what the study itself computes.
    """

    records: Mapping[str, Sequence[Record]] = field(default_factory=dict)
    config: Config | None = None
    settings: Settings = field(default_factory=Settings)
    seeds: int = 1
    kept: Kept = field(default_factory=Kept)

    @property
    def attack(self) -> str:
        """The attack that figures show beside natural accuracy."""
        assert self.config is not None
        return shown_attack(self.config)

    def row(self, entry: str, network: str = "trained", **more: Any) -> dict[str, Any]:
        """Return the row of a network of an entry's runs: means and deviations over seeds, in %."""
        assert self.config is not None
        from cure_fast.report.comparison import deviation

        row: dict[str, Any] = {"entry": entry, "network": network, **more}
        for attack in self.config.eval.attacks:
            values = [
                record.results.models[network].attacks[attack].accuracy
                for record in self.records[entry]
                if record.results is not None
            ]
            row |= {attack: mean(values), f"{attack}_std": deviation(values)}
        return row

    def by_epoch(
        self, entry: str, number: Callable[[Epoch], float | None]
    ) -> dict[str, list[float]]:
        """Return a number of an entry's epochs, where there is one, as a mean over seeds."""
        runs = [
            {row.epoch: value for row in run.stage("train") if (value := number(row)) is not None}
            for run in self.records[entry]
        ]
        epochs = sorted(set.intersection(*({*run} for run in runs)))
        return {"epochs": epochs, "values": [mean(run[epoch] for run in runs) for epoch in epochs]}


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study as a record of functions.

    Attributes:
        name: what ``cure-fast study`` takes.
        title: one line for its list.
        source: the figure or table that it is after.
        about: what the figure shows, and in what it differs from the paper's.
        compute: from what is found to numbers of JSON types with ``rows``, the table.
        draw: from these alone to a figure.
        method: whose configuration all entries start from.
        entries: from that to the flags of each entry, as one writes them, by its name; raises
            ``InputError`` where it does not fit. None for a study that trains what is no run.
        settings: of a study without runs.
        seeds: usual number of seeds.
    """

    name: str
    title: str
    source: str
    about: str
    compute: Callable[[Found], Numbers]
    draw: Callable[[Numbers], Figure]
    method: str = "cure"
    entries: Callable[[Config], Mapping[str, str]] | None = None
    settings: Settings = field(default_factory=Settings)
    seeds: int = 1

    def run(self, found: Found) -> Result:
        """Return what the study finds."""
        header: dict[str, Any] = {
            "format": FORMAT,
            "study": self.name,
            "title": self.title,
            "source": self.source,
            "about": self.about,
            "subjects": [{"name": name, "method": "", "origin": ""} for name in found.records],
            "seeds": found.seeds,
        }
        if found.config is None:
            header["settings"] = vars(found.settings)
        else:
            header |= {"attack": found.attack, "config": to_dict(found.config)}
        # As they are read again: what is drawn now is what is drawn from the file.
        return Result(self, json.loads(json.dumps(header | self.compute(found))))


def shown_attack(config: Config) -> str:
    """Return the attack that figures show: the PGD of most steps, else the first that there is.

    Raises:
        InputError: where natural accuracy or an attack is not measured.
    """
    attacks = [name for name in config.eval.attacks if name != "natural"]
    if not attacks or "natural" not in config.eval.attacks:
        raise InputError(
            f"--attacks: expected natural and an attack, got {','.join(config.eval.attacks)}. Name "
            "both, such as natural,pgd20."
        )
    pgd = [name for name in attacks if name.startswith("pgd") and not name.endswith("-t")]
    return max(pgd, key=lambda name: parse_attack(name).steps, default=attacks[0])


def begins_naturally(config: Config) -> None:
    """Raise ``InputError`` where runs do not begin with a trained network."""
    if config.model.init_from is None and not config.pretrain.pretrain_epochs:
        raise InputError(
            "--pretrain-epochs: expected at least one, as the study begins with a naturally "
            "trained network, got 0. Or name one with --init-from."
        )


def run_study(study: Study, comparison: Comparison, base: Config) -> Result:
    """Train what is not finished, and write tables and the figure into the comparison's folder.

    Raises:
        InputError: if something does not fit, before anything is trained.
        StoppedError: after a signal; the same command goes on from there.
        DivergedError, MemoryExhaustedError: if a run ended so; then there is no figure.
    """
    shown_attack(base)
    with StopSignals() as stop:
        compare(comparison, stop)
        records = collected(comparison)
        runs = [record.folder for own in records.values() for record in own]
        weights = [file_hash(folder / WEIGHTS_FILE) for folder in runs]
        identity = identity_of({"study": study.name, "config": to_dict(base), "weights": weights})
        path = comparison.folder / "parts" / f"{study.name}-{identity}.json"
        # Each run has had a bar of its own, and a terminal has one at a time.
        with Progress() as progress:
            kept = Kept(path, stop=stop, progress=progress)
            found = Found(records=records, config=base, seeds=len(comparison.seeds), kept=kept)
            return finished(study, found)


def collected(comparison: Comparison) -> dict[str, list[Record]]:
    """Return the runs of each entry in the order of the seeds.

    Raises:
        InputError: for a run that is missing, unfinished, or of another configuration.
    """
    from cure_fast.report.record import read_record

    found: dict[str, list[Record]] = {entry.name: [] for entry in comparison.entries}
    for entry, seed in comparison.runs():
        folder, config = comparison.run_folder(entry, seed), comparison.config(entry, seed)
        changes = {} if is_free(folder) else changes_to(folder, config)
        if changes or not is_finished(folder, config):
            got = f"another: {'; '.join(changes.values())}" if changes else "none that is finished"
            raise InputError(
                f"{folder}: expected the finished run of {entry.name!r} with seed {seed}, got "
                f"{got}. The study's command trains it."
            )
        found[entry.name].append(read_record(folder))
    return found


def run_alone(study: Study, settings: Settings, seeds: int, kept: Kept) -> Result:
    """Compute a study without runs; raise ``StoppedError`` after a signal."""
    # What is computed there is too small for more than one thread.
    with StopSignals() as stop, threads(1):
        return finished(study, Found(settings=settings, seeds=seeds, kept=replace(kept, stop=stop)))


def finished(study: Study, found: Found) -> Result:
    """Return what the study finds; raise ``StoppedError``, with what helps, after a signal."""
    try:
        return study.run(found)
    except StoppedError as error:
        raise StoppedError(f"{study.name} {error}; the same command continues it.") from error
