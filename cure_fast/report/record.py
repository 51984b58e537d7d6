"""Reads a run folder: configuration, metrics, results and examples, checked on the way in."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from cure_fast.config.checks import format_radius
from cure_fast.errors import InputError
from cure_fast.evaluation.attack_result import AttackResult
from cure_fast.evaluation.record import network_name
from cure_fast.methods import labels
from cure_fast.report.examples import Examples, read_examples
from cure_fast.report.text import without_folders
from cure_fast.runs.log import beside, rows_of

# Fields of config.json without which a page cannot say what was trained.
REQUIRED = (("data", "data"), ("model", "model"), ("attack", "eps"), ("optim", "epochs"))


# What an epoch's row holds of every run; the rest is of its policies.
COMMON = frozenset(
    {"event", "stage", "epoch", "step", "lr", "terms", "skipped", "micro_batch_size", "images"}
    | {"seconds", "images_per_s", "engine", "validation", "validation_seconds", "collapsed"}
    | {"gradients"}
)


class Reached(NamedTuple):
    """What a network reaches on the validation images, in percent."""

    natural: float | None
    robust: float | None


@dataclass(frozen=True)
class Epoch:
    """A finished epoch: learning rate, mean loss terms, speed, engine, validation in percent.

    Attributes:
        network: the run's result, which ``natural`` and ``robust`` are of, where that is another
            network than the trained one.
        fgsm: accuracy under one step, where the training attack has one.
        others: what networks beside the result reach, by name.
        collapsed: whether catastrophic overfitting was found in it.
        gradients: of the last step by layer, as :mod:`cure_fast.step.gradients` has them.
        numbers: what policies recorded, by name.
        by_tensor: the same where it is one number per tensor of the network.
    """

    stage: str
    epoch: int
    lr: float
    terms: dict[str, float]
    seconds: float | None = None
    validation_seconds: float | None = None
    images_per_s: float | None = None
    engine: str | None = None
    natural: float | None = None
    robust: float | None = None
    attack: str | None = None
    count: int | None = None
    network: str | None = None
    fgsm: float | None = None
    others: dict[str, Reached] = field(default_factory=dict)
    collapsed: bool = False
    gradients: dict[str, dict[str, float]] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)
    by_tensor: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """A logged step; ``epoch`` is the fractional number of epochs done before it."""

    stage: str
    epoch: float
    lr: float
    terms: dict[str, float]


@dataclass(frozen=True)
class ModelScores:
    """One model's scores by attack, and its harmonic means of natural and robust accuracy."""

    title: str
    attacks: dict[str, AttackResult]
    nrr: dict[str, float]


@dataclass(frozen=True)
class Results:
    """The content of ``results.json``."""

    classes: list[str]
    test_images: int
    eps: float
    paper: dict[str, Any] | None
    models: dict[str, ModelScores]
    warnings: list[str]
    network: str = "model"
    norm: str = "linf"

    @property
    def radius(self) -> str:
        """The radius of the attacks, as text."""
        return format_radius(self.eps, self.norm)

    @property
    def keys(self) -> list[str]:
        """Names of the networks in the order of comparison: start, result, its last, further."""
        order = {"start": 0, "trained": 1, "last": 2}
        return sorted(self.models, key=lambda key: order.get(key, len(order)))

    def name(self, key: str, label: str) -> str:
        """Return what a network of a run of the method that ``label`` names is called."""
        return network_name(key, label, self.network)

    @property
    def attacks(self) -> list[str]:
        """All attacks in the order they were run, each once."""
        return list(dict.fromkeys(a for model in self.models.values() for a in model.attacks))


@dataclass(frozen=True)
class Record:
    """Everything the page is made of; ``None`` where the file is not there."""

    folder: Path
    config: dict[str, Any]
    environment: dict[str, Any] | None
    epochs: list[Epoch]
    steps: list[Step]
    cut_off: bool
    results: Results | None
    examples: Examples | None = field(repr=False)

    @property
    def label(self) -> str:
        """Method and policies as papers write them; names that are not known as they are."""
        return labels(self.config["method"], self.config.get("policies") or ())

    def stage(self, name: str) -> list[Epoch]:
        """Return the finished epochs of a stage (``pretrain`` or ``train``)."""
        return [row for row in self.epochs if row.stage == name]

    @property
    def best(self) -> Epoch | None:
        """The epoch whose weights were kept: highest robust (else natural) validation accuracy."""
        rows = [row for row in self.stage("train") if row.natural is not None and not row.collapsed]
        return max(rows, key=_selected, default=None)

    @property
    def bests(self) -> dict[str, Epoch]:
        """The same for each network beside the result, by name."""
        rows = [row for row in self.stage("train") if not row.collapsed]
        names = dict.fromkeys(name for row in rows for name in row.others)
        return {
            name: max(
                (row for row in rows if name in row.others),
                key=lambda row, name=name: _selected(row.others[name]),
            )
            for name in names
        }


