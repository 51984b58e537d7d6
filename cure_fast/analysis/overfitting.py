"""Robust overfitting: accuracy by epoch, and what is lost from the best epoch to the last.

CURE's Table 3 has the difference last - best, negative where the end is worse; PIAT's Table I its
magnitude. Both call best the epoch of the highest robust accuracy, as training does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cure_fast.analysis.shape import Analysis, Numbers, Settings, Subject, Task
from cure_fast.config.attack_names import attack_name
from cure_fast.errors import InputError
from cure_fast.evaluation.record import stored_record
from cure_fast.figures import (
    FAINT,
    MARKERS,
    PAGE,
    colours,
    epoch_axis,
    new_figure,
    outside_legend,
    percent_axis,
)
from cure_fast.runs.epochs import Curves, Epoch, read_curves

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = ("natural", "robust")
# Dashes of what was measured on other images than those of training, and on these.
VALIDATION, TRAINING = "-", (0, (1.5, 1.5))


@dataclass(frozen=True, kw_only=True)
class OverfittingSettings(Settings):
    """Settings of ``overfitting``."""

    training: bool = True
    """Draw the accuracy on the batches of training too, where it was logged."""


def compute(task: Task, settings: OverfittingSettings) -> Numbers:
    """Return a row per run with its best and last epoch, and under ``epochs`` all of them."""
    records = {subject.name: measured(subject) for subject in task.subjects}
    return {
        "rows": [summary(name, record) for name, record in records.items()],
        "epochs": [
            epoch_of(name, row) for name, record in records.items() for row in record.stage("train")
        ],
    }


def measured(subject: Subject) -> Curves:
    """Return the record of a run.

    Raises:
        InputError: for a run none of whose epochs was validated.
    """
    if subject.folder is None:
        raise InputError(f"{subject.name}: expected the folder of a run, got another network.")
    record = read_curves(subject.folder)
    if record.best is None:
        raise InputError(
            f"{subject.folder}: expected epochs with a validation in metrics.jsonl, got none. Name "
            "a run that has finished an epoch, trained with a lower --val-every."
        )
    return record


def epoch_of(name: str, row: Epoch) -> dict[str, Any]:
    """Return what the figure has of an epoch, in percent; None for what was not measured."""
    return {
        "model": name,
        "epoch": row.epoch,
        "natural": row.natural,
        "robust": row.robust,
        "training_natural": row.terms.get("natural_accuracy"),
        "training_robust": row.terms.get("adversarial_accuracy"),
    }


def summary(name: str, record: Curves) -> dict[str, Any]:
    """Return best and last of a run on validation images, and on test images where both are there.

    ``*_delta`` is last - best, in points: negative where the end is worse.
    """
    best, rows = record.best, record.stage("train")
    last = [row for row in rows if row.natural is not None][-1]
    assert best is not None
    found: dict[str, Any] = {
        "model": name,
        "attack": best.attack,
        "validation_images": best.count,
        "best_epoch": best.epoch,
        "last_epoch": last.epoch,
    }
    for kind in KINDS:
        pair = getattr(best, kind), getattr(last, kind)
        if None not in pair:
            found |= differing(kind, *pair)
    models = (stored_record(record.folder / "results.json") or {"models": {}})["models"]
    if {"trained", "last"} <= models.keys():
        at_best, at_last = (models[key]["attacks"] for key in ("trained", "last"))
        for attack in (a for a in at_best if a in at_last):
            if at_best[attack]["count"] == at_last[attack]["count"]:
                own = at_best[attack]["accuracy"], at_last[attack]["accuracy"]
                found |= differing(f"test_{attack}", *own)
    return found


def differing(name: str, best: float, last: float) -> dict[str, float]:
    """Return two accuracies in percent and last - best."""
    return {f"{name}_best": best, f"{name}_last": last, f"{name}_delta": last - best}


def draw(numbers: Numbers) -> Figure:
    """Return natural and robust accuracy by epoch, with the best epoch of each run marked."""
    figure, axes = new_figure(1, 2, width=PAGE, height=2.9)
    subjects = numbers["subjects"]
    looks = zip(subjects, colours(subjects), numbers["rows"], strict=True)
    for number, (subject, colour, row) in enumerate(looks):
        marker = MARKERS[number % len(MARKERS)]
        own = [each for each in numbers["epochs"] if each["model"] == subject["name"]]
        for ax, kind in zip(axes, KINDS, strict=True):
            points = [(e["epoch"], e[kind]) for e in own if e[kind] is not None]
            if points:
                look: dict[str, Any] = {"color": colour, "marker": marker, "label": row["model"]}
                ax.plot(*zip(*points, strict=True), VALIDATION, markersize=2.5, **look)
                best = [point for point in points if point[0] == row["best_epoch"]]
                ax.plot(*zip(*best, strict=True), marker, color=colour, markersize=7)
            seen = [(e["epoch"], e[f"training_{kind}"]) for e in own]
            seen = [point for point in seen if point[1] is not None]
            if seen and numbers["settings"]["training"]:
                ax.plot(*zip(*seen, strict=True), linestyle=TRAINING, color=colour, linewidth=1)
    attacks = {attack_name(row["attack"]) for row in numbers["rows"] if row["attack"]}
    named = attacks.pop() if len(attacks) == 1 else "attack"
    percent_axis(axes[0], "natural accuracy in %")
    percent_axis(axes[1], f"accuracy under {named} in %")
    for ax in axes:
        epoch_axis(ax)
    # What dashes and markers say, in no run's colour.
    axes[0].plot([], [], VALIDATION, color=FAINT, label="validation (large mark: best epoch)")
    if numbers["settings"]["training"]:
        told = "training batches, under the method's own attack"
        axes[0].plot([], [], linestyle=TRAINING, color=FAINT, label=told)
    outside_legend(figure, axes, columns=4)
    return figure


OVERFITTING = Analysis(
    name="overfitting",
    title="Robust overfitting: accuracy by epoch",
    source="CURE, Fig. 5c and Table 3; PIAT, Fig. 1 and Table I",
    about=(
        "Lines are accuracies on the validation images, with the best epoch marked; dotted lines "
        "are those on the batches of training, under its own attack. In the table, delta is "
        "last - best in points: negative where the end is worse."
    ),
    settings=OverfittingSettings(),
    compute=compute,
    draw=draw,
    of_runs=True,
)
