"""The charts of a run: accuracy, loss, learning rate, speed and its policies' over its epochs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
from markupsafe import Markup

from cure_fast.policies.conserve import BY_LAYER
from cure_fast.report.record import Record
from cure_fast.report.svg import (
    Axis,
    Band,
    Line,
    heat_colours,
    heat_map,
    legend,
    line_chart,
    linear_axis,
    nice_step,
    picture,
)
from cure_fast.report.text import attack_name, number
from cure_fast.runs.epochs import Epoch, Reached, Step

STAGES = ("pretrain", "train")
TERMS = {
    "total": "total, which is minimised",
    "natural_ce": "cross-entropy, natural",
    "adversarial_ce": "cross-entropy, adversarial",
    "kl": "KL(natural, adversarial)",
}
# Terms that are no part of the loss.
NO_LOSS = {"natural_accuracy", "adversarial_accuracy", "gradient_norm"}
# What an epoch's row holds of the mask as a whole.
MASK = {
    "energy": "gradient energy masked",
    "overlap": "overlap with the epoch before",
    "never_updated": "never updated so far",
}
TERM_STYLES = ("c0", "c1", "c2", "c3", "c4", "c5")
DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 2", "1 2")
# Points of a step line; more would not show on a screen.
MOST_STEPS = 400


@dataclass(frozen=True)
class Timeline:
    """Both stages on one axis: natural pre-training first, then the method's epochs."""

    pretrain: float
    train: float
    method: str

    @classmethod
    def of(cls, record: Record) -> Timeline:
        """Return the axis that holds every epoch and step of the record."""
        ends: dict[str, float] = dict.fromkeys(STAGES, 0.0)
        rows: list[Epoch | Step] = [*record.epochs, *record.steps]
        for row in rows:
            ends[row.stage] = max(ends.get(row.stage, 0.0), math.ceil(row.epoch))
        return cls(ends["pretrain"], ends["train"], record.label)

    @property
    def length(self) -> float:
        """Epochs of both stages, at least one."""
        return max(1.0, self.pretrain + self.train)

    def x(self, row: Epoch | Step) -> float:
        """Return where an epoch or a step lies."""
        return row.epoch + (self.pretrain if row.stage == "train" else 0.0)

    def axis(self) -> Axis:
        """Return the axis; its numbers begin anew with the second stage."""
        step = max(1, round(nice_step(max(self.length, 2), 8)))
        clear = 0.05 * self.length
        first = range(0, int(self.pretrain) + 1, step)
        ticks = [(float(t), str(t)) for t in first if not 0 < self.pretrain - t < clear]
        second = range(step if self.pretrain else 0, int(self.train) + 1, step)
        ticks += [(self.pretrain + t, str(t)) for t in second]
        return Axis(0.0, self.length, ticks, "epoch")

    def chart(
        self, lines: list[Line], y_axis: Axis, label: str, mark: tuple[float, str] | None = None
    ) -> Markup:
        """Return a chart of lines over both stages, the first of them shaded."""
        bands = []
        if self.pretrain:
            bands.append(Band(0.0, self.pretrain, "natural pre-training", shaded=True))
        if self.train:
            bands.append(Band(self.pretrain, self.length, self.method, shaded=False))
        return line_chart(lines, self.axis(), y_axis, label=label, bands=bands, mark=mark)


def pieces(
    timeline: Timeline,
    rows: Sequence[Epoch] | Sequence[Step],
    values: Iterable[float | None],
    unit: str = "",
) -> list[list[tuple[float, float, str]]]:
    """Return the finite values, one for each row, as one stretch of points per stage."""
    stretches: dict[str, list[tuple[float, float, str]]] = {name: [] for name in STAGES}
    for row, y in zip(rows, values, strict=True):
        if y is not None and math.isfinite(y) and row.stage in stretches:
            text = f"{'pre-training ' if row.stage == 'pretrain' else ''}epoch {row.epoch:g}: "
            stretches[row.stage].append((timeline.x(row), y, f"{text}{y:.4g}{unit}"))
    return [stretch for stretch in stretches.values() if stretch]


# A figure of the page, by the names that the template knows.
Figure = dict[str, Any]


