"""The smallest perturbation that fools a network, image by image: CURE's Fig. 8.

The paper takes an attack of Foolbox that it does not name. Here the radius of the ball is halved
between one in which PGD finds an adversarial image and one in which it does not, for each image by
itself; only images that all networks classify rightly are compared. As PGD may miss what is there,
a radius is an upper bound of the smallest.
"""

from __future__ import annotations

import math
from base64 import b64decode, b64encode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from torch import Tensor

from cure_fast.analysis.shape import Analysis, Numbers, Settings, Subject, Task
from cure_fast.attacks import pgd
from cure_fast.config.checks import Bounds, Count, check, format_pixel
from cure_fast.errors import InputError
from cure_fast.evaluation.evaluate import measuring
from cure_fast.evaluation.measurement import start_in_ball, uniform_start
from cure_fast.evaluation.trust import Guard, check_perturbation
from cure_fast.figures import PAGE, line_styles, percent_axis
from cure_fast.losses import cross_entropy, margin

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Eight times the usual radius of training in CIFAR-10: beyond it images are others.
MOST = {"linf": 64 / 255, "l2": 4.0}
# Steps after which images that are fooled leave the attack.
STRETCH = 10
# Images in the figure.
EXAMPLES = 5


@dataclass(frozen=True, kw_only=True)
class PerturbationSettings(Settings):
    """Settings of ``perturbation``."""

    steps: Count = 50
    """Steps of PGD, each a tenth of the radius long."""
    restarts: Count = 2
    """Random starts of PGD, of which one has to fool the network."""
    halvings: Annotated[int, Bounds(1, 30)] = 12
    """How often the range of radii is halved."""
    most: float | None = None
    """Largest radius in pixel units; None takes 64/255 in linf and 4 in l2."""
    loss: Literal["ce", "margin"] = "ce"
    """What PGD ascends: the cross-entropy, or the margin of Carlini and Wagner, whose gradient
    does not vanish where a network is very sure."""


