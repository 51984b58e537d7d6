"""What a naturally trained start gives to other methods than CURE: Table 5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from cure_fast.analysis.shape import Numbers
from cure_fast.config import Config
from cure_fast.config.attack_names import attack_name
from cure_fast.figures import COLOURS, PAGE, new_figure, outside_legend, percent_axis
from cure_fast.training.studies.drawing import WIDTH, bars, diamonds, like_the_paper
from cure_fast.training.studies.shape import PRINTED, Found, Study, begins_naturally

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What is printed of each method, by its start: natural, PGD-20, C&W, AutoAttack. From a natural
# start it is Table 5, from a random one Table 1; CURE is one number in both.
PAPER = {
    "pgd_at": ((84.37, 43.92, 44.14, None), (82.78, 51.30, 49.72, 44.63)),
    "trades": ((80.90, 50.84, 49.04, None), (82.41, 52.76, 50.43, 48.37)),
    "cure": ((86.76, 54.90, 52.48, 49.69), (None, None, None, None)),
}
LABELS = {"pgd_at": "PGD-AT", "trades": "TRADES", "cure": "CURE"}
STARTS = ("natural", "random")


def entries(base: Config) -> Mapping[str, str]:
    """Return each method from both starts."""
    begins_naturally(base)
    anew = "--pretrain-epochs 0"
    if base.model.init_from is not None:
        anew += " --init-from None"
    flags = dict(zip(STARTS, ("", anew), strict=True))
    return {
        f"{LABELS[method]}, {start} start": f"--method {method} {flags[start]}"
        for method in PAPER
        for start in STARTS
    }


def compute(found: Found) -> Numbers:
    """Return a row for each method and start, with the paper's beside it."""
    rows = []
    for method, of_starts in PAPER.items():
        for start, printed in zip(STARTS, of_starts, strict=True):
            more = {"method": method, "start": start}
            more |= {f"paper_{kind}": v for kind, v in zip(PRINTED, printed, strict=True)}
            rows.append(found.row(f"{LABELS[method]}, {start} start", **more))
    return {"rows": rows}


def draw(numbers: Numbers) -> Figure:
    """Return bars by start, natural accuracy on the left and robust on the right."""
    figure, panels = new_figure(1, 2, width=PAGE, height=2.4, sharey=True)
    attack, paper = numbers["attack"], like_the_paper(numbers)
    for axes, kind in zip(panels, ("natural", attack), strict=True):
        for start, colour, shift in zip(STARTS, COLOURS[2:], (-WIDTH / 2, WIDTH / 2), strict=False):
            rows = [row for row in numbers["rows"] if row["start"] == start]
            places = [place + shift for place in range(len(rows))]
            bars(axes, places, rows, kind, label=f"{start} start", color=colour)
            if paper and kind in ("natural", "pgd20"):
                diamonds(axes, places, [row[f"paper_{kind}"] for row in rows])
        axes.set_xticks(range(len(LABELS)), [*LABELS.values()])
        axes.grid(visible=False, axis="x")
        told = "natural accuracy" if kind == "natural" else f"accuracy under {attack_name(kind)}"
        percent_axis(axes, f"{told} in %")
    outside_legend(figure, panels, columns=3)
    return figure


PRETRAINING = Study(
    name="pretraining",
    title="PGD-AT, TRADES and CURE from a natural and from a random start",
    source="CURE, Table 5",
    about=(
        "Adversarial epochs are the same from both starts, so that a run from the natural one has "
        "seen more. CURE from a random start is not in the paper."
    ),
    entries=entries,
    compute=compute,
    draw=draw,
)