def figure(title: str, caption: str, drawing: Markup, **further: Any) -> Figure:
    """Return a figure: its drawing with what stands around it."""
    empty = {"absent": None, "legend": "", "high": None}
    return {**empty, "title": title, "caption": caption, "drawing": drawing, **further}


def missing(title: str, reason: str) -> Figure:
    """Return a figure that says why there is none."""
    return figure(title, "", Markup(), absent=reason)


def training(record: Record) -> dict[str, Any] | None:
    """Return the charts of a run and the numbers behind them; None where nothing is logged."""
    if not record.epochs and not record.steps:
        return None
    timeline, rows = Timeline.of(record), record.stage("train")
    charts = [
        accuracy_chart(record, timeline),
        loss_chart(record, timeline),
        mask_chart(record, timeline),
        norm_chart(record, timeline),
        rate_chart(record, timeline),
        speed_chart(record, timeline),
    ]
    names = dict.fromkeys(key for row in rows for key in row.by_tensor)
    return {
        "charts": [chart for chart in charts if chart is not None],
        "layers": [heat_chart(rows, name) for name in names],
        "table": epoch_table(record),
    }


def accuracy_chart(record: Record, timeline: Timeline) -> Figure:
    """Return natural and robust accuracy on the validation images, by epoch."""
    trained_on = any("natural_accuracy" in row.terms for row in record.epochs)
    title = f"Accuracy {'in training and ' if trained_on else ''}on validation images"
    rows = [row for row in record.epochs if row.natural is not None]
    if not rows:
        return missing(title, "No epoch with a validation has finished yet.")
    attacks = sorted({attack_name(row.attack) for row in rows if row.attack})
    robust = f"under {' or '.join(attacks)}" if attacks else "under attack"
    network = next((row.network for row in rows if row.network is not None), None)
    of = "" if network is None else f" ({network} network)"
    shown = [
        (f"natural{of}", [row.natural for row in rows], "natural", "", "circle"),
        (f"{robust}{of}", [row.robust for row in rows], "robust", "6 3", "square"),
        (f"under FGSM{of}", [row.fgsm for row in rows], "c1", "4 2", "square"),
    ]
    for name, dash in zip(record.bests, cycle(("2 3", "1 2", "9 3 2 3")), strict=False):
        found = [row.others.get(name) for row in rows]
        natural, attacked = ([each and each[k] for each in found] for k in (0, 1))
        shown.append((f"natural ({name} network)", natural, "c3", dash, "circle"))
        shown.append((f"{robust} ({name} network)", attacked, "c4", dash, "square"))
    lines = [
        Line(name, style, pieces(timeline, rows, values, " %"), dash, marker)
        for name, values, style, dash, marker in shown
    ]
    lines += [
        Line(name, style, pieces(timeline, record.epochs, values, " %"), "1 3", "none")
        for name, style, values in (
            ("natural, in training", "natural", terms_of(record, "natural_accuracy")),
            ("training attack, in training", "robust", terms_of(record, "adversarial_accuracy")),
        )
    ]
    lines = [line for line in lines if line.pieces]
    best = record.best
    mark = (timeline.x(best), f"best: epoch {best.epoch}") if best else None
    counts = sorted({row.count for row in rows if row.count})
    caption = (
        f"{' or '.join(f'{c:,}' for c in counts)} images held out of the training set pick the "
        "best epoch, whose weights then meet the test images; no test image is used for it."
    )
    if trained_on:
        caption += (
            " In training: on the batches of the epoch, augmented, by the network in training mode "
            "before each step moves it; far above validation it has learned them by heart."
        )
    if timeline.pretrain and attacks:
        caption += " Natural pre-training is judged by natural accuracy alone."
    if network is not None:
        caption += (
            f" The {network} network is the run's result, which decides; raw is the network that "
            "the optimiser moves."
        )
    if record.bests:
        told = (f"epoch {best.epoch} of the {name} network" for name, best in record.bests.items())
        caption += f" The others have best epochs of their own: {', '.join(told)}."
    if collapsed := [str(row.epoch) for row in rows if row.collapsed]:
        caption += (
            f" Catastrophic overfitting in epoch {', '.join(collapsed)}: right under one step, "
            "wrong under PGD. Such an epoch is never the best."
        )
    label = f"Natural accuracy and accuracy {robust} by epoch, in percent"
    chart = timeline.chart(lines, linear_axis(100, "accuracy in %"), label, mark)
    return figure(title, caption, chart, legend=legend(lines))


