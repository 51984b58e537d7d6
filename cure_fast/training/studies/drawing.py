"""What figures of studies share: bars of natural and robust accuracy, lines over epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cure_fast.config.attack_names import attack_name
from cure_fast.figures import (
    COLOURS,
    DASHES,
    INK,
    MARKERS,
    NATURAL,
    PAPER,
    ROBUST,
    epoch_axis,
    percent_axis,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = Sequence[Mapping[str, Any]]
# Of bars beside one another, as shares of the place of an entry.
WIDTH = 0.38


def like_the_paper(numbers: Mapping[str, Any]) -> bool:
    """Return whether runs are of what the papers' rows are of, so that one figure may show both."""
    config = numbers["config"]
    return (config["data"]["data"], config["model"]["model"]) == ("cifar10", "resnet18")


def paired_bars(axes: Axes, rows: Rows, names: Sequence[str], attack: str, *, paper: bool) -> None:
    """Draw natural and robust accuracy of each row, with deviations, and the paper's where asked.

    Values are whole percents; ``names`` are below the bars.
    """
    for kind, colour, shift in (("natural", NATURAL, -WIDTH / 2), (attack, ROBUST, WIDTH / 2)):
        places = [place + shift for place in range(len(rows))]
        label = "natural" if kind == "natural" else attack_name(kind)
        bars(axes, places, rows, kind, label=label, color=colour)
        printed = "pgd20" if kind == attack else kind
        if paper and (kind == "natural" or attack == "pgd20"):
            diamonds(axes, places, [row.get(f"paper_{printed}") for row in rows])
    axes.set_xticks(range(len(rows)), names)
    axes.grid(visible=False, axis="x")
    percent_axis(axes)


def bars(axes: Axes, places: Sequence[float], rows: Rows, kind: str, **looks: Any) -> None:
    """Draw a bar for each row with its deviation where there is one, and its value at its foot.

    There marks of the paper's values do not cover it; above a bar that is too low to hold it.
    """
    values = [row[kind] for row in rows]
    spreads = [row[f"{kind}_std"] or 0 for row in rows]
    lines = {"yerr": spreads, "ecolor": INK, "capsize": 1.5} if any(spreads) else {}
    axes.bar(places, values, WIDTH, error_kw={"linewidth": 0.8}, **lines, **looks)
    for place, value, spread in zip(places, values, spreads, strict=True):
        height, colour = (1.5, PAPER) if value > 8 else (value + spread + 1, INK)
        axes.text(place, height, f"{value:.0f}", ha="center", fontsize=6, color=colour)


def diamonds(axes: Axes, places: Sequence[float], values: Sequence[float | None]) -> None:
    """Mark the paper's values, where there are any."""
    known = [(x, y) for x, y in zip(places, values, strict=True) if y is not None]
    if known:
        x, y = zip(*known, strict=True)
        axes.plot(x, y, "D", color=INK, markerfacecolor="none", markersize=4, label="paper")


def epoch_lines(
    axes: Axes, curves: Mapping[str, Mapping[str, Sequence[float]]], label: str, **more: Any
) -> None:
    """Draw a line over epochs for each entry; see :func:`entry_lines`."""
    entry_lines(axes, {k: (c["epochs"], c["values"]) for k, c in curves.items()}, **more)
    epoch_axis(axes)
    axes.set_ylabel(label)


def entry_lines(
    axes: Axes, lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], **more: Any
) -> None:
    """Draw a line for each entry, told apart by colour, dashes and markers.

    The colours of natural and robust accuracy are left to bars.
    """
    left = COLOURS[2:]
    for place, (name, (x, y)) in enumerate(lines.items()):
        axes.plot(
            x,
            y,
            label=name,
            color=left[place % len(left)],
            linestyle=DASHES[(place // len(left) + place) % len(DASHES)],
            marker=MARKERS[place % len(MARKERS)],
            markevery=max(1, len(x) // 6),
            **more,
        )
