"""What training does to gradients and weights: the curves and bars of CURE's Figs. 6 and 10.

Everything is of an epoch's last step, as metrics.jsonl has it. The paper's mask keeps the same
share of every tensor by construction, so that shares that differ between layers, as it shows them,
have to be told by a common threshold: the percentile of the scores of all layers together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from statistics import mean
from typing import TYPE_CHECKING, Annotated, Any

from cure_fast.analysis.shape import Analysis, Numbers, Settings, Task
from cure_fast.config.checks import Bounds
from cure_fast.errors import InputError
from cure_fast.figures import (
    FAINT,
    GRID,
    MARKERS,
    PAGE,
    colours,
    epoch_axis,
    line_styles,
    new_figure,
    outside_legend,
)
from cure_fast.runs.epochs import Curves, Epoch, read_curves

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Names in rows, and what metrics.jsonl calls them.
OF_GRADIENTS = {"mean": "mean", "abs_mean": "abs_mean", "norm": "norm", "nonzero": "nonzero"}
OF_MASKS = {"overlap": "mask_overlap", "energy": "masked_energy", "prominent": "prominent"}
# The same of all layers together.
OF_ALL = {
    "overlap": "mask overlap",
    "energy": "mask energy",
    "never_updated": "mask never_updated",
    "prominent_weights": "mask prominent_weights",
    "prominent_vectors": "mask prominent_vectors",
}
PHASES = ("early", "middle", "late")


@dataclass(frozen=True, kw_only=True)
class GradientsSettings(Settings):
    """Settings of ``gradients``."""

    layers: tuple[str, ...] = ()
    """Layers to show, names or patterns such as layer4.*, with commas between; none takes all whose
    gradients were recorded: the last 3x3 convolution of each block."""
    window: Annotated[float, Bounds(0, 1 / 3)] = 0.1
    """Share of the epochs that early, middle and late are means over, 0 to 1/3, at least one."""


def compute(task: Task, settings: GradientsSettings) -> Numbers:
    """Return a row per run, epoch and layer; under ``phases`` means, and under ``masks`` wholes."""
    records = {s.name: read_curves(s.folder) for s in task.subjects if s.folder is not None}
    for record in records.values():
        if not any(row.gradients or row.by_tensor for row in record.stage("train")):
            raise InputError(
                f"{record.folder}: expected epochs that recorded gradients in metrics.jsonl, got "
                "none. Train it with this version."
            )
    chosen = {name: layers_of(record, settings.layers) for name, record in records.items()}
    rows = [
        row_of(name, epoch, layer)
        for name, record in records.items()
        for epoch in record.stage("train")
        for layer in chosen[name]
    ]
    masks = [
        {"model": name, "epoch": epoch.epoch}
        | {key: epoch.numbers.get(told) for key, told in OF_ALL.items()}
        for name, record in records.items()
        for epoch in record.stage("train")
        if any(told in epoch.numbers for told in OF_ALL.values())
    ]
    phases = [
        {"model": name, "phase": phase, "layer": layer, **averaged(rows, name, layer, epochs)}
        for name, record in records.items()
        for phase, epochs in windows(record, settings.window).items()
        for layer in chosen[name]
    ]
    return {"rows": rows, "phases": phases, "masks": masks}


def layers_of(record: Curves, patterns: Sequence[str]) -> list[str]:
    """Return the layers to show, in the order of the network.

    Raises:
        InputError: for a pattern that fits none.
    """
    epochs = record.stage("train")
    own = list(dict.fromkeys(name for row in epochs for name in row.gradients))
    masked = dict.fromkeys(n for row in epochs for by in row.by_tensor.values() for n in by)
    known = list(dict.fromkeys([*masked, *own]))
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in known):
            raise InputError(
                f"--layers: expected layers that {record.folder} recorded ({', '.join(known)}), "
                f"got {pattern!r}."
            )
    if patterns:
        return [name for name in known if any(fnmatch(name, p) for p in patterns)]
    # Earlier versions recorded the mask alone.
    return own or [n for n in known if n.endswith(".conv2.weight")] or known


def row_of(name: str, epoch: Epoch, layer: str) -> dict[str, Any]:
    """Return the numbers of a layer in an epoch; None for what was not recorded."""
    gradients = epoch.gradients.get(layer, {})
    found = {key: gradients.get(told) for key, told in OF_GRADIENTS.items()}
    by_tensor = epoch.by_tensor
    found |= {key: by_tensor.get(told, {}).get(layer) for key, told in OF_MASKS.items()}
    if found["prominent"] is None:
        # A mask by one percentile of all layers keeps just these.
        found["prominent"] = by_tensor.get("updated", {}).get(layer)
    return {"model": name, "epoch": epoch.epoch, "layer": layer, **found}


def windows(record: Curves, share: float) -> dict[str, list[int]]:
    """Return the epochs at the beginning, in the middle and at the end, 1-based."""
    epochs = [row.epoch for row in record.stage("train")]
    width = max(1, math.floor(share * len(epochs)))
    middle = (len(epochs) - width) // 2
    places = (0, middle, len(epochs) - width)
    return {p: epochs[k : k + width] for p, k in zip(PHASES, places, strict=True)}


def averaged(
    rows: Sequence[dict[str, Any]], name: str, layer: str, epochs: Sequence[int]
) -> dict[str, float | None]:
    """Return the means of a layer's shares over epochs."""
    own = [r for r in rows if (r["model"], r["layer"]) == (name, layer) and r["epoch"] in epochs]
    values = {key: [r[key] for r in own if r[key] is not None] for key in ("nonzero", "prominent")}
    return {key: mean(found) if found else None for key, found in values.items()}