def loss_chart(record: Record, timeline: Timeline) -> Figure:
    """Return each term of the loss by epoch, and the total of single steps behind them."""
    names = list(dict.fromkeys(name for row in record.epochs for name in row.terms))
    names = sorted((n for n in names if n not in NO_LOSS), key=lambda name: name != "total")
    lines = []
    for name, style, dash in zip(names, cycle(TERM_STYLES), cycle(DASHES), strict=False):
        points = pieces(timeline, record.epochs, (row.terms.get(name) for row in record.epochs))
        lines.append(Line(TERMS.get(name, name.replace("_", " ")), style, points, dash))
    lines = [line for line in lines if line.pieces]
    shown = record.steps[:: max(1, math.ceil(len(record.steps) / MOST_STEPS))]
    single = pieces(timeline, shown, (row.terms.get("total") for row in shown))
    heights = [y for line in lines for piece in line.pieces for _, y, _ in piece]
    steps = [y for piece in single for _, y, _ in piece]
    if not heights and not steps:
        return missing("Loss", "No finite loss was logged.")
    high = 1.15 * max(heights) if heights else max(steps)
    faint = Line("total of single steps", "c0", single, marker="none", faint=True)
    lines = [faint, *lines] if single else lines
    caption = "Means over each epoch, of natural and adversarial training batches."
    if any(y > high for y in steps):
        caption += " Single steps above the axis are cut off."
    axis = linear_axis(high, "loss", low=min(0.0, *heights, *steps))
    chart = timeline.chart(lines, axis, "Terms of the loss by epoch")
    return figure("Loss", caption, chart, legend=legend(lines))


def terms_of(record: Record, name: str) -> list[float | None]:
    """Return a term's mean in each epoch."""
    return [row.terms.get(name) for row in record.epochs]


def norm_chart(record: Record, timeline: Timeline) -> Figure | None:
    """Return the norm of the gradient by epoch; None where it was not logged."""
    lines = [Line("norm", "c2", pieces(timeline, record.epochs, terms_of(record, "gradient_norm")))]
    heights = [y for piece in lines[0].pieces for _, y, _ in piece]
    if not heights:
        return None
    axis = linear_axis(max(heights), "norm")
    chart = timeline.chart(lines, axis, "Norm of the gradient by epoch")
    caption = "L2 norm over all weights, a mean over the steps, before masking and clipping."
    return figure("Norm of the gradient", caption, chart)


def mask_chart(record: Record, timeline: Timeline) -> Figure | None:
    """Return what the mask does as a whole by epoch; None where there is none."""
    rows = record.stage("train")
    lines = []
    for (key, name), style, dash in zip(MASK.items(), TERM_STYLES[1:], DASHES, strict=False):
        values = [row.numbers.get(f"mask {key}") for row in rows]
        shares = [None if value is None else 100 * value for value in values]
        lines.append(Line(name, style, pieces(timeline, rows, shares, " %"), dash))
    lines = [line for line in lines if line.pieces]
    if not lines:
        return None
    caption = (
        "Of all maskable weights, by the masks of each epoch's last step. Energy: squares of the "
        "masked weights' scores over those of all; small, the mask takes what gradients hardly "
        "ask for. Overlap: masked in this epoch and the one before, of all masked in one of the "
        "two (Jaccard). Never updated: masked in every epoch so far."
    )
    rgp = (record.config.get("policies") or {}).get("rgp", {})
    percent = (record.config.get("settings") or {}).get("percentile", rgp.get("rgp_percentile"))
    if isinstance(percent, int | float) and 0 < percent <= 100:
        chance = 100 * percent / (200 - percent)
        caption += f" Masks of {percent:g} % drawn at random overlap by {chance:.0f} %."
    chart = timeline.chart(lines, linear_axis(100, "share in %"), "What the mask does by epoch")
    return figure("What the mask does", caption, chart, legend=legend(lines))


