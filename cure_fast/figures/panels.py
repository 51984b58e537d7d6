"""Panels that several figures have: bars side by side, and tables of numbers in colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cure_fast.figures import PAPER, ROBUST, colours

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

# Of bars, which are told apart without colours too.
HATCHES = ("", "////", "....", "\\\\\\\\", "xxxx", "----", "++++", "oooo")


def bar_styles(subjects: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """Return colour and hatching of the bars of each subject, as numbers have them."""
    return [bar_style(colour, place) for place, colour in enumerate(colours(subjects))]


def bar_style(colour: str, place: int) -> dict[str, Any]:
    """Return how the bars of this place beside one another look."""
    hatch = HATCHES[place % len(HATCHES)]
    return {"color": colour, "hatch": hatch, "edgecolor": PAPER, "linewidth": 0}


def grouped_bars(
    axes: Axes,
    names: Sequence[str],
    heights: Mapping[str, Sequence[float | None]],
    styles: Sequence[Mapping[str, Any]],
    *,
    slanted: bool = False,
) -> None:
    """Draw for each name the bars of all series side by side; ``heights`` has a series by label."""
    width = 0.8 / len(heights)
    for place, ((label, values), style) in enumerate(zip(heights.items(), styles, strict=True)):
        shift = (place - (len(heights) - 1) / 2) * width
        bars = [(k + shift, value) for k, value in enumerate(values) if value is not None]
        axes.bar([x for x, _ in bars], [y for _, y in bars], 0.94 * width, label=label, **style)
    turned: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(len(names)), names, **(turned if slanted else {}))
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.grid(axis="x", visible=False)


def heat_map(
    axes: Axes,
    values: Sequence[Sequence[float | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    digits: int | None = 1,
    size: float = 7,
    boxed: Sequence[tuple[int, int]] = (),
) -> AxesImage:
    """Draw and return percentages as a table of coloured cells, with the numbers in them.

    Args:
        axes: where.
        values: by row and column, from 0 to 100; None leaves a cell empty.
        rows: names from the top; with none the axes have no ticks.
        columns: names from the left, as rows.
        digits: after the point; None leaves the numbers out.
        size: of the numbers in points.
        boxed: cells (row, column) with a border.
    """
    from matplotlib.patches import Rectangle

    filled = [[float("nan") if v is None else v for v in row] for row in values]
    image = axes.imshow(filled, vmin=0, vmax=100, aspect="auto")
    axes.grid(visible=False)
    axes.set_xticks(range(len(columns)), columns, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            if digits is not None and value is not None:
                # Viridis is dark up to about the middle.
                ink = "white" if value < 60 else "black"
                axes.text(
                    j, i, f"{value:.{digits}f}", ha="center", va="center", color=ink, size=size
                )
    for i, j in boxed:
        box: dict[str, Any] = {"fill": False, "edgecolor": ROBUST, "linewidth": 1.5}
        axes.add_patch(Rectangle((j - 0.47, i - 0.47), 0.94, 0.94, **box))
    return image