def draw(numbers: Numbers) -> Figure:
    """Return gradients by epoch, shares of weights by layer, and the masks by epoch."""
    figure, axes = new_figure(2, 3, width=PAGE, height=4.6)
    for ax, key, label in (
        (axes[0], "mean", "signed mean of the gradient"),
        (axes[1], "abs_mean", "mean magnitude"),
        (axes[2], "norm", "L2 norm"),
    ):
        draw_epochs(ax, numbers, key, label)
    draw_layers(axes[3], numbers, "nonzero", "weights with a gradient in %")
    draw_layers(axes[4], numbers, "prominent", "weights above the common\npercentile in %")
    draw_masks(axes[5], numbers)
    outside_legend(figure, axes, columns=4)
    return figure


def absent(ax: Axes, rows: Sequence[dict[str, Any]], key: str, label: str) -> bool:
    """Return whether no run recorded a number, and say so in its place."""
    missing = all(row[key] is None for row in rows)
    if missing:
        ax.set_axis_off()
        ax.text(0.5, 0.5, f"{label}:\nnot recorded", transform=ax.transAxes, ha="center")
    return missing


def draw_epochs(ax: Axes, numbers: Numbers, key: str, label: str) -> None:
    """Draw a number by epoch: the mean over layers as a line, their range as a band."""
    if absent(ax, numbers["rows"], key, label):
        return
    subjects = numbers["subjects"]
    for subject, style in zip(subjects, line_styles(subjects), strict=True):
        by_epoch: dict[int, list[float]] = {}
        for row in numbers["rows"]:
            if row["model"] == subject["name"] and row[key] is not None:
                by_epoch.setdefault(row["epoch"], []).append(row[key])
        if by_epoch:
            x, values = [*by_epoch], [*by_epoch.values()]
            look: dict[str, Any] = {**style, "marker": "o" if len(x) < 12 else None}
            ax.plot(x, [mean(v) for v in values], label=subject["name"], **look)
            low, high = [min(v) for v in values], [max(v) for v in values]
            ax.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
    if key == "mean":
        ax.axhline(0, color=GRID, linewidth=0.8)
        ax.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    elif any(row[key] for row in numbers["rows"]):
        ax.set_yscale("log")
    epoch_axis(ax)
    ax.set_ylabel(label)


def draw_layers(ax: Axes, numbers: Numbers, key: str, label: str) -> None:
    """Draw a share by layer, early to late: the later, the darker."""
    if absent(ax, numbers["phases"], key, label):
        return
    subjects = numbers["subjects"]
    layers = list(dict.fromkeys(row["layer"] for row in numbers["phases"]))
    for subject, colour in zip(subjects, colours(subjects), strict=True):
        for number, phase in enumerate(PHASES):
            own = {
                layers.index(row["layer"]): 100 * row[key]
                for row in numbers["phases"]
                if (row["model"], row["phase"]) == (subject["name"], phase) and row[key] is not None
            }
            if own:
                look: dict[str, Any] = {
                    "color": colour,
                    "alpha": (0.4, 0.7, 1.0)[number],
                    "markersize": 3,
                }
                ax.plot([*own], [*own.values()], marker=MARKERS[number], linewidth=1, **look)
    for number, phase in enumerate(PHASES):
        ax.plot([], [], MARKERS[number], color=FAINT, label=f"{phase} epochs")
    short = [name.removesuffix(".weight") for name in layers]
    ax.set_xticks(range(len(layers)), short, rotation=60, ha="right", fontsize=5.5)
    ax.set_ylim(0, 104)
    ax.set_ylabel(label)


def draw_masks(ax: Axes, numbers: Numbers) -> None:
    """Draw what the masks of epochs have in common, take, and leave alone for good."""
    if absent(ax, numbers["masks"], "never_updated", "masks"):
        return
    shown = {"overlap": "-", "energy": (0, (5, 1.5)), "never_updated": (0, (1.5, 1.5))}
    names = (
        "overlap with the epoch before",
        "gradient energy masked",
        "masked in each epoch's last step",
    )
    subjects = numbers["subjects"]
    for subject, colour in zip(subjects, colours(subjects), strict=True):
        own = [row for row in numbers["masks"] if row["model"] == subject["name"]]
        for key, dashes in shown.items():
            points = [(r["epoch"], 100 * r[key]) for r in own if r[key] is not None]
            if points:
                ax.plot(*zip(*points, strict=True), color=colour, linestyle=dashes)
    for name, dashes in zip(names, shown.values(), strict=True):
        ax.plot([], [], color=FAINT, linestyle=dashes, label=name)
    ax.set_ylim(0, None)
    epoch_axis(ax)
    ax.set_ylabel("share in %")


GRADIENTS = Analysis(
    name="gradients",
    title="Gradients and updated weights by layer",
    source="CURE, Figs. 6 and 10",
    about=(
        "Of the last step of each epoch, after the mask; lines are means over layers and bands "
        "their range. The mask keeps the same share of each tensor, so that the layers that matter "
        "show above one percentile of the scores of all layers."
    ),
    settings=GradientsSettings(),
    compute=compute,
    draw=draw,
    of_runs=True,
)