def rate_chart(record: Record, timeline: Timeline) -> Figure:
    """Return the learning rate over the run."""
    rows = record.steps or record.epochs
    rows = rows[:: max(1, math.ceil(len(rows) / MOST_STEPS))]
    points = pieces(timeline, rows, (row.lr for row in rows))
    line = Line("learning rate", "c1", points, marker="none")
    if not line.pieces:
        return missing("Learning rate", "No step was logged.")
    high = max(y for piece in line.pieces for _, y, _ in piece)
    schedule, peak = (record.config["optim"].get(k, "not recorded") for k in ("schedule", "lr"))
    caption = f"Schedule {schedule}, peak {peak}."
    axis = linear_axis(high, "learning rate")
    chart = timeline.chart([line], axis, "Learning rate over the epochs")
    return figure("Learning rate", caption, chart)


def speed_chart(record: Record, timeline: Timeline) -> Figure:
    """Return the training images per second of each epoch."""
    # An epoch that is resumed behind its last step trains on no image.
    rows = [row for row in record.epochs if row.images_per_s]
    points = pieces(timeline, rows, (row.images_per_s for row in rows), " images/s")
    if not points:
        return missing("Speed", "No epoch has finished yet.")
    axis = linear_axis(max(y for piece in points for _, y, _ in piece), "images/s")
    lines = [Line("images/s", "c3", points)]
    chart = timeline.chart(lines, axis, "Training images per second by epoch")
    return figure("Speed", "Training images per second, validation not counted.", chart)


def heat_chart(epochs: list[Epoch], key: str) -> Figure:
    """Return a heat map by layer and epoch of shares that policies recorded of each layer."""
    title, caption = BY_LAYER.get(key, (f"{key.replace('_', ' ')} by layer", ""))
    rows = {row.epoch: row.by_tensor[key] for row in epochs if key in row.by_tensor}
    names = list(dict.fromkeys(name for values in rows.values() for name in values))
    values = np.array([[row.get(name, np.nan) for row in rows.values()] for name in names]) * 100
    high = linear_axis(max(float(np.nanmax(values)), 1e-9), "").high
    label = f"{title}. {caption}"
    drawing = heat_map(names, [str(epoch) for epoch in rows], values, high=high, label=label)
    colours = picture(heat_colours(np.linspace(0, 1, 128)[None, :]))
    return figure(title, caption, drawing, high=f"{high:g} %", colours=colours)


def epoch_table(record: Record) -> dict[str, Any] | None:
    """Return the numbers behind the charts; None before the first epoch is finished."""
    if not record.epochs:
        return None
    names = list(dict.fromkeys(name for row in record.epochs for name in row.terms))
    header = ["Epoch", "Natural %", "Robust %", "Learning rate", "Images/s", "Seconds"]
    further: dict[str, list[float | None]] = {}
    if any(row.fgsm is not None for row in record.epochs):
        further["FGSM %"] = [row.fgsm for row in record.epochs]
    bests = record.bests
    for name in bests:
        found = [row.others.get(name) for row in record.epochs]
        for k, word in enumerate(Reached._fields):
            further[f"{name} {word}"] = [each and each[k] for each in found]
    for name in dict.fromkeys(name for row in record.epochs for name in row.numbers):
        further[name] = [row.numbers.get(name) for row in record.epochs]
    header += [name.replace("_", " ") for name in (*names, *further)]
    best = record.best
    rows = []
    for index, row in enumerate(record.epochs):
        stage = "pre-training " if row.stage == "pretrain" else ""
        star = " (best)" if best is not None and row is best else ""
        star += "".join(f" (best of {name})" for name, own in bests.items() if row is own)
        star += " (collapsed)" if row.collapsed else ""
        cells = [f"{stage}{row.epoch}{star}", _cell(row.natural, ".1f"), _cell(row.robust, ".1f")]
        cells += [f"{row.lr:.3g}", _cell(row.images_per_s, ",.0f"), _cell(row.seconds, ".1f")]
        values = [row.terms.get(name) for name in names]
        values += [column[index] for column in further.values()]
        rows.append([*cells, *("" if value is None else number(value) for value in values)])
    return {"header": header, "rows": rows}


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
