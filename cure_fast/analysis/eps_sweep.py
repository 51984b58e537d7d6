"""Accuracy under attacks of growing radius: the curve of CURE's Fig. 5b.

The paper's radii are 0.25/255 to 8/255, under PGD-20 with a step that it does not give; here the
step follows the radius as in every evaluation, and radii go on to where nothing is right, as an
attack without bound has to reach 0 (Carlini et al., On Evaluating Adversarial Robustness, 2019).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from cure_fast.analysis.shape import Analysis, Numbers, Settings, Subject, Task
from cure_fast.config.attack_names import attack_name, parse_attack
from cure_fast.config.checks import check
from cure_fast.figures import (
    COLUMN,
    MARK,
    line_styles,
    new_figure,
    outside_legend,
    percent_axis,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RADII = (0.25, 0.5, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 48, 64, 96, 128)


@dataclass(frozen=True, kw_only=True)
class EpsSweepSettings(Settings):
    """Settings of ``eps-sweep``."""

    radii: tuple[float, ...] | None = None
    """Radii in pixel units, above 0, with commas between; None takes 0.25/255 to 128/255, and in L2
    shares and multiples of --eps."""
    attack: str = "pgd20"
    """What attacks: pgdK, cwK or fgsm, or aa (AutoAttack, for each radius anew)."""


def compute(task: Task, settings: EpsSweepSettings) -> Numbers:
    """Return the accuracy of each network at each radius, up to the first where it is 0."""
    # Before anything is written.
    parse_attack(settings.attack)
    usual = [k / 255 if task.norm == "linf" else k / 8 * task.eps for k in RADII]
    radii = usual if settings.radii is None else settings.radii
    for radius in radii:
        inside = 0 < radius <= (1 if task.norm == "linf" else 1000)
        check(inside, "radii", radius, "radii above 0, in linf to 1")
    reached: dict[str, float] = {}

    def accuracy(subject: Subject, eps: float) -> float | None:
        if reached.get(subject.name) == 0:
            return None
        attack = "natural" if eps == 0 else settings.attack
        return task.accuracies(subject, [attack], eps=eps)[attack].accuracy

    rows = []
    for eps in (0.0, *sorted({*radii})):
        parts = {
            f"{subject.name} at {told(task.norm, eps)}": partial(accuracy, subject, eps)
            for subject in task.subjects
        }
        found = task.each(parts, "eps-sweep")
        for subject, value in zip(task.subjects, found.values(), strict=True):
            if value is not None:
                reached[subject.name] = value
                rows.append({"model": subject.name, "eps": eps, "accuracy": value})
    return {"rows": rows}


def told(norm: str, eps: float) -> str:
    """Return a radius in words."""
    return f"{255 * eps:g}/255" if norm == "linf" else f"{eps:g}"


def draw(numbers: Numbers) -> Figure:
    """Return a line per network."""
    figure, (axes,) = new_figure(width=COLUMN, height=2.6)
    subjects, linf = numbers["subjects"], numbers["norm"] == "linf"
    unit = 255 if linf else 1
    for subject, style in zip(subjects, line_styles(subjects), strict=True):
        own = [row for row in numbers["rows"] if row["model"] == subject["name"]]
        x, y = [unit * row["eps"] for row in own], [row["accuracy"] for row in own]
        axes.plot(x, y, label=subject["name"], **style)
    axes.axvline(unit * numbers["eps"], color=MARK, linewidth=0.8, linestyle=":")
    if linf:
        axes.set_xscale("symlog", linthresh=1)
        ticks = [0, 1, 2, 4, 8, 16, 32, 64, 128]
        axes.set_xticks(ticks, map(str, ticks))
    axes.set_xlim(0, 1.1 * unit * max(numbers["eps"], *(row["eps"] for row in numbers["rows"])))
    axes.set_xlabel("radius eps in 1/255" if linf else "radius eps in L2")
    name = attack_name(numbers["settings"]["attack"])
    percent_axis(axes, f"accuracy under {name} in %")
    outside_legend(figure, [axes])
    return figure


EPS_SWEEP = Analysis(
    name="eps-sweep",
    title="Accuracy under attacks of growing radius",
    source="CURE, Fig. 5b",
    about=(
        "Each radius is an attack of its own, whose step follows the radius; the dotted line is "
        "the radius of the evaluation. A curve that stays above 0 where the ball holds all images, "
        "at 128/255, speaks of masked gradients."
    ),
    settings=EpsSweepSettings(),
    compute=compute,
    draw=draw,
    images=500,
)