@dataclass(frozen=True)
class Attack:
    """PGD in a ball of its own around each image, which ends where the network is fooled.

    Attributes:
        task: images, norm and seed.
        settings: steps, restarts and loss.
        guard: the network.
    """

    task: Task
    settings: PerturbationSettings
    guard: Guard

    def __call__(self, indices: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """Attack the images at ``indices`` [n], each in its radius, float64 [n].

        Returns:
            Which are fooled, bool [n], and the last images, floats [n, C, H, W]; on the CPU.
        """
        task = self.task
        images = task.pixels[indices].to(task.device, self.guard.dtype)
        labels, radii = task.labels[indices].to(task.device), eps.to(images)
        tried = images.clone()
        left = torch.arange(len(indices), device=task.device)
        draw = {"linf": uniform_start, "l2": start_in_ball}[task.norm]
        for restart in range(self.settings.restarts):
            word = f"perturbation restart {restart}"
            own = indices[left.cpu()]
            noise = draw(images.shape[1:], own, word, task.seed).to(images)
            tried[left] = images[left] + noise * radii[left].view(-1, 1, 1, 1)
            going = left
            for steps in stretches(self.settings.steps):
                x, y = images[going], labels[going]
                self.guard.at(x, indices[going.cpu()], "PGD")
                tried[going] = self.go_on(x, y, tried[going] - x, radii[going], steps)
                going = going[self.guard(tried[going]).argmax(1) == y]
                if not len(going):
                    break
            left = going
            if not len(left):
                break
        fooled = torch.ones(len(indices), dtype=torch.bool)
        fooled[left.cpu()] = False
        for row, index in enumerate(indices.tolist()):
            ball = float(eps[row]), "PGD", task.norm
            one = slice(row, row + 1)
            check_perturbation(tried[one], images[one], torch.tensor([index]), *ball)
        return fooled, tried.cpu()

    def go_on(self, x: Tensor, y: Tensor, start: Tensor, radii: Tensor, steps: int) -> Tensor:
        """Return images [n, C, H, W] after so many more steps from a perturbation ``start``."""
        loss = cross_entropy if self.settings.loss == "ce" else margin
        return pgd(
            self.guard,
            x,
            lambda logits: loss(logits, y).sum(),
            eps=radii,
            step_size=radii / 10,
            steps=steps,
            norm=self.task.norm,
            start=start,
        )


def stretches(steps: int) -> Iterator[int]:
    """Yield how many steps to take before looking which images are fooled, up to ``steps``."""
    for done in range(0, steps, STRETCH):
        yield min(STRETCH, steps - done)


def compute(task: Task, settings: PerturbationSettings) -> Numbers:
    """Return the radius that fools each network on each image that all of them have right."""
    most = MOST[task.norm] if settings.most is None else settings.most
    inside = 0 < most <= (1 if task.norm == "linf" else 1000)
    check(inside, "most", most, "a radius above 0, in linf to 1")
    images, count = right_by_all(task), len(task.images)
    if not len(images):
        raise InputError(
            "--limit: expected an image that all networks classify rightly, got none among "
            f"{count}. Take more images, or networks that are trained."
        )
    attacks = {
        subject.name: Attack(task, settings, Guard(subject.network, stop=task.kept.stop))
        for subject in task.subjects
    }
    # A radius that fools, infinite for none, and one that does not, per network and image.
    high = {name: torch.full((len(images),), math.inf, dtype=torch.float64) for name in attacks}
    low = {name: torch.zeros(len(images), dtype=torch.float64) for name in attacks}
    groups = torch.arange(len(images)).split(task.batch_size)

    def fooled(subject: Subject, group: Tensor, radii: Tensor) -> list[bool]:
        # Images that the widest ball does not fool are done.
        asked = torch.isfinite(radii).nonzero().flatten()
        found = torch.zeros(len(group), dtype=torch.bool)
        if len(asked):
            with measuring(subject.network, task.device):
                found[asked], _ = attacks[subject.name](images[group[asked]], radii[asked])
        return found.tolist()

    for halving in range(settings.halvings + 1):
        middle = {
            name: (low[name] + high[name]) / 2 if halving else torch.full_like(low[name], most)
            for name in attacks
        }
        parts = {
            f"{subject.name}, batch {number}, halving {halving}": partial(
                fooled, subject, group, middle[subject.name][group]
            )
            for subject in task.subjects
            for number, group in enumerate(groups, start=1)
        }
        answers = iter(task.each(parts, "perturbation").values())
        for name, radii in middle.items():
            yes = torch.tensor([flag for _ in groups for flag in next(answers)])
            high[name] = torch.where(yes, radii, high[name])
            low[name] = torch.where(yes, low[name], radii)
    found = {
        name: [radius if math.isfinite(radius) else None for radius in radii.tolist()]
        for name, radii in high.items()
    }
    rows = [
        {"image": image, "label": int(task.labels[image]), "model": name, "radius": radii[place]}
        for place, image in enumerate(images.tolist())
        for name, radii in found.items()
    ]
    return {
        "rows": rows,
        "most": most,
        "resolution": most / 2**settings.halvings,
        "right": len(images),
        "never": {name: radii.count(None) for name, radii in found.items()},
        "median": {name: middle_of(radii) for name, radii in found.items()},
        "examples": examples(task, attacks, images, found),
    }


def right_by_all(task: Task) -> Tensor:
    """Return the indices of the images that all networks classify rightly."""
    right = torch.ones(len(task.images), dtype=torch.bool)
    for subject in task.subjects:
        right &= task.logits(subject.network, task.pixels).argmax(1) == task.labels
    return right.nonzero().flatten()


def middle_of(radii: Sequence[float | None]) -> float | None:
    """Return the median radius, None counted as beyond all; None where that is the median."""
    found = median(math.inf if radius is None else radius for radius in radii)
    return found if math.isfinite(found) else None


def examples(
    task: Task,
    attacks: dict[str, Attack],
    images: Tensor,
    found: dict[str, list[float | None]],
) -> list[dict[str, Any]]:
    """Return the first images of different classes that all networks were fooled on.

    Each has the image, and per network its radius and the perturbation, whose range from -radius to
    radius is 0 to 255 (in L2: from minus to plus its own largest pixel).
    """
    taken: dict[int, int] = {}
    for place, image in enumerate(images.tolist()):
        if all(radii[place] is not None for radii in found.values()):
            taken.setdefault(int(task.labels[image]), place)
    places = [*taken.values()][:EXAMPLES]

    def of(subject: Subject) -> list[dict[str, Any]]:
        radii = torch.tensor([found[subject.name][p] or 0.0 for p in places], dtype=torch.float64)
        with measuring(subject.network, task.device):
            _, tried = attacks[subject.name](images[places], radii)
        moved = tried - task.pixels[images[places]]
        scale = moved.abs().flatten(1).amax(1).clamp(min=1e-12).view(-1, 1, 1, 1)
        return [as_text(each) for each in (moved / scale + 1) / 2]

    parts = {f"{subject.name}, examples": partial(of, subject) for subject in task.subjects}
    perturbations = task.each(parts, "perturbation") if places else {}
    return [
        {
            "image": int(images[place]),
            "natural": as_text(task.pixels[images[place]]),
            "networks": {
                subject.name: {"radius": found[subject.name][place], "perturbation": each[number]}
                for subject, each in zip(task.subjects, perturbations.values(), strict=True)
            },
        }
        for number, place in enumerate(places)
    ]


def as_text(image: Tensor) -> dict[str, Any]:
    """Return an image [C, H, W] in [0, 1] as its shape and bytes [H, W, C] in base64."""
    pixels = (image.permute(1, 2, 0) * 255).round().to(torch.uint8).contiguous()
    text = b64encode(pixels.numpy().tobytes()).decode()
    return {"shape": list(pixels.shape), "uint8": text}


def show(axes: Axes, image: dict[str, Any], below: str = "") -> None:
    """Draw what :func:`as_text` made."""
    import numpy as np

    pixels = np.frombuffer(b64decode(image["uint8"]), np.uint8).reshape(image["shape"])
    grey = {"cmap": "gray", "vmin": 0, "vmax": 255}
    axes.imshow(pixels.squeeze(), **(grey if image["shape"][2] == 1 else {}))
    axes.set(xticks=[], yticks=[])
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(below, fontsize=6, labelpad=1.5)


def draw(numbers: Numbers) -> Figure:
    """Return the distribution of radii, and a few images with what fools each network."""
    from matplotlib.figure import Figure

    shown, subjects = numbers["examples"], numbers["subjects"]
    lines = 1 + len(subjects)
    figure = Figure(figsize=(PAGE, max(2.6, 0.85 * lines + 0.3)), layout="constrained")
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=[1, 1.25])[0]
    draw_distribution(left.subplots(), numbers)
    grid = right.subplots(lines, max(1, len(shown)), squeeze=False)
    for column, example in enumerate(shown):
        show(grid[0, column], example["natural"], f"image {example['image']}")
        for line, subject in enumerate(subjects, start=1):
            own = example["networks"][subject["name"]]
            show(grid[line, column], own["perturbation"], told(own["radius"], numbers["norm"]))
    if not shown:
        for axes in grid.flat:
            axes.set_visible(False)
    for line, name in enumerate(["natural", *(subject["name"] for subject in subjects)]):
        grid[line, 0].set_ylabel(name, fontsize=6)
    return figure


