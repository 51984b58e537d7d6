"""Which blocks of a naturally trained network learn robustness: the study U-b of CURE's Section 3.

The paper's nine sets of blocks, each with its convolutions drawn anew (Fig. 2b) and without (Fig.
11); what is not named is frozen. In the authors' code the stem is never frozen, and frozen
BatchNorm follows the batches; ``--blocks-stem trained --blocks-statistics train`` with
``--policies blocks`` gives that to a run, and the study takes the policy's own choices.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from cure_fast.analysis.figures import INK, PAGE, new_figure, outside_legend
from cure_fast.analysis.shape import Numbers
from cure_fast.config import Config
from cure_fast.console import say
from cure_fast.errors import InputError
from cure_fast.policies.blocks import stages_of
from cure_fast.training.stages import new_model
from cure_fast.training.studies.drawing import epoch_lines, paired_bars
from cure_fast.training.studies.shape import Found, Study, begins_naturally

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SETS = ("1", "2", "3", "4", "12", "23", "34", "123", "234")
WHOLE = "full AT"
# Of the two variants: what the names of their entries end with, and their titles.
VARIANTS = {"": "fine-tuned", " drawn anew": "drawn anew"}


def entries(base: Config) -> Mapping[str, str]:
    """Return adversarial training of the whole network and of each set, in both variants.

    Raises:
        InputError: for a network that is no ResNet.
    """
    begins_naturally(base)
    with torch.device("meta"):
        # The number of classes plays no part.
        count = len(stages_of(new_model(base, 10)))
    if count == 0:
        raise InputError(
            f"--model: expected a ResNet, whose stages are blocks, got {base.model.model}. Choose "
            "another."
        )
    kept = [blocks for blocks in SETS if int(max(blocks)) <= count]
    if left := [f"U-{blocks}" for blocks in SETS if blocks not in kept]:
        say(f"layerwise: without {', '.join(left)}, as {base.model.model} has {count} blocks")
    flags = {"": "", " drawn anew": " --blocks-reinit"}
    return {WHOLE: ""} | {
        f"U-{blocks}{ending}": f"--policies blocks --blocks-train {','.join(blocks)}{more}"
        for ending, more in flags.items()
        for blocks in kept
    }


def compute(found: Found) -> Numbers:
    """Return accuracies of start, whole and sets, and robust accuracy by epoch."""
    names = [*found.records]
    rows = [found.row(WHOLE, "start") | {"entry": "ST"}, *(found.row(name) for name in names)]
    return {
        "rows": rows,
        "robust": {name: found.by_epoch(name, lambda row: row.robust) for name in names},
    }


def draw(numbers: Numbers) -> Figure:
    """Return a row of panels per variant: bars on the left, robust accuracy by epoch beside."""
    figure, panels = new_figure(2, 2, width=PAGE, height=5, sharey="col", width_ratios=[3, 2])
    reference = ("ST", WHOLE)
    for (ending, title), bars, lines in zip(
        VARIANTS.items(), panels[::2], panels[1::2], strict=True
    ):
        own = [f"U-{blocks}{ending}" for blocks in SETS]
        rows = [row for row in numbers["rows"] if row["entry"] in (*reference, *own)]
        below = [row["entry"].removesuffix(ending).replace(" ", "\n") for row in rows]
        paired_bars(bars, rows, below, numbers["attack"], paper=False)
        bars.set_title(f"blocks {title}", loc="left")
        curves = {
            n.removesuffix(ending): numbers["robust"][n] for n in own if n in numbers["robust"]
        }
        epoch_lines(lines, curves, "robust, validation, in %", linewidth=1)
        whole = numbers["robust"][WHOLE]
        lines.plot(whole["epochs"], whole["values"], color=INK, linewidth=1, label=WHOLE)
        lines.set_title(f"blocks {title}", loc="left")
    outside_legend(figure, panels, columns=7)
    return figure


LAYERWISE = Study(
    name="layerwise",
    title="Which blocks of a naturally trained network learn robustness",
    source="CURE, Fig. 2 to 4 and 11",
    about=(
        "U-b trains the blocks b by PGD-AT, and freezes all others with stem, classifier and "
        "statistics; ST is the natural start, and full AT trains all of it. On the right the "
        "validation images, where the paper has test images."
    ),
    method="pgd_at",
    entries=entries,
    compute=compute,
    draw=draw,
)
