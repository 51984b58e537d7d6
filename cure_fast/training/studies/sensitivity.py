"""CURE under other percentiles, alphas and gammas, one at a time: Table 10."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

from cure_fast.analysis.shape import Numbers
from cure_fast.config import Config
from cure_fast.config.attack_names import attack_name
from cure_fast.figures import (
    MARK,
    NATURAL,
    PAGE,
    ROBUST,
    new_figure,
    outside_legend,
    percent_axis,
)
from cure_fast.training.studies.drawing import diamonds, like_the_paper
from cure_fast.training.studies.shape import Found, Study, begins_naturally

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GRID = {
    "percentile": (10.0, 30.0, 50.0, 70.0),
    "alpha": (0.1, 0.2, 0.5, 0.9),
    "gamma": (0.0, 0.5, 1.0, 2.0),
}
# Natural and PGD-20, of a base of percentile 30, alpha 0.1, gamma 1.
PAPER_BASE = {"percentile": 30.0, "alpha": 0.1, "gamma": 1.0}
PAPER = {
    ("gamma", 0.5): (86.25, 53.13),
    ("percentile", 10.0): (85.15, 55.65),
    ("alpha", 0.2): (86.95, 54.17),
    ("alpha", 0.5): (88.52, 53.67),
}
PAPER |= dict.fromkeys(PAPER_BASE.items(), (86.76, 54.92))


def values_of(base: Config) -> dict[str, float]:
    """Return what the base has of each setting that is varied."""
    own = asdict(base.settings)
    return {setting: own[setting] for setting in GRID}


def entry_of(setting: str, value: float, base: Mapping[str, float]) -> str:
    """Return the name of the entry that has the value: the base is one for all settings."""
    return "base" if value == base[setting] else f"{setting} {value:g}"


def entries(base: Config) -> Mapping[str, str]:
    """Return the base, and each value of each setting that is another."""
    begins_naturally(base)
    own = values_of(base)
    return {"base": ""} | {
        name: f"--{setting} {value:g}"
        for setting, values in GRID.items()
        for value in values
        if (name := entry_of(setting, value, own)) != "base"
    }


def compute(found: Found) -> Numbers:
    """Return a row for each setting and value, the base's among them, with the paper's."""
    assert found.config is not None
    own = values_of(found.config)
    rows = []
    for setting, values in GRID.items():
        for value in sorted({*values, own[setting]}):
            natural, robust = PAPER.get((setting, value), (None, None))
            more = {"setting": setting, "value": value}
            more |= {"paper_natural": natural, "paper_pgd20": robust}
            rows.append(found.row(entry_of(setting, value, own), **more))
    return {"rows": rows, "base": own}


def draw(numbers: Numbers) -> Figure:
    """Return a panel per setting."""
    figure, panels = new_figure(1, len(GRID), width=PAGE, height=2.3, sharey=True)
    attack, paper = numbers["attack"], like_the_paper(numbers)
    for axes, setting in zip(panels, GRID, strict=True):
        rows = [row for row in numbers["rows"] if row["setting"] == setting]
        x = [row["value"] for row in rows]
        for kind, colour, marker in (("natural", NATURAL, "o"), (attack, ROBUST, "s")):
            label = "natural" if kind == "natural" else attack_name(kind)
            y, spread = ([row[name] or 0 for row in rows] for name in (kind, f"{kind}_std"))
            axes.errorbar(x, y, spread, label=label, color=colour, marker=marker, capsize=1.5)
            if paper and kind in ("natural", "pgd20"):
                diamonds(axes, x, [row[f"paper_{kind}"] for row in rows])
        axes.axvline(numbers["base"][setting], color=MARK, linewidth=0.8, linestyle=":")
        axes.set_xticks(x, [f"{value:g}" for value in x])
        axes.set_xlabel(f"{setting} in %" if setting == "percentile" else setting)
    percent_axis(panels[0])
    outside_legend(figure, panels, columns=3)
    return figure


SENSITIVITY = Study(
    name="sensitivity",
    title="CURE under other percentiles, alphas and gammas",
    source="CURE, Table 10",
    about=(
        "One of the three settings differs from the base in each run; the dotted lines are at the "
        "base's values. The table prints six of these values."
    ),
    entries=entries,
    compute=compute,
    draw=draw,
)
