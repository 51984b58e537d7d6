"""The charts of a run: accuracy, loss, learning rate, updated weights and speed over its epochs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from cure_fast.report.html import Html, element, fold, paragraph, scroll, section, table
from cure_fast.report.record import Epoch, Record, Step
from cure_fast.report.svg import (
    Axis,
    Band,
    Line,
    Mark,
    data_uri,
    encode_png,
    heat_colours,
    heat_map,
    legend,
    line_chart,
    linear_axis,
    log_axis,
    nice_step,
)
from cure_fast.report.text import attack_name, method_name, number

STAGES = ("pretrain", "train")
TERMS = {
    "total": "total, which is minimised",
    "natural_ce": "cross-entropy, natural",
    "adversarial_ce": "cross-entropy, adversarial",
    "kl": "KL(natural, adversarial)",
    "consistency": "consistency with the revision model",
}
TERM_STYLES = ("c0", "c1", "c2", "c3", "c4", "c5")
DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 2", "1 2")
# Points of a step line; more would not show on a screen.
MOST_STEPS = 400
# Speeds further apart than this share a logarithmic axis.
WIDE_RANGE = 6


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
        return cls(ends["pretrain"], ends["train"], method_name(record.config["method"]))

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

    def bands(self) -> list[Band]:
        """Return the stages, the first of them shaded."""
        bands = []
        if self.pretrain:
            bands.append(Band(0.0, self.pretrain, "natural pre-training", shaded=True))
        if self.train:
            bands.append(Band(self.pretrain, self.length, self.method, shaded=False))
        return bands


def pieces(
    timeline: Timeline,
    rows: Iterable[Epoch] | Iterable[Step],
    value: Callable[[Epoch | Step], float | None],
    unit: str = "",
) -> list[list[tuple[float, float, str]]]:
    """Return the finite values of ``rows`` as one stretch of points per stage."""
    stretches: dict[str, list[tuple[float, float, str]]] = {name: [] for name in STAGES}
    for row in rows:
        y = value(row)
        if y is not None and math.isfinite(y) and row.stage in stretches:
            text = f"{'pre-training ' if row.stage == 'pretrain' else ''}epoch {row.epoch:g}: "
            stretches[row.stage].append((timeline.x(row), y, f"{text}{y:.4g}{unit}"))
    return [stretch for stretch in stretches.values() if stretch]


def figure(title: str, caption: str, *content: str, class_: str | None = None) -> Html:
    """Return a titled figure with a caption below."""
    heading = element("h3", title)
    return element("figure", heading, *content, element("figcaption", caption), class_=class_)


def missing(title: str, reason: str) -> Html:
    """Return a figure that says why there is none."""
    return element("figure", element("h3", title), paragraph(reason, class_="absent"))


def curves(record: Record) -> Html:
    """Return the section with all charts, and the numbers behind them."""
    if not record.epochs and not record.steps:
        reason = "metrics.jsonl holds no step and no epoch yet: training had not begun to log."
        return section("Training", paragraph(reason, class_="absent"), anchor="training")
    timeline = Timeline.of(record)
    charts = [
        accuracy_chart(record, timeline),
        loss_chart(record, timeline),
        rate_chart(record, timeline),
        speed_chart(record, timeline),
    ]
    return section(
        "Training",
        element("div", *charts, class_="charts"),
        updated_chart(record),
        epoch_table(record),
        anchor="training",
    )


def accuracy_chart(record: Record, timeline: Timeline) -> Html:
    """Return natural and robust accuracy on the validation images, by epoch."""
    title = "Accuracy on validation images"
    rows = [row for row in record.epochs if row.natural is not None]
    if not rows:
        return missing(title, "No epoch with a validation has finished yet.")
    attacks = sorted({attack_name(row.attack) for row in rows if row.attack})
    robust = f"under {' or '.join(attacks)}" if attacks else "under attack"
    lines = [
        Line("natural", "natural", pieces(timeline, rows, _field("natural"), " %")),
        Line(robust, "robust", pieces(timeline, rows, _field("robust"), " %"), "6 3", "square"),
    ]
    lines = [line for line in lines if line.pieces]
    best = record.best
    mark = Mark(timeline.x(best), f"best: epoch {best.epoch}") if best else None
    counts = sorted({row.count for row in rows if row.count})
    caption = (
        f"{' or '.join(f'{c:,}' for c in counts)} images held out of the training set pick the "
        "best epoch, whose weights then meet the test images; no test image is used for it."
    )
    if timeline.pretrain and attacks:
        caption += " Natural pre-training is judged by natural accuracy alone."
    y_axis = linear_axis(100, "accuracy in %")
    chart = line_chart(
        lines,
        timeline.axis(),
        y_axis,
        label=f"Natural accuracy and accuracy {robust} by epoch, in percent",
        bands=timeline.bands(),
        mark=mark,
    )
    return figure(title, caption, legend(lines), chart)


def _field(name: str) -> Callable[[Epoch | Step], float | None]:
    return lambda row: getattr(row, name)


def _term(name: str) -> Callable[[Epoch | Step], float | None]:
    return lambda row: row.terms.get(name)


def loss_chart(record: Record, timeline: Timeline) -> Html:
    """Return each term of the loss by epoch, and the total of single steps behind them."""
    names = list(dict.fromkeys(name for row in record.epochs for name in row.terms))
    names = sorted(names, key=lambda name: name != "total")
    lines = [
        Line(
            TERMS.get(name, name.replace("_", " ")),
            TERM_STYLES[index % len(TERM_STYLES)],
            pieces(timeline, record.epochs, _term(name)),
            DASHES[index % len(DASHES)],
        )
        for index, name in enumerate(names)
    ]
    lines = [line for line in lines if line.pieces]
    every = max(1, math.ceil(len(record.steps) / MOST_STEPS))
    single = pieces(timeline, record.steps[::every], _term("total"))
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
    chart = line_chart(
        lines,
        timeline.axis(),
        linear_axis(high, "loss", low=min(0.0, *heights, *steps)),
        label="Terms of the loss by epoch",
        bands=timeline.bands(),
    )
    return figure("Loss", caption, legend(lines), chart)


def rate_chart(record: Record, timeline: Timeline) -> Html:
    """Return the learning rate over the run."""
    rows = record.steps or record.epochs
    every = max(1, math.ceil(len(rows) / MOST_STEPS))
    line = Line("learning rate", "c1", pieces(timeline, rows[::every], _field("lr")), marker="none")
    if not line.pieces:
        return missing("Learning rate", "No step was logged.")
    high = max(y for piece in line.pieces for _, y, _ in piece)
    optim = record.config["optim"]
    caption = (
        f"Schedule {optim.get('schedule', 'not recorded')}, peak {optim.get('lr', 'not recorded')}."
    )
    chart = line_chart(
        [line],
        timeline.axis(),
        linear_axis(high, "learning rate"),
        label="Learning rate over the epochs",
        bands=timeline.bands(),
    )
    return figure("Learning rate", caption, chart)


def speed_chart(record: Record, timeline: Timeline) -> Html:
    """Return the training images per second of each epoch."""
    # An epoch that is resumed behind its last step trains on no image.
    rows = [row for row in record.epochs if row.images_per_s]
    line = Line("images/s", "c3", pieces(timeline, rows, _field("images_per_s"), " images/s"))
    speeds = [y for piece in line.pieces for _, y, _ in piece]
    if not speeds:
        return missing("Speed", "No epoch has finished yet.")
    if max(speeds) / min(speeds) > WIDE_RANGE:
        axis, scale = log_axis(min(speeds), max(speeds), "images/s"), " The axis is logarithmic."
    else:
        axis, scale = linear_axis(max(speeds), "images/s"), ""
    caption = f"Training images per second, validation not counted.{scale}"
    chart = line_chart(
        [line],
        timeline.axis(),
        axis,
        label="Training images per second by epoch",
        bands=timeline.bands(),
    )
    return figure("Speed", caption, chart)


def updated_chart(record: Record) -> Html:
    """Return the fraction of weights whose gradient was kept, by tensor and epoch."""
    title = "Weights updated per layer"
    settings = record.config.get("settings") or {}
    rows = [row for row in record.stage("train") if row.updated]
    if not rows:
        reason = (
            "No epoch with a mask has finished yet."
            if settings.get("rgp")
            else "This method masks no gradients: every weight is updated in every step."
        )
        return missing(title, reason)
    names = list(dict.fromkeys(name for row in rows for name in row.updated or {}))
    values = np.array([[(row.updated or {}).get(name, np.nan) for row in rows] for name in names])
    low, high = 100 * np.nanmin(values), 100 * np.nanmax(values)
    caption = (
        "Share of each tensor's weights whose gradient the mask kept, mean over the epoch's steps "
        f"({low:.1f} to {high:.1f} % here). "
    )
    if settings.get("mask_scope", "tensor") == "tensor":
        percentile = settings.get("percentile")
        kept = "" if percentile is None else f", near {100 - percentile:g} %"
        caption += (
            f"The mask cuts at a percentile of each tensor by itself, so this share is nearly "
            f"constant by construction{kept}; small tensors deviate as they count in whole weights."
        )
    else:
        caption += "The mask cuts at one percentile over all tensors, so layers differ."
    if settings.get("freeze", "grad") == "grad":
        caption += " Momentum and weight decay still move the weights that are masked."
    drawing = heat_map(names, [str(row.epoch) for row in rows], values, label=f"{title}. {caption}")
    scale = element(
        "p",
        "0 %",
        element("img", src=_scale(), alt="colour scale from dark blue to yellow"),
        "100 %",
        class_="scale",
    )
    return figure(title, caption, scale, scroll(drawing, title), class_="wide")


def _scale() -> str:
    return data_uri(encode_png(heat_colours(np.linspace(0, 1, 128)[None, :])))


def epoch_table(record: Record) -> Html:
    """Return the numbers behind the charts, folded away."""
    if not record.epochs:
        return paragraph("No epoch has finished yet.", class_="absent")
    names = list(dict.fromkeys(name for row in record.epochs for name in row.terms))
    header = ["Epoch", "Natural %", "Robust %", "Learning rate", "Images/s", "Seconds"]
    header += [name.replace("_", " ") for name in names]
    best = record.best
    rows = []
    for row in record.epochs:
        stage = "pre-training " if row.stage == "pretrain" else ""
        star = " (best)" if best is not None and row is best else ""
        cells = [f"{stage}{row.epoch}{star}", _cell(row.natural, ".1f"), _cell(row.robust, ".1f")]
        cells += [f"{row.lr:.3g}", _cell(row.images_per_s, ",.0f"), _cell(row.seconds, ".1f")]
        rows.append([*cells, *(number(row.terms[n]) if n in row.terms else "" for n in names)])
    whole = table(
        header, rows, caption="Validation accuracy and mean loss of every epoch", class_="numbers"
    )
    return fold("The numbers behind the charts", whole)


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
