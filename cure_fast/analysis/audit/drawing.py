"""The figure of an audit: what attacks leave at growing radius and strength, and the verdicts."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

from cure_fast.analysis.audit.case import ABSENT, DOUBTFUL, FAILED, PASSED
from cure_fast.config.attack_names import attack_name
from cure_fast.figures import COLOURS, GRID, INK, MARK, PAGE, PAPER, percent_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colour and mark of each verdict: told apart without colours too.
LOOKS = {
    PASSED: (COLOURS[2], "o"),
    FAILED: (COLOURS[1], "X"),
    DOUBTFUL: (COLOURS[5], "^"),
    ABSENT: (COLOURS[6], "_"),
}
# Letters of evidence on a line, and inches of a line and of the plots above.
LETTERS, LINE, PLOTS = 88, 0.125, 1.9


def draw(numbers: dict[str, Any]) -> Figure:
    """Return the curve, the attacks, and the table of verdicts with their evidence."""
    from matplotlib.figure import Figure

    rows = [
        (row["check"], row["verdict"], textwrap.wrap(row["evidence"], LETTERS) or [""])
        for row in numbers["rows"]
    ]
    lines = 2 + sum(len(text) + 0.5 for _, _, text in rows)
    plots = [name for name in ("curve", "attacks") if numbers[name]]
    heights = [PLOTS, LINE * lines] if plots else [LINE * lines]
    figure = Figure(figsize=(PAGE, sum(heights)), layout="constrained")
    grid = figure.add_gridspec(len(heights), max(1, len(plots)), height_ratios=heights)
    for place, name in enumerate(plots):
        axes = figure.add_subplot(grid[0, place])
        {"curve": draw_curve, "attacks": draw_attacks}[name](axes, numbers)
    draw_table(figure.add_subplot(grid[-1, :]), numbers["verdict"], rows, lines)
    return figure


def draw_curve(axes: Axes, numbers: dict[str, Any]) -> None:
    """Draw the accuracy at each radius."""
    linf = numbers["norm"] == "linf"
    scale = 255 if linf else 1
    x, y = zip(*numbers["curve"], strict=True)
    axes.plot([scale * r for r in x], y, color=COLOURS[0], marker="o")
    axes.axvline(scale * numbers["eps"], color=MARK, linewidth=0.8, linestyle=":")
    axes.set_xscale("symlog", linthresh=max(scale * numbers["eps"] / 2, 1e-3))
    own = scale * numbers["eps"]
    far = [t for t in ((16, 64, 255) if linf else (1, 4, 16)) if t >= 1.5 * own]
    ticks = [0, own / 2, own, *far]
    axes.set_xticks(ticks, [f"{t:.3g}" for t in ticks])
    axes.minorticks_off()
    axes.set_xlim(0, 1.1 * scale * max(x))
    axes.set_xlabel("radius eps in 1/255" if linf else "radius eps, length in pixel units")
    percent_axis(axes)


def draw_attacks(axes: Axes, numbers: dict[str, Any]) -> None:
    """Draw what each attack leaves, in the order of their strength."""
    names = [attack_name(told["attack"]) for told in numbers["attacks"]]
    values = [told["accuracy"] for told in numbers["attacks"]]
    places = range(len(names))
    axes.barh(places, values, height=0.6, color=COLOURS[0])
    for place, value in zip(places, values, strict=True):
        inside = value > 85
        axes.annotate(
            f"{value:.1f}",
            (value, place),
            xytext=(-3 if inside else 3, 0),
            textcoords="offset points",
            ha="right" if inside else "left",
            va="center",
            fontsize=7,
            color=PAPER if inside else INK,
        )
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    percent_axis(axes, across=True)


def draw_table(
    axes: Axes, verdict: str, rows: list[tuple[str, str, list[str]]], lines: float
) -> None:
    """Write the verdict of the audit, and below it those of its checks with their evidence."""
    axes.set_xlim(0, 1)
    axes.set_ylim(lines, 0)
    axes.set_axis_off()
    axes.text(0, 0.6, verdict[:1].upper() + verdict[1:], weight="bold", va="center")
    top = 2.0
    for check, each, text in rows:
        colour, mark = LOOKS[each]
        axes.axhline(top - 0.25, color=GRID, linewidth=0.5)
        middle = top + 0.5
        axes.plot([0.01], [middle], mark, color=colour, markersize=5, clip_on=False)
        axes.text(0.03, middle, each, va="center", fontsize=7)
        axes.text(0.145, middle, check, va="center", fontsize=7, weight="bold")
        for k, line in enumerate(text):
            axes.text(0.25, middle + k, line, va="center", fontsize=7)
        top += len(text) + 0.5
