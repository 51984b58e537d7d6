"""Which blocks of a naturally trained network learn robustness: the study U-b of CURE's Section 3.

The paper's nine sets of blocks, each with its convolutions drawn anew (Fig. 2b) and without (Fig.
11); what is not named is frozen. In the authors' code the stem is never frozen, and frozen
BatchNorm follows the batches; ``--blocks-stem trained --blocks-statistics train`` with
``--policies blocks`` gives that to a run, and the study takes the policy's own choices. Of the
maps of Fig. 3 the diagonals are drawn; ``cure-fast analyze cka`` draws the whole map of a run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

import numpy as np
import torch

from cure_fast.analysis.cka import CKA, CkaSettings
from cure_fast.analysis.shape import Numbers, Subject, task_of
from cure_fast.config import Config
from cure_fast.console import say
from cure_fast.errors import InputError
from cure_fast.figures import INK, MARK, PAGE, new_figure, outside_legend
from cure_fast.files import user_path
from cure_fast.loaders import read_dataset
from cure_fast.models import ImageClassifier
from cure_fast.models.building import load_model
from cure_fast.models.weights import WEIGHTS_FILE
from cure_fast.policies.blocks import stages_of
from cure_fast.runs.environment import choose_device
from cure_fast.runs.threads import choose_threads, threads
from cure_fast.training.stages import START, new_model
from cure_fast.training.studies.drawing import entry_lines, epoch_lines, paired_bars
from cure_fast.training.studies.shape import Found, Study, begins_naturally

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SETS = ("1", "2", "3", "4", "12", "23", "34", "123", "234")
ST, WHOLE = "ST", "full AT"
# Test images that CKA is estimated on, in one batch.
IMAGES = 256
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
    """Return accuracies of start, whole and sets, robust accuracy by epoch, CKA by layer."""
    names = [*found.records]
    rows = [found.row(WHOLE, "start") | {"entry": ST}, *(found.row(name) for name in names)]
    return {
        "rows": rows,
        "robust": {name: found.by_epoch(name, lambda row: row.robust) for name in names},
        "cka": similarity(found),
    }


def similarity(found: Found) -> dict[str, dict[str, float | None]]:
    """Return CKA of the features of natural and PGD-20 images by entry and layer.

    Of the first :data:`IMAGES` test images and all layers that ``cure-fast analyze cka`` sees, in
    its order; a mean over seeds, None where a layer's features do not vary.
    """
    config = found.config
    assert config is not None
    data = config.data
    root = user_path(data.data_root, "--data-root")
    test = read_dataset(data.data, root, "test", image_size=data.image_size)
    test = test.subset(np.arange(min(IMAGES, len(test))))
    device = choose_device(config.run.device)

    def network(weights: Path) -> ImageClassifier:
        return load_model(weights, trusted=config.model.model).to(device).eval()

    first = network(found.records[WHOLE][0].folder / WEIGHTS_FILE)
    sizes = {"image_size": test.image_size, "batch_size": config.eval.eval_batch_size}
    number = choose_threads(config.run.threads, first, device, **sizes)

    def diagonal(weights: Path, seed: int) -> dict[str, float | None]:
        seeded = replace(config, run=replace(config.run, seed=seed))
        task = task_of([Subject(WHOLE, model=network(weights))], test, seeded, device)
        rows = CKA.run(task, CkaSettings()).rows
        return {r["natural"]: r["cka"] for r in rows if r["natural"] == r["adversarial"]}

    weights = {ST: [run.folder / START for run in found.records[WHOLE]]} | {
        name: [run.folder / WEIGHTS_FILE for run in runs] for name, runs in found.records.items()
    }
    parts = {
        f"{name}, seed {seed}": partial(diagonal, path, seed)
        for name, paths in weights.items()
        for seed, path in enumerate(paths)
    }
    with threads(number):
        own = found.kept.each(parts, "cka")

    def averaged(name: str, layer: str) -> float | None:
        found = (own[f"{name}, seed {seed}"][layer] for seed in range(len(weights[name])))
        values = [value for value in found if value is not None]
        return mean(values) if len(values) == len(weights[name]) else None

    return {
        name: {layer: averaged(name, layer) for layer in own[f"{name}, seed 0"]} for name in weights
    }


def draw(numbers: Numbers) -> Figure:
    """Return a row of panels per variant: accuracies, robust accuracy by epoch, CKA by layer."""
    # Bars of all nine sets need more room, and their names too.
    most = 2 + max(sum(f"U-{b}{end}" in numbers["robust"] for b in SETS) for end in VARIANTS)
    crowded = most > 8
    ratios = [5 if crowded else 3, 2, 2]
    figure, panels = new_figure(2, 3, width=PAGE, height=5, sharey="col", width_ratios=ratios)
    for (ending, title), (bars, epochs, layers) in zip(
        VARIANTS.items(), (panels[:3], panels[3:]), strict=True
    ):
        own = {f"U-{blocks}{ending}": f"U-{blocks}" for blocks in SETS}
        rows = [row for row in numbers["rows"] if row["entry"] in (ST, WHOLE, *own)]
        below = [row["entry"].removesuffix(ending).replace(" ", "\n") for row in rows]
        paired_bars(bars, rows, below, numbers["attack"], paper=False)
        if crowded:
            bars.tick_params(axis="x", rotation=90)
        shown = {name: short for name, short in own.items() if name in numbers["robust"]}
        curves = {short: numbers["robust"][name] for name, short in shown.items()}
        epoch_lines(epochs, curves, "robust, validation, in %", linewidth=1)
        whole = numbers["robust"][WHOLE]
        epochs.plot(
            whole["epochs"], whole["values"], color=INK, marker=".", linewidth=1, label=WHOLE
        )
        draw_similarity(layers, numbers["cka"], shown)
        for axes in (bars, epochs, layers):
            axes.set_title(f"blocks {title}", loc="left")
    outside_legend(figure, panels, columns=7)
    return figure


def draw_similarity(
    axes: Axes, cka: Mapping[str, Mapping[str, float | None]], shown: Mapping[str, str]
) -> None:
    """Draw CKA by the place of layers of start, whole and the entries ``shown``, by short name."""
    places = {
        name: (range(1, len(layers) + 1), [math.nan if v is None else v for v in layers.values()])
        for name, layers in cka.items()
    }
    entry_lines(axes, {short: places[name] for name, short in shown.items()}, linewidth=1)
    axes.plot(*places[WHOLE], color=INK, linewidth=1, label=WHOLE)
    axes.plot(*places[ST], color=MARK, linewidth=1.6, label=ST)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("layer")
    axes.set_ylabel("CKA, natural and PGD-20")


LAYERWISE = Study(
    name="layerwise",
    title="Which blocks of a naturally trained network learn robustness",
    source="CURE, Fig. 2 to 4 and 11",
    about=(
        "U-b trains the blocks b by PGD-AT, and freezes all others with stem, classifier and "
        "statistics; ST is the natural start, and full AT trains all of it. By epoch on validation "
        "images, where the paper has test images. On the right how alike features of natural and "
        "adversarial images are, from the first layer to the last."
    ),
    method="pgd_at",
    entries=entries,
    compute=compute,
    draw=draw,
)
