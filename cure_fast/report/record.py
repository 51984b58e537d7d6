"""Reads a run folder: configuration, metrics, results and examples, checked on the way in."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cure_fast.config.checks import format_radius
from cure_fast.errors import InputError
from cure_fast.evaluation.attack_result import AttackResult
from cure_fast.evaluation.record import network_name
from cure_fast.methods import labels
from cure_fast.report.examples import Examples, read_examples
from cure_fast.report.text import without_folders
from cure_fast.runs.epochs import Curves, Step, maybe, read_metrics, take

# Fields of config.json without which a page cannot say what was trained.
REQUIRED = (("data", "data"), ("model", "model"), ("attack", "eps"), ("optim", "epochs"))


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
class Record(Curves):
    """Everything the page is made of; ``None`` where the file is not there."""

    config: dict[str, Any]
    environment: dict[str, Any] | None
    steps: list[Step]
    cut_off: bool
    results: Results | None
    examples: Examples | None = field(repr=False)

    @property
    def label(self) -> str:
        """Method and policies as papers write them; names that are not known as they are."""
        return labels(self.config["method"], self.config.get("policies") or ())


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
        take(config, name, str, str(path))
    for section, name in REQUIRED:
        values = take(config, section, dict, str(path))
        kind = str if section in ("data", "model") else float
        take(values, name, kind, f"{path}, {section}")
    policies = maybe(config, "policies", dict, str(path)) or {}
    for name in policies:
        take(policies, name, dict, f"{path}, policies")


def _results(path: Path, values: dict[str, Any]) -> Results:
    where = str(path)
    if values.get("format") != 1:
        raise InputError(
            f"{path}: expected format 1, got {values.get('format')!r}. "
            "Evaluate the run again with this version: cure-fast eval."
        )
    models = take(values, "models", dict, where)
    take(models, "trained", dict, f"{where}, models")
    paper = maybe(values, "paper", dict, where)
    if paper is not None:
        take(paper, "row", str, f"{where}, paper")
    return Results(
        classes=[str(name) for name in take(values, "classes", list, where)],
        test_images=take(values, "test_images", int, where),
        eps=take(values, "eps", float, where),
        paper=paper,
        models={n: _model(take(models, n, dict, where), f"{where}, {n}") for n in models},
        warnings=[str(text) for text in values.get("warnings") or []],
        network=maybe(values, "network", str, where) or "model",
        norm=maybe(values, "norm", str, where) or "linf",
    )


def _model(values: dict[str, Any], where: str) -> ModelScores:
    attacks = take(values, "attacks", dict, where)
    nrr = {k: maybe(values, f, float, where) for k, f in (("C&W", "nrr_cw"), ("AA", "nrr_aa"))}
    return ModelScores(
        title=take(values, "title", str, where),
        attacks={
            name: _score(name, take(attacks, name, dict, where), f"{where}, {name}")
            for name in attacks
        },
        nrr={name: value for name, value in nrr.items() if value is not None},
    )


def _score(name: str, values: dict[str, Any], where: str) -> AttackResult:
    correct, count = take(values, "correct", int, where), take(values, "count", int, where)
    if not 0 <= correct <= count or count == 0:
        raise InputError(f"{where}: expected 0 <= correct <= count, got {correct} of {count}.")
    score = AttackResult(
        attack=name,
        correct=correct,
        count=count,
        seconds=take(values, "seconds", float, where),
        precision=str(values.get("precision", "not recorded")),
        settings=maybe(values, "settings", dict, where) or {},
        warnings=tuple(str(text) for text in values.get("warnings") or []),
        reliable=take(values, "reliable", bool, where),
    )
    stated = take(values, "accuracy", float, where)
    if not math.isclose(stated, score.accuracy, abs_tol=0.01):
        raise InputError(
            f"{where}: accuracy {stated:g} % contradicts {correct} of {count} images "
            f"({score.accuracy:.2f} %). Evaluate the run again."
        )
    return score