def draw_distribution(axes: Axes, numbers: Numbers) -> None:
    """Draw the share of images that each network is fooled on, over the radius."""
    subjects, unit = numbers["subjects"], 255 if numbers["norm"] == "linf" else 1
    smallest = numbers["most"]
    for subject, style in zip(subjects, line_styles(subjects), strict=True):
        name = subject["name"]
        own = [row["radius"] for row in numbers["rows"] if row["model"] == name]
        radii = sorted(radius for radius in own if radius is not None)
        smallest = min([smallest, *radii])
        shares = [100 * k / len(own) for k in range(1, len(radii) + 1)]
        x = [unit * radius for radius in (*radii[:1], *radii, numbers["most"])]
        middle = numbers["median"][name]
        label = f"{name}, median {'beyond' if middle is None else told(middle, numbers['norm'])}"
        marker = style.pop("marker")
        axes.step(x, [0, *shares, (shares or [0])[-1]], where="post", **style)
        if middle is not None:
            axes.plot(unit * middle, 50, marker=marker, color=style["color"], linestyle="none")
        axes.plot([], [], label=label, marker=marker, **style)
    axes.set_xscale("log", base=2)
    axes.set_xlim(0.8 * unit * smallest, unit * numbers["most"])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("smallest radius in 1/255" if unit == 255 else "smallest radius in L2")
    percent_axis(axes, f"share of {numbers['right']} images fooled in %")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0))


def told(radius: float, norm: str) -> str:
    """Return a radius as the figure writes it."""
    return f"{255 * radius:.2f}/255" if norm == "linf" else format_pixel(round(radius, 3))


PERTURBATION = Analysis(
    name="perturbation",
    title="Smallest perturbation that fools a network",
    source="CURE, Fig. 8",
    about=(
        "Share of the images that all networks classify rightly on which PGD fools a network "
        "within a radius, with the medians; images that no radius fooled lie beyond the axis. "
        "Beside it images, and the perturbations that fool each network, scaled to full contrast, "
        "with their radius below. PGD may miss smaller ones, so radii are upper bounds."
    ),
    settings=PerturbationSettings(),
    compute=compute,
    draw=draw,
    images=100,
)
