"""Natural against robust accuracy, as CURE's Fig. 1 and 5a have it, of runs and published rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from cure_fast.config.attack_names import attack_name, parse_attack
from cure_fast.figures import (
    COLUMN,
    FAINT,
    MARKERS,
    PAGE,
    line_styles,
    new_figure,
    outside_legend,
    plain,
    save_figure,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Width of a letter of the legend in inches, by estimate.
LETTER = 0.062


@dataclass(frozen=True)
class Mark:
    """A point of the figure.

    Attributes:
        method: decides the colour; empty for a published row, whose mark is hollow.
        values: accuracies in percent by attack, one for each seed.
    """

    name: str
    method: str
    values: Mapping[str, Sequence[float]]


def robust_attacks(attacks: Sequence[str]) -> list[str]:
    """Return the attacks that have a panel: the longest PGD, else the last, and AutoAttack."""
    others = [name for name in attacks if name not in ("natural", "aa")]
    pgd = [name for name in others if name.startswith("pgd")]
    chosen = [max(pgd, key=lambda name: parse_attack(name).steps)] if pgd else others[-1:]
    return chosen + [name for name in attacks if name == "aa"]


def draw(marks: Sequence[Mark], attacks: Sequence[str]) -> Figure:
    """Return a panel per attack, with means and, of several seeds, deviations (n - 1)."""
    shown = robust_attacks(attacks)
    runs = [mark for mark in marks if mark.method]
    styles = iter(line_styles([{"method": mark.method} for mark in runs]))
    looks: list[dict[str, Any]] = [
        {**next(styles), "label": plain(mark.name)}
        if mark.method
        else {
            "marker": MARKERS[place % len(MARKERS)],
            "color": FAINT,
            "markerfacecolor": "none",
            "label": plain(mark.name),
        }
        for place, mark in enumerate(marks, start=-len(runs))
    ]
    width = COLUMN if len(shown) == 1 else PAGE
    longest = max((len(mark.name) for mark in marks), default=0)
    columns = max(1, int(width / (0.5 + LETTER * longest)))
    height = 2.4 + 0.15 * math.ceil(len(marks) / columns)
    figure, panels = new_figure(1, len(shown), width=width, height=height)
    for axes, attack in zip(panels, shown, strict=True):
        for mark, look in zip(marks, looks, strict=True):
            natural, robust = (mark.values.get(name, ()) for name in ("natural", attack))
            if natural and robust:
                x_error, y_error = (stdev(v) if len(v) > 1 else None for v in (natural, robust))
                shown_as: dict[str, Any] = {**look, "linestyle": "none", "capsize": 1.5}
                axes.errorbar(
                    mean(natural),
                    mean(robust),
                    xerr=x_error,
                    yerr=y_error,
                    elinewidth=0.8,
                    **shown_as,
                )
        axes.set_xlabel("natural accuracy in %")
        axes.set_ylabel(f"accuracy in % under {attack_name(attack)}")
    outside_legend(figure, panels, columns=columns)
    return figure


def write_scatter(folder: Path, marks: Sequence[Mark], attacks: Sequence[str]) -> list[Path]:
    """Write ``scatter.svg``, ``.png`` and ``.pdf``, where attacks are two or more; return them."""
    if "natural" not in attacks or not robust_attacks(attacks):
        return []
    return save_figure(partial(draw, marks, attacks), folder, "scatter")
