"""The epochs of a run as ``metrics.jsonl`` has them, checked on the way in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from cure_fast.errors import InputError
from cure_fast.runs.log import beside, rows_of

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
class Curves:
    """What a run recorded of its epochs."""

    folder: Path
    epochs: list[Epoch]

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


def read_curves(folder: Path) -> Curves:
    """Return the epochs of the run in ``folder``; :func:`read_metrics` says what is raised."""
    return Curves(folder, read_metrics(folder / "metrics.jsonl")[0])


def take(values: Mapping[str, Any], name: str, kind: type, where: str) -> Any:
    """Return ``values[name]`` of type ``kind`` (``float`` takes whole numbers), or raise."""
    value = values.get(name)
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise InputError(
            f"{where}: expected {name} as {kind.__name__}, got {value!r}. "
            "The file is damaged or from another version."
        )
    return value


def maybe(values: Mapping[str, Any], name: str, kind: type, where: str) -> Any:
    """Return ``values[name]`` as ``kind``, or ``None`` where it is absent or null."""
    return None if values.get(name) is None else take(values, name, kind, where)


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
            epoch = epoch_of(row, where)
            epochs[epoch.stage, epoch.epoch] = epoch
        elif row["event"] == "step":
            epoch, lr = take(row, "epoch", float, where), take(row, "lr", float, where)
            steps.append(Step(row["stage"], epoch, lr, terms_of(row, "terms", where)))
    return list(epochs.values()), steps, content[-1:] not in (b"", b"\n")


def terms_of(row: Mapping[str, Any], name: str, where: str) -> dict[str, float]:
    """Return the numbers under ``row[name]`` by their names, or raise."""
    values = take(row, name, dict, where)
    return {term: float(take(values, term, float, f"{where}, {name}")) for term in values}


def epoch_of(row: Mapping[str, Any], where: str) -> Epoch:
    """Return a finished epoch from its row; ``where`` is the place, for messages."""
    validation = maybe(row, "validation", dict, where) or {}
    maybe(validation, "networks", dict, where)
    others = beside(validation)
    for name in others:
        take(others, name, dict, f"{where}, validation")
    gradients = maybe(row, "gradients", dict, where) or {}
    numbers, by_tensor = _recorded(row, where)
    return Epoch(
        stage=take(row, "stage", str, where),
        epoch=take(row, "epoch", int, where),
        lr=take(row, "lr", float, where),
        terms=terms_of(row, "terms", where),
        seconds=maybe(row, "seconds", float, where),
        validation_seconds=maybe(row, "validation_seconds", float, where),
        images_per_s=maybe(row, "images_per_s", float, where),
        engine=maybe(row, "engine", str, where),
        natural=maybe(validation, "natural", float, where),
        robust=maybe(validation, "robust", float, where),
        attack=maybe(validation, "attack", str, where),
        count=maybe(validation, "count", int, where),
        network=maybe(validation, "network", str, where),
        fgsm=maybe(validation, "fgsm", float, where),
        others={
            name: Reached(*(maybe(found, key, float, where) for key in Reached._fields))
            for name, found in others.items()
        },
        collapsed=maybe(row, "collapsed", bool, where) or False,
        gradients={layer: terms_of(gradients, layer, where) for layer in gradients},
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
                numbers[name] = float(take(row, name, float, where))
            continue
        values = terms_of(row, name, where)
        # Parameters lie in layers, whose names their own begin with.
        if values and all("." in key for key in values):
            by_tensor[name] = values
        else:
            numbers |= {f"{name} {key}": value for key, value in values.items()}
    return numbers, by_tensor