def _selected(row: Epoch | Reached) -> tuple[float, float]:
    natural = row.natural or 0.0
    return (natural if row.robust is None else row.robust, natural)


def read_record(folder: Path) -> Record:
    """Return the record of the run in ``folder``.

    Raises:
        InputError: if ``config.json`` or ``metrics.jsonl`` is missing, or any file is damaged.
    """
    config = _read_json(folder / "config.json")
    if config is None:
        raise InputError(
            f"{folder}: expected a run folder with config.json, found none. "
            "Name a folder that `cure-fast train` made."
        )
    _check_config(folder / "config.json", config)
    epochs, steps, cut_off = read_metrics(folder / "metrics.jsonl")
    results = _read_json(folder / "results.json")
    return Record(
        folder=folder,
        config=without_folders(config),
        environment=without_folders(_read_json(folder / "environment.json")),
        epochs=epochs,
        steps=steps,
        cut_off=cut_off,
        results=None
        if results is None
        else _results(folder / "results.json", without_folders(results)),
        examples=read_examples(folder / "examples.npz"),
    )


def _read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file, or ``None`` where there is no such file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(
            f"{path}: expected a JSON object, but reading it failed: {reason}. "
            "Name another run folder, or copy this one again."
        ) from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(value).__name__}.")
    return value


def _check_config(path: Path, config: Mapping[str, Any]) -> None:
    for name in ("name", "method"):
        _take(config, name, str, str(path))
    for section, name in REQUIRED:
        values = _take(config, section, dict, str(path))
        kind = str if section in ("data", "model") else float
        _take(values, name, kind, f"{path}, {section}")
    policies = _maybe(config, "policies", dict, str(path)) or {}
    for name in policies:
        _take(policies, name, dict, f"{path}, policies")


def _take(values: Mapping[str, Any], name: str, kind: type, where: str) -> Any:
    """Return ``values[name]`` of type ``kind`` (``float`` takes whole numbers), or raise."""
    value = values.get(name)
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise InputError(
            f"{where}: expected {name} as {kind.__name__}, got {value!r}. "
            "The file is damaged or from another version."
        )
    return value


def _maybe(values: Mapping[str, Any], name: str, kind: type, where: str) -> Any:
    """Return ``values[name]`` as ``kind``, or ``None`` where it is absent or null."""
    return None if values.get(name) is None else _take(values, name, kind, where)


