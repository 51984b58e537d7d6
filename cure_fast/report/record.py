"""Reads a run folder: configuration, metrics, results and examples, checked on the way in."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cure_fast.errors import InputError
from cure_fast.report.examples import Examples, read_examples

# Fields of config.json without which a page cannot say what was trained.
REQUIRED = (("data", "data"), ("model", "model"), ("attack", "eps"), ("optim", "epochs"))


@dataclass(frozen=True)
class Epoch:
    """A finished epoch: learning rate, mean loss terms, speed, engine, validation in percent."""

    stage: str
    epoch: int
    lr: float
    terms: dict[str, float]
    seconds: float | None = None
    images_per_s: float | None = None
    engine: str | None = None
    natural: float | None = None
    robust: float | None = None
    attack: str | None = None
    count: int | None = None
    updated: dict[str, float] | None = None
    moves: int | None = None


@dataclass(frozen=True)
class Step:
    """A logged step; ``epoch`` is the fractional number of epochs done before it."""

    stage: str
    epoch: float
    lr: float
    terms: dict[str, float]


@dataclass(frozen=True)
class Score:
    """What one attack left of one model: ``correct`` of ``count`` test images."""

    attack: str
    correct: int
    count: int
    seconds: float | None
    precision: str
    settings: dict[str, Any]
    warnings: list[str]
    reliable: bool

    @property
    def accuracy(self) -> float:
        """Accuracy in percent."""
        return 100 * self.correct / self.count


@dataclass(frozen=True)
class ModelScores:
    """One model's scores by attack, and its harmonic means of natural and robust accuracy."""

    title: str
    attacks: dict[str, Score]
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

    def stage(self, name: str) -> list[Epoch]:
        """Return the finished epochs of a stage (``pretrain`` or ``train``)."""
        return [row for row in self.epochs if row.stage == name]

    @property
    def best(self) -> Epoch | None:
        """The epoch whose weights were kept: highest robust (else natural) validation accuracy."""
        rows = [row for row in self.stage("train") if row.natural is not None]
        return max(rows, key=_selected, default=None)


def _selected(row: Epoch) -> tuple[float, float]:
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
        config=config,
        environment=_read_json(folder / "environment.json"),
        epochs=epochs,
        steps=steps,
        cut_off=cut_off,
        results=None if results is None else _results(folder / "results.json", results),
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

    Raises:
        InputError: if the file is missing or a line other than the last is damaged.
    """
    try:
        lines = path.read_bytes().rstrip().split(b"\n")
    except OSError as error:
        raise InputError(f"{path}: expected the metrics of a run: {error.strerror}.") from error
    epochs: dict[tuple[str, int], Epoch] = {}
    steps: list[Step] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                return list(epochs.values()), steps, True
            raise InputError(f"{where}: expected one JSON object per line: {error}.") from error
        if not isinstance(row, dict):
            raise InputError(f"{where}: expected a JSON object, got {row!r}.")
        if row.get("event") == "epoch":
            epoch = _epoch(row, where)
            epochs[epoch.stage, epoch.epoch] = epoch
        elif row.get("event") == "step":
            steps.append(_step(row, where))
    return list(epochs.values()), steps, False


def _terms(row: Mapping[str, Any], name: str, where: str) -> dict[str, float]:
    values = _take(row, name, dict, where)
    return {term: float(_take(values, term, float, f"{where}, {name}")) for term in values}


def _step(row: Mapping[str, Any], where: str) -> Step:
    return Step(
        stage=_take(row, "stage", str, where),
        epoch=_take(row, "epoch", float, where),
        lr=_take(row, "lr", float, where),
        terms=_terms(row, "terms", where),
    )


def _epoch(row: Mapping[str, Any], where: str) -> Epoch:
    validation = _maybe(row, "validation", dict, where) or {}
    revision = _maybe(row, "revision", dict, where) or {}
    return Epoch(
        stage=_take(row, "stage", str, where),
        epoch=_take(row, "epoch", int, where),
        lr=_take(row, "lr", float, where),
        terms=_terms(row, "terms", where),
        seconds=_maybe(row, "seconds", float, where),
        images_per_s=_maybe(row, "images_per_s", float, where),
        engine=_maybe(row, "engine", str, where),
        natural=_maybe(validation, "natural", float, where),
        robust=_maybe(validation, "robust", float, where),
        attack=_maybe(validation, "attack", str, where),
        count=_maybe(validation, "count", int, where),
        updated=None if row.get("updated") is None else _terms(row, "updated", where),
        moves=_maybe(revision, "moves", int, where),
    )


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
        models={
            name: _model(_take(models, name, dict, where), f"{where}, {name}") for name in models
        },
        warnings=[str(text) for text in values.get("warnings") or []],
    )


def _model(values: dict[str, Any], where: str) -> ModelScores:
    attacks = _take(values, "attacks", dict, where)
    nrr = {
        "C&W": _maybe(values, "nrr_cw", float, where),
        "AA": _maybe(values, "nrr_aa", float, where),
    }
    return ModelScores(
        title=_take(values, "title", str, where),
        attacks={
            name: _score(name, _take(attacks, name, dict, where), f"{where}, {name}")
            for name in attacks
        },
        nrr={name: value for name, value in nrr.items() if value is not None},
    )


def _score(name: str, values: dict[str, Any], where: str) -> Score:
    correct, count = _take(values, "correct", int, where), _take(values, "count", int, where)
    if not 0 <= correct <= count or count == 0:
        raise InputError(f"{where}: expected 0 <= correct <= count, got {correct} of {count}.")
    score = Score(
        attack=name,
        correct=correct,
        count=count,
        seconds=_maybe(values, "seconds", float, where),
        precision=str(values.get("precision", "not recorded")),
        settings=_maybe(values, "settings", dict, where) or {},
        warnings=[str(text) for text in values.get("warnings") or []],
        reliable=_take(values, "reliable", bool, where),
    )
    stated = _take(values, "accuracy", float, where)
    if not math.isclose(stated, score.accuracy, abs_tol=0.01):
        raise InputError(
            f"{where}: accuracy {stated:g} % contradicts {correct} of {count} images "
            f"({score.accuracy:.2f} %). Evaluate the run again."
        )
    return score
