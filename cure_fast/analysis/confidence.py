"""Calibration: whether a network is right as often as it is sure, natural and under attack."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import torch
from torch import Tensor

from cure_fast.analysis.shape import Analysis, Numbers, Settings, Subject, Task
from cure_fast.config.attack_names import attack_name, parse_single
from cure_fast.config.checks import Bounds
from cure_fast.figures import INK, PAGE, line_styles, new_figure, outside_legend

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = ("natural", "attacked")


@dataclass(frozen=True, kw_only=True)
class ConfidenceSettings(Settings):
    """Settings of ``confidence``."""

    attack: str = "pgd20"
    """What attacks: pgdK, cwK or fgsm, as for cure-fast eval."""
    bins: Annotated[int, Bounds(1, 1000)] = 15
    """Bins of confidence, of equal width, 1 to 1000."""


def compute(task: Task, settings: ConfidenceSettings) -> Numbers:
    """Return how sure and how often right each network is; ``bins`` has it by confidence.

    The accuracy on attacked images is that on these alone: an image counts, too, that is wrong
    without the attack and right with it.
    """
    parse_single(settings.attack)

    def measured(subject: Subject, kind: str) -> dict[str, Any]:
        natural = kind == "natural"
        images = task.pixels if natural else task.attacked(subject, settings.attack)
        return calibration(task.logits(subject.network, images), task.labels, settings.bins)

    found = task.each(
        {
            f"{subject.name}, {kind}": partial(measured, subject, kind)
            for kind in KINDS
            for subject in task.subjects
        },
        "confidence",
    )
    rows, bins = [], []
    for subject in task.subjects:
        for kind in KINDS:
            own, common = found[f"{subject.name}, {kind}"], {"model": subject.name, "on": kind}
            rows.append(common | {k: v for k, v in own.items() if k != "bins"})
            bins += [common | each for each in own["bins"]]
    return {"rows": rows, "bins": bins}


def calibration(logits: Tensor, labels: Tensor, bins: int) -> dict[str, Any]:
    """Return accuracy, mean confidence and calibration error of answers, in percent.

    A confidence is the largest probability. Bin m of M has the answers B_m with a confidence in
    ((m - 1) / M, m / M], and the expected calibration error of n answers is
    ``ece = sum_m |B_m| / n * |acc(B_m) - conf(B_m)|`` with the bins' accuracies and mean
    confidences (Guo et al., On Calibration of Modern Neural Networks, ICML 2017, eq. 3).

    Args:
        logits: [N, K].
        labels: int64 [N].
        bins: their number.

    Returns:
        ``accuracy``, ``confidence``, ``ece``; ``confidence_right`` and ``confidence_wrong``, the
        mean confidence of right and wrong answers, None where there are none; and ``bins``, for
        each that is not empty the place of its middle ``middle``, its ``share`` of the answers,
        ``confidence`` and ``accuracy``, all in percent.
    """
    sure, answers = logits.double().softmax(1).max(1)
    right = (answers == labels).double()
    place = ((sure * bins).ceil().long() - 1).clamp(0, bins - 1)
    counts = place.bincount(minlength=bins)
    sums = {
        name: torch.zeros(bins, dtype=torch.float64).index_add(0, place, values)
        for name, values in (("confidence", sure), ("accuracy", right))
    }
    gaps = (sums["accuracy"] - sums["confidence"]).abs().sum()
    filled = [
        {
            "middle": 100 * (m + 0.5) / bins,
            "share": 100 * count / len(labels),
            **{name: 100 * float(total[m]) / count for name, total in sums.items()},
        }
        for m, count in enumerate(counts.tolist())
        if count
    ]
    return {
        "accuracy": 100 * int(right.sum()) / len(labels),
        "confidence": 100 * float(sure.mean()),
        "ece": 100 * float(gaps) / len(labels),
        "confidence_right": mean_or_none(sure[right == 1]),
        "confidence_wrong": mean_or_none(sure[right == 0]),
        "bins": filled,
    }


def mean_or_none(values: Tensor) -> float | None:
    """Return the mean in percent, None of nothing."""
    return 100 * float(values.mean()) if len(values) else None


def draw(numbers: Numbers) -> Figure:
    """Return reliability diagrams of natural and attacked images, above how sure answers are."""
    subjects = numbers["subjects"]
    figure, axes = new_figure(
        2, 2, width=PAGE, height=4.2, sharex=True, sharey="row", height_ratios=(2.2, 1)
    )
    attack = attack_name(numbers["settings"]["attack"])
    errors = {(row["model"], row["on"]): row["ece"] for row in numbers["rows"]}
    titles = {"natural": "natural images", "attacked": f"under {attack}"}
    for place, kind in enumerate(KINDS):
        above, below = axes[place], axes[2 + place]
        above.plot([0, 100], [0, 100], color=INK, linewidth=0.8, linestyle=":")
        for subject, style in zip(subjects, line_styles(subjects), strict=True):
            name = subject["name"]
            own = [b for b in numbers["bins"] if (b["model"], b["on"]) == (name, kind)]
            sure, right, middles, shares = (
                [each[key] for each in own] for key in ("confidence", "accuracy", "middle", "share")
            )
            # Whole markers where all or nothing is right.
            both = (f"{errors[name, on]:.1f} % {on}" for on in KINDS)
            above.plot(sure, right, label=f"{name}, ECE {', '.join(both)}", clip_on=False, **style)
            below.plot(middles, shares, clip_on=False, **style)
        above.set_title(titles[kind])
        for panel in (above, below):
            panel.set_xlim(0, 100)
            panel.set_ylim(0, 100)
        below.set_xlabel("confidence in %")
    axes[0].set_ylabel("accuracy in %")
    axes[2].set_ylabel("share of images in %")
    outside_legend(figure, axes[:1], columns=2)
    return figure


CONFIDENCE = Analysis(
    name="confidence",
    title="Calibration, natural and under attack",
    source="Guo et al. 2017, Fig. 1",
    about=(
        "Answers are sorted by their confidence into bins of equal width; on the dotted line a "
        "network is right as often as it is sure, below it is too sure. ECE is the mean distance "
        "from the line."
    ),
    settings=ConfidenceSettings(),
    compute=compute,
    draw=draw,
)