def read_metrics(path: Path) -> tuple[list[Epoch], list[Step], bool]:
    """Return the epochs, the steps, and whether the last line was cut off (and left out).

    An epoch written twice, as a resumed run may do, counts once: the later row.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: expected the metrics of a run: {error.strerror}.") from error
    epochs: dict[tuple[str, int], Epoch] = {}
    steps: list[Step] = []
    for number, row in rows_of(path, content):
        where = f"{path}, line {number}"
        if row["event"] == "epoch":
            epoch = _epoch(row, where)
            epochs[epoch.stage, epoch.epoch] = epoch
        elif row["event"] == "step":
            epoch, lr = _take(row, "epoch", float, where), _take(row, "lr", float, where)
            steps.append(Step(row["stage"], epoch, lr, _terms(row, "terms", where)))
    return list(epochs.values()), steps, content[-1:] not in (b"", b"\n")


def _terms(row: Mapping[str, Any], name: str, where: str) -> dict[str, float]:
    values = _take(row, name, dict, where)
    return {term: float(_take(values, term, float, f"{where}, {name}")) for term in values}


def _epoch(row: Mapping[str, Any], where: str) -> Epoch:
    validation = _maybe(row, "validation", dict, where) or {}
    _maybe(validation, "networks", dict, where)
    others = beside(validation)
    for name in others:
        _take(others, name, dict, f"{where}, validation")
    gradients = _maybe(row, "gradients", dict, where) or {}
    numbers, by_tensor = _recorded(row, where)
    return Epoch(
        stage=_take(row, "stage", str, where),
        epoch=_take(row, "epoch", int, where),
        lr=_take(row, "lr", float, where),
        terms=_terms(row, "terms", where),
        seconds=_maybe(row, "seconds", float, where),
        validation_seconds=_maybe(row, "validation_seconds", float, where),
        images_per_s=_maybe(row, "images_per_s", float, where),
        engine=_maybe(row, "engine", str, where),
        natural=_maybe(validation, "natural", float, where),
        robust=_maybe(validation, "robust", float, where),
        attack=_maybe(validation, "attack", str, where),
        count=_maybe(validation, "count", int, where),
        network=_maybe(validation, "network", str, where),
        fgsm=_maybe(validation, "fgsm", float, where),
        others={
            name: Reached(*(_maybe(found, key, float, where) for key in Reached._fields))
            for name, found in others.items()
        },
        collapsed=_maybe(row, "collapsed", bool, where) or False,
        gradients={layer: _terms(gradients, layer, where) for layer in gradients},
        numbers=numbers,
        by_tensor=by_tensor,
    )


def _recorded(
    row: Mapping[str, Any], where: str
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Return the numbers that policies recorded, and those that there are one of per tensor."""
    numbers, by_tensor = {}, {}
    for name in row:
        if name in COMMON:
            continue
        if not isinstance(row[name], dict):
            if row[name] is not None:
                numbers[name] = float(_take(row, name, float, where))
            continue
        values = _terms(row, name, where)
        # Parameters lie in layers, whose names their own begin with.
        if values and all("." in key for key in values):
            by_tensor[name] = values
        else:
            numbers |= {f"{name} {key}": value for key, value in values.items()}
    return numbers, by_tensor


def _results(path: Path, values: dict[str, Any]) -> Results:
    where = str(path)
    if values.get("format") != 1:
        raise InputError(
            f"{path}: expected format 1, got {values.get('format')!r}. "
            "Evaluate the run again with this version: cure-fast eval."
        )
    models = _take(values, "models", dict, where)
    _take(models, "trained", dict, f"{where}, models")
    paper = _maybe(values, "paper", dict, where)
    if paper is not None:
        _take(paper, "row", str, f"{where}, paper")
    return Results(
        classes=[str(name) for name in _take(values, "classes", list, where)],
        test_images=_take(values, "test_images", int, where),
        eps=_take(values, "eps", float, where),
        paper=paper,
        models={n: _model(_take(models, n, dict, where), f"{where}, {n}") for n in models},
        warnings=[str(text) for text in values.get("warnings") or []],
        network=_maybe(values, "network", str, where) or "model",
        norm=_maybe(values, "norm", str, where) or "linf",
    )


def _model(values: dict[str, Any], where: str) -> ModelScores:
    attacks = _take(values, "attacks", dict, where)
    nrr = {k: _maybe(values, f, float, where) for k, f in (("C&W", "nrr_cw"), ("AA", "nrr_aa"))}
    return ModelScores(
        title=_take(values, "title", str, where),
        attacks={
            name: _score(name, _take(attacks, name, dict, where), f"{where}, {name}")
            for name in attacks
        },
        nrr={name: value for name, value in nrr.items() if value is not None},
    )


def _score(name: str, values: dict[str, Any], where: str) -> AttackResult:
    correct, count = _take(values, "correct", int, where), _take(values, "count", int, where)
    if not 0 <= correct <= count or count == 0:
        raise InputError(f"{where}: expected 0 <= correct <= count, got {correct} of {count}.")
    score = AttackResult(
        attack=name,
        correct=correct,
        count=count,
        seconds=_take(values, "seconds", float, where),
        precision=str(values.get("precision", "not recorded")),
        settings=_maybe(values, "settings", dict, where) or {},
        warnings=tuple(str(text) for text in values.get("warnings") or []),
        reliable=_take(values, "reliable", bool, where),
    )
    stated = _take(values, "accuracy", float, where)
    if not math.isclose(stated, score.accuracy, abs_tol=0.01):
        raise InputError(
            f"{where}: accuracy {stated:g} % contradicts {correct} of {count} images "
            f"({score.accuracy:.2f} %). Evaluate the run again."
        )
    return score
