"""Accuracy by class, natural and under attack, and what is taken for what.

The mean accuracy hides that some classes are far less robust than others (Xu et al., To be Robust
or to be Fair, ICML 2021).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cure_fast.analysis.shape import Analysis, Numbers, Settings, Subject, Task
from cure_fast.config.attack_names import attack_name, parse_single
from cure_fast.figures import (
    NATURAL,
    PAGE,
    ROBUST,
    new_figure,
    outside_legend,
    percent_axis,
)
from cure_fast.figures.panels import bar_style, grouped_bars, heat_map

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# More classes have no names and no numbers in figures.
NAMED = 12


@dataclass(frozen=True, kw_only=True)
class ClassesSettings(Settings):
    """Settings of ``classes``."""

    attack: str = "pgd20"
    """What attacks: pgdK, cwK or fgsm, as for cure-fast eval."""


def compute(task: Task, settings: ClassesSettings) -> Numbers:
    """Return by network and class how many images are right, natural and attacked.

    ``natural_confusion`` and ``attacked_confusion`` have counts [K, K] by network, true classes in
    rows and answers in columns; of attacked images it is all, those that were wrong already too,
    so that the diagonal may exceed the robust accuracy. ``worst`` has the classes of the lowest
    accuracy, natural and robust, by network.
    """
    parse_single(settings.attack)

    def counted(subject: Subject) -> dict[str, Any]:
        logits = task.logits(subject.network, task.pixels)
        natural, classes = logits.argmax(1), logits.shape[1]
        attacked = task.logits(subject.network, task.attacked(subject, settings.attack)).argmax(1)
        return {
            "natural_confusion": confusion(task.labels, natural, classes),
            "attacked_confusion": confusion(task.labels, attacked, classes),
            "robust": task.labels[(natural == task.labels) & (attacked == task.labels)]
            .bincount(minlength=classes)
            .tolist(),
        }

    parts = {subject.name: partial(counted, subject) for subject in task.subjects}
    found = task.each(parts, "classes")
    rows, worst = [], {}
    for name, counts in found.items():
        own = rows_of(name, counts, task.classes)
        rows += own
        filled = [row for row in own if row["images"]]
        worst[name] = {
            kind: [row["class"] for row in filled if row[kind] == min(r[kind] for r in filled)]
            for kind in ("natural", "robust")
        }
    kinds = ("natural_confusion", "attacked_confusion")
    tables = {kind: {name: counts[kind] for name, counts in found.items()} for kind in kinds}
    return {"rows": rows, "worst": worst, **tables}


def confusion(labels: Tensor, answers: Tensor, classes: int) -> list[list[int]]:
    """Return how many images of each class (rows) got each answer (columns), [K, K]."""
    cells = (labels * classes + answers).bincount(minlength=classes**2)
    return cells.reshape(classes, classes).tolist()


def rows_of(model: str, counts: dict[str, Any], classes: Sequence[str]) -> list[dict[str, Any]]:
    """Return a network's row for each class; percentages are None where it has no images."""
    table = torch.tensor(counts["natural_confusion"])
    names = classes if len(classes) == len(table) else [*map(str, range(len(table)))]
    images, natural = table.sum(1).tolist(), table.diagonal().tolist()
    each = zip(names, images, natural, counts["robust"], strict=True)
    return [
        {
            "model": model,
            "class": name,
            "images": total,
            "natural": 100 * right / total if total else None,
            "robust": 100 * robust / total if total else None,
        }
        for name, total, right, robust in each
    ]


def draw(numbers: Numbers) -> Figure:
    """Return for each network bars by class, and tables of what was taken for what."""
    subjects = numbers["subjects"]
    figure, axes = new_figure(
        len(subjects), 3, width=PAGE, height=0.5 + 2.4 * len(subjects), width_ratios=(1.25, 1, 1)
    )
    attack = attack_name(numbers["settings"]["attack"])
    styles = [bar_style(NATURAL, 0), bar_style(ROBUST, 1)]
    for place, subject in enumerate(subjects):
        bars, natural, attacked = axes[3 * place : 3 * place + 3]
        rows = [row for row in numbers["rows"] if row["model"] == subject["name"]]
        names = [row["class"] for row in rows]
        shown = names if len(names) <= NAMED else []
        heights = {
            label: [row[kind] for row in rows]
            for label, kind in (("natural", "natural"), (f"under {attack}", "robust"))
        }
        grouped_bars(bars, names, heights, styles, slanted=True)
        percent_axis(bars)
        first, *others = map(str, numbers["worst"][subject["name"]]["robust"])
        told = f"{first} and {len(others)} more" if others else first
        bars.set_title(f"{subject['name']} (least robust: {told})")
        if not shown:
            bars.set_xticks([])
            bars.set_xlabel(f"{len(names)} classes")
        for panel, kind, title in (
            (natural, "natural_confusion", "natural images, in %"),
            (attacked, "attacked_confusion", f"under {attack}, in %"),
        ):
            shares = [as_shares(row) for row in numbers[kind][subject["name"]]]
            image = heat_map(panel, shares, shown, shown, digits=0 if shown else None, size=5)
            if not shown:
                figure.colorbar(image, ax=panel)
            panel.set_title(title)
            panel.set_xlabel("answer")
            panel.set_ylabel("true class")
    outside_legend(figure, axes[:1])
    return figure


def as_shares(counts: Sequence[int]) -> list[float | None]:
    """Return a row of counts in percent of its sum; None where that is 0."""
    total = sum(counts)
    return [100 * count / total if total else None for count in counts]


CLASSES = Analysis(
    name="classes",
    title="Accuracy by class",
    source="no figure of the papers",
    about=(
        "Robust is an image that is right both as it is and attacked. The tables show what the "
        "images of each class are taken for, in percent of the class; under attack they are all "
        "images, those that are wrong without one too."
    ),
    settings=ClassesSettings(),
    compute=compute,
    draw=draw,
    most=6,
)
