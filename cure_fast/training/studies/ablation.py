"""CURE without its parts: Table 7, whose check marks the available text lacks.

The order of its rows is inferred from the text: the row without both equals TRADES' of Table 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cure_fast.analysis.shape import Numbers
from cure_fast.config import Config
from cure_fast.figures import COLUMN, new_figure, outside_legend
from cure_fast.training.studies.drawing import like_the_paper, paired_bars
from cure_fast.training.studies.shape import PRINTED, Found, Study, begins_naturally

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Flags of each entry, and what the table prints of it: natural, PGD-20, C&W, AutoAttack.
ENTRIES = {
    "neither": ("--no-rgp --no-revision", (82.41, 52.76, 50.43, 48.37)),
    "RGP": ("--no-revision", (81.27, 53.20, 51.33, 49.06)),
    "revision": ("--no-rgp", (83.28, 51.57, 50.96, 47.35)),
    "both": ("--rgp --revision", (86.76, 54.90, 52.48, 49.69)),
}


def entries(base: Config) -> Mapping[str, str]:
    """Return the flags of each entry."""
    begins_naturally(base)
    return {name: flags for name, (flags, _) in ENTRIES.items()}


def compute(found: Found) -> Numbers:
    """Return a row for each entry, with the paper's beside it."""
    rows = []
    for name, (_, printed) in ENTRIES.items():
        paper: dict[str, Any] = {
            f"paper_{kind}": value for kind, value in zip(PRINTED, printed, strict=True)
        }
        rows.append(found.row(name, **paper))
    return {"rows": rows}


def draw(numbers: Numbers) -> Figure:
    """Return bars of natural and robust accuracy."""
    figure, (axes,) = new_figure(width=COLUMN, height=2.4)
    paired_bars(axes, numbers["rows"], [*ENTRIES], numbers["attack"], paper=like_the_paper(numbers))
    axes.set_xlabel("parts of CURE")
    outside_legend(figure, [axes], columns=3)
    return figure


ABLATION = Study(
    name="ablation",
    title="CURE without RGP, without revision, and without both",
    source="CURE, Table 7",
    about=(
        "All from the same natural start; without both it is TRADES from there. The paper's row "
        "of both gains more over each part alone than the parts gain over neither: take three "
        "seeds or more."
    ),
    entries=entries,
    compute=compute,
    draw=draw,
)
