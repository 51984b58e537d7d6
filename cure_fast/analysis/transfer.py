"""Black-box attacks: adversarial images of one network on another, and Square without gradients.

Transfer is that of Papernot et al., Practical Black-Box Attacks against Machine Learning, 2017;
Square is Andriushchenko et al.'s (ECCV 2020), as AutoAttack has it, alone and with fewer queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cure_fast.analysis.shape import Analysis, Numbers, Settings, Subject, Task
from cure_fast.config.attack_names import attack_name, parse_single
from cure_fast.config.checks import Whole
from cure_fast.evaluation.autoattack import autoattack_settings
from cure_fast.evaluation.evaluate import measuring
from cure_fast.evaluation.measurement import Measurement
from cure_fast.evaluation.trust import Guard
from cure_fast.figures import COLUMN, PAGE, new_figure
from cure_fast.figures.panels import heat_map
from cure_fast.progress import Progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NO_ATTACK = "no attack"
SQUARE = "Square (black box)"
# Of names on the axes.
LONG = 18


@dataclass(frozen=True, kw_only=True)
class TransferSettings(Settings):
    """Settings of ``transfer``."""

    attack: str = "pgd20"
    """What makes each network's adversarial images: pgdK, cwK or fgsm, as for cure-fast eval."""
    square_queries: Whole = 1000
    """Queries of Square on each network, per image; AutoAttack's has 5000, and 0 leaves it out."""


def compute(task: Task, settings: TransferSettings) -> Numbers:
    """Return the accuracy of each network on the adversarial images of each."""
    parse_single(settings.attack)
    names = [subject.name for subject in task.subjects]

    def accuracies(source: Subject | None) -> list[float]:
        """Return the accuracy of all networks on the images of one, or on the natural ones."""
        right = [right_on(task, subject, task.pixels) for subject in task.subjects]
        if source is not None:
            attacked = task.attacked(source, settings.attack)
            after = [right_on(task, subject, attacked) for subject in task.subjects]
            right = [a & b for a, b in zip(right, after, strict=True)]
        return [100 * int(flags.sum()) / len(flags) for flags in right]

    parts = {f"images of {subject.name}": partial(accuracies, subject) for subject in task.subjects}
    matrix = task.each({NO_ATTACK: partial(accuracies, None), **parts}, "transfer")
    found = dict(zip([NO_ATTACK, *names], matrix.values(), strict=True))
    rows = [
        {"source": source, "model": name, "accuracy": value}
        for source, values in found.items()
        for name, value in zip(names, values, strict=True)
    ]
    if settings.square_queries:
        starts = range(0, len(task.images), task.batch_size)
        held = task.each(
            {
                f"Square on {subject.name}, from image {start}": partial(
                    withstanding, task, subject, settings.square_queries, start
                )
                for subject in task.subjects
                for start in starts
            },
            "Square",
        )
        for subject in task.subjects:
            counts = [held[f"Square on {subject.name}, from image {start}"] for start in starts]
            accuracy = 100 * sum(counts) / len(task.images)
            rows.append({"source": SQUARE, "model": subject.name, "accuracy": accuracy})
    return {"rows": rows}


def right_on(task: Task, subject: Subject, images: Tensor) -> Tensor:
    """Return which of the images [N, C, H, W] a network classifies right, bool [N]."""
    return task.logits(subject.network, images).argmax(1) == task.labels


def withstanding(task: Task, subject: Subject, queries: int, start: int) -> int:
    """Return how many images of a batch are right as they are and under Square.

    The batch is of ``task.batch_size`` from ``start`` on: Square draws for a batch as a whole.
    """
    here = slice(start, start + task.batch_size)
    ball = {k: v for k, v in task.ball.items() if k != "batch_size"}
    guard = Guard(subject.network, stop=task.kept.stop)
    measurement = Measurement(
        guard=guard,
        images=task.images[here],
        labels=task.labels[here],
        batch_size=len(task.images[here]),
        name=subject.name,
        work=lambda _: Progress().work("square", f"Square on {subject.name}"),
        **ball,
    )
    with measuring(subject.network, task.device):
        guard.num_classes = guard(measurement.load(torch.arange(1))[0]).shape[1]
        settings = autoattack_settings(
            eps=task.eps,
            norm=task.norm,
            num_classes=guard.num_classes,
            batch_size=measurement.batch_size,
            seed=task.seed,
        )
        settings |= {"attacks": ["square"], "square_queries": queries}
        right, _ = measurement.natural
        outcome = measurement.under_autoattack(
            right, settings, None, lambda progress: None, lambda indices, images: None
        )
        measurement.watch.check()
    return int(outcome.robust.sum())


def draw(numbers: Numbers) -> Figure:
    """Return a table of numbers in colours: what was attacked below, whose images on the left."""
    names = [subject["name"] for subject in numbers["subjects"]]
    sources = [*dict.fromkeys(row["source"] for row in numbers["rows"])]
    found = {(row["source"], row["model"]): row["accuracy"] for row in numbers["rows"]}
    width = COLUMN if len(names) <= 4 else PAGE
    figure, (axes,) = new_figure(width=width, height=1.5 + 0.28 * len(sources))
    queries = numbers["settings"]["square_queries"]
    labels = [f"Square, {queries} queries" if s == SQUARE else s for s in sources]
    heat_map(
        axes,
        [[found[source, name] for name in names] for source in sources],
        [shortened(label) for label in labels],
        [shortened(name) for name in names],
        boxed=[(sources.index(name), place) for place, name in enumerate(names)],
    )
    axes.set_ylabel("adversarial images of")
    axes.set_xlabel("network that is attacked")
    axes.set_title(f"accuracy in %, images of {attack_name(numbers['settings']['attack'])}")
    return figure


def shortened(name: str) -> str:
    """Return a name in lines that fit beside a table."""
    import textwrap

    return "\n".join(textwrap.wrap(name, LONG)) or name


TRANSFER = Analysis(
    name="transfer",
    title="Accuracy under black-box attacks",
    source="CURE, App. F",
    about=(
        "Rows are whose adversarial images they are, columns who is to classify them; an image "
        "counts where it is right both as it is and attacked. Boxes are white-box attacks. A "
        "black-box attack that leaves less than these speaks of masked gradients."
    ),
    settings=TransferSettings(),
    compute=compute,
    draw=draw,
)
