"""CURE's mask by the paper's rule and by its public code's, with two controls; ours, no figure.

The paper scores weights by magnitudes of gradients (Eq. 6), the public code by their signed sum:
for percentiles to 30 they mask disjoint sets of weights. Without the two runs that have no mask a
gain of CURE cannot be put down to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from cure_fast.analysis.shape import Numbers
from cure_fast.config import Config
from cure_fast.figures import PAGE, new_figure, outside_legend
from cure_fast.training.studies.drawing import epoch_lines, paired_bars
from cure_fast.training.studies.shape import Found, Study, begins_naturally

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Flags, and what the figure has room for below the bars.
ENTRIES = {
    "magnitudes (paper)": ("--rgp --revision --score abs", "magni-\ntudes"),
    "signed sum (code)": ("--rgp --revision --score signed", "signed\nsum"),
    "no mask: revision alone": ("--no-rgp --revision", "revision\nalone"),
    "neither: TRADES from this start": ("--no-rgp --no-revision", "TRADES"),
}


def entries(base: Config) -> Mapping[str, str]:
    """Return the flags of each entry."""
    begins_naturally(base)
    return {name: flags for name, (flags, _) in ENTRIES.items()}


def compute(found: Found) -> Numbers:
    """Return accuracies, and by epoch robust accuracy and the share of energy that masks take."""
    masked = {}
    for name in ENTRIES:
        energy = found.by_epoch(name, lambda row: row.numbers.get("mask energy"))
        if energy["epochs"]:
            masked[name] = energy
    return {
        "rows": [found.row(name) for name in ENTRIES],
        "robust": {name: found.by_epoch(name, lambda row: row.robust) for name in ENTRIES},
        "masked_energy": masked,
    }


def draw(numbers: Numbers) -> Figure:
    """Return bars, robust accuracy by epoch, and what the masks take by epoch."""
    figure, panels = new_figure(1, 3, width=PAGE, height=2.6)
    below = [short for _, short in ENTRIES.values()]
    paired_bars(panels[0], numbers["rows"], below, numbers["attack"], paper=False)
    panels[0].tick_params(axis="x", labelsize=6)
    epoch_lines(panels[1], numbers["robust"], "robust, validation, in %")
    epoch_lines(panels[2], numbers["masked_energy"], "masked share of energy")
    panels[2].set_ylim(0, 1)
    outside_legend(figure, panels, columns=3)
    return figure


RGP_RULE = Study(
    name="rgp-rule",
    title="CURE's mask by magnitudes and by the signed sum, with two controls",
    source="after CURE, Eq. 6, and its public code",
    about=(
        "All from the same natural start. On the right the share of the squared scores that the "
        "mask takes, in the last step of an epoch: the signed rule is the stronger intervention."
    ),
    entries=entries,
    compute=compute,
    draw=draw,
)
