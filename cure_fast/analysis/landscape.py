"""The loss around the weights of a network, along two random directions: PIAT's Fig. 8 and Eq. 13.

Directions are Gaussian, and by default each filter has the length of the weights' own (Li et al.,
Visualizing the Loss Landscape of Neural Nets, NeurIPS 2018): the paper does not say which, and
plain ones of variance 1 lead far away from anything that was trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from torch import Tensor, nn

from cure_fast.analysis.shape import Analysis, Numbers, Settings, Subject, Task
from cure_fast.config.attack_names import attack_name, parse_single
from cure_fast.config.checks import POSITIVE, Bounds
from cure_fast.evaluation.evaluate import measuring
from cure_fast.figures import PAGE, PAPER
from cure_fast.losses import cross_entropy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Directions = Literal["filter", "gaussian"]
Batches = list[tuple[Tensor, Tensor]]
KINDS = ("natural", "adversarial")
# From this ratio of the largest to the smallest loss on, small ones show on a logarithm alone.
WIDE = 100
# Lines of equal loss in a map.
LEVELS = 15
# The least loss that a figure tells from 0.
SMALLEST = 1e-6


@dataclass(frozen=True, kw_only=True)
class LandscapeSettings(Settings):
    """Settings of ``landscape``."""

    points: Annotated[int, Bounds(3, 201)] = 21
    """Points of the grid along each direction, 3 to 201; an odd number has the weights themselves
    in the middle."""
    span: Annotated[float, Bounds(POSITIVE, 1000)] = 1.0
    """How far the grid goes to each side, in lengths of the directions."""
    directions: Directions = "filter"
    """filter: each filter of a direction is as long as the weights', biases and BatchNorm stay;
    gaussian: all weights move by unit normal numbers."""
    attack: str = "pgd20"
    """What makes the adversarial images: pgdK, cwK or fgsm, as for cure-fast eval."""
    adversarial: Literal["once", "each"] = "once"
    """once: images attacked at the weights themselves; each: at each point of the grid."""


def draw_directions(model: nn.Module, kind: Directions, seed: int) -> list[dict[str, Tensor]]:
    """Return two directions, each shaped as the parameters and where these are, by their names.

    Networks of one shape get the same Gaussian numbers from one seed. With ``filter`` the first
    axis of a tensor counts its filters (of a linear layer: its neurons), and tensors of one axis
    get 0.
    """
    draw = torch.Generator().manual_seed(seed)
    found: list[dict[str, Tensor]] = []
    for _ in range(2):
        own = {}
        for name, weights in model.named_parameters():
            noise = torch.randn(weights.shape, generator=draw).to(weights)
            own[name] = noise if kind == "gaussian" else as_long(noise, weights.detach())
        found.append(own)
    return found


def as_long(noise: Tensor, weights: Tensor) -> Tensor:
    """Return noise whose filters are as long as those of the weights, 0 for tensors of one axis."""
    if weights.ndim < 2:
        return torch.zeros_like(noise)
    sizes = [each.flatten(1).norm(dim=1) for each in (weights, noise)]
    ratio = sizes[0] / sizes[1].clamp(min=torch.finfo(noise.dtype).tiny)
    return noise * ratio.view(-1, *[1] * (weights.ndim - 1))


@contextmanager
def movable(
    model: nn.Module, directions: Sequence[Mapping[str, Tensor]]
) -> Iterator[Callable[..., None]]:
    """Give a function that puts the weights at ``theta + a * d1 + b * d2``, for (a, b).

    After the block they are what they were, bit for bit, whatever happened in it. Buffers, such as
    BatchNorm's statistics, are not moved.
    """
    parameters = dict(model.named_parameters())
    kept = {name: each.detach().clone() for name, each in parameters.items()}

    @torch.no_grad()
    def move(*lengths: float) -> None:
        for name, parameter in parameters.items():
            moved = kept[name].clone()
            for length, direction in zip(lengths, directions, strict=True):
                moved.add_(direction[name], alpha=length)
            parameter.copy_(moved)

    try:
        yield move
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(kept[name])


def mean_loss(model: nn.Module, batches: Batches, device: torch.device) -> float | None:
    """Return the mean cross-entropy in evaluation mode, or None where it is not finite."""
    with measuring(model, device):
        losses = torch.cat([cross_entropy(model(x).float(), y) for x, y in batches])
    mean = float(losses.double().mean())
    return mean if math.isfinite(mean) else None


def compute(task: Task, settings: LandscapeSettings) -> Numbers:
    """Return the loss on natural and on adversarial images at each point of each network's grid."""
    parse_single(settings.attack)
    # The middle is exactly 0.
    last = settings.points - 1
    grid = [settings.span * (2 * k - last) / last for k in range(settings.points)]
    natural = task.batches(task.pixels)

    @cache
    def attacked(place: int) -> Batches:
        return task.batches(task.attacked(task.subjects[place], settings.attack))

    @cache
    def directions(place: int) -> list[dict[str, Tensor]]:
        network = task.subjects[place].network
        return draw_directions(network, settings.directions, task.seed)

    def row(place: int, subject: Subject, b: float) -> dict[str, list[float | None]]:
        found: dict[str, list[float | None]] = {kind: [] for kind in KINDS}
        adversarial = attacked(place) if settings.adversarial == "once" else []
        with movable(subject.network, directions(place)) as move:
            for a in grid:
                move(a, b)
                if settings.adversarial == "each":
                    adversarial = task.batches(task.attacked(subject, settings.attack))
                for kind, batches in zip(KINDS, (natural, adversarial), strict=True):
                    found[kind].append(mean_loss(subject.network, batches, task.device))
        return found

    parts = {
        f"{subject.name}, row {number} of {settings.points}": partial(row, place, subject, b)
        for place, subject in enumerate(task.subjects)
        for number, b in enumerate(grid, start=1)
    }
    found = iter(task.each(parts, "landscape").values())
    rows = [
        {"model": subject.name, "a": a, "b": b, **dict(zip(KINDS, losses, strict=True))}
        for subject in task.subjects
        for b, part in zip(grid, found, strict=False)
        for a, *losses in zip(grid, *(part[kind] for kind in KINDS), strict=True)
    ]
    return {"rows": rows, "loss": "cross-entropy", "grid": grid}


def draw(numbers: Numbers) -> Figure:
    """Return a surface and a map of both losses per network, all on one scale."""
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    subjects, grid = numbers["subjects"], np.array(numbers["grid"])
    side = len(grid)
    losses = {
        (subject["name"], kind): np.array(
            [row[kind] for row in numbers["rows"] if row["model"] == subject["name"]], dtype=float
        ).reshape(side, side)
        for subject in subjects
        for kind in KINDS
    }
    low, high = (float(f([f(each) for each in losses.values()])) for f in (np.nanmin, np.nanmax))
    # A loss may be 0 in float32, or the same everywhere.
    low, high = max(low, SMALLEST), max(high, low + SMALLEST, 2 * SMALLEST)
    far = high > WIDE * low
    least, most = map(float, np.log10([low, high]) if far else (low, high))
    bounds: dict[str, Any] = {"vmin": least, "vmax": most}
    levels = np.linspace(least, most, LEVELS)
    lines = {"colors": "white", "linewidths": 0.3, "linestyles": "solid"}
    attack = attack_name(numbers["settings"]["attack"])
    figure = Figure(figsize=(PAGE, 0.3 + 1.55 * len(subjects)), layout="constrained")
    places = figure.add_gridspec(len(subjects), 4, width_ratios=[1.3, 1, 1.3, 1])
    filled: Any = None
    surfaces: list[Any] = []
    maps = []
    for line, subject in enumerate(subjects):
        for column, kind in enumerate(KINDS):
            values = losses[subject["name"], kind]
            values = np.log10(np.maximum(values, low)) if far else values
            surface: Any = figure.add_subplot(places[line, 2 * column], projection="3d")
            surface.plot_surface(*np.meshgrid(grid, grid), values, cmap="viridis", **bounds)
            surface.set_zlim(least, most)
            for side in (surface.xaxis, surface.yaxis, surface.zaxis):
                side.pane.set_facecolor(PAPER)
            surface.set_box_aspect((1, 1, 0.8), zoom=1.15)
            surface.tick_params(pad=-4, labelsize=5)
            surfaces.append(surface)
            axes = figure.add_subplot(places[line, 2 * column + 1], box_aspect=1)
            filled = axes.contourf(grid, grid, values, levels, cmap="viridis", **bounds)
            axes.contour(grid, grid, values, levels, **lines)
            axes.set_title(f"{subject['name']}, {attack if column else 'natural'}")
            axes.tick_params(labelsize=6)
            maps.append(axes)
    for axes in (*surfaces, *maps):
        ends = (grid[0], 0, grid[-1])
        axes.set(xticks=ends, yticks=ends)
        axes.set_xlabel("a", labelpad=-9 if axes in surfaces else 0, fontsize=7)
        axes.set_ylabel("b", labelpad=-9 if axes in surfaces else -4, fontsize=7)
    bar = figure.colorbar(filled, ax=[*surfaces, *maps], aspect=25, pad=0.02, shrink=0.9)
    bar.set_label("loss (cross-entropy)")
    if far:
        ticks = [t for e in range(-6, 7) for t in (10**e, 3 * 10**e) if low <= t <= high]
        for axis in (bar.ax.yaxis, *(surface.zaxis for surface in surfaces)):
            axis.set_ticks(np.log10(ticks), [f"{tick:g}" for tick in ticks])
    else:
        bar.locator = MaxNLocator(6)
        bar.update_ticks()
    return figure


LANDSCAPE = Analysis(
    name="landscape",
    title="Loss around the weights",
    source="PIAT, Fig. 8 and Eq. 13",
    about=(
        "Mean cross-entropy at the weights moved by a and b along two random directions, on the "
        "same images for all networks, in evaluation mode and on one scale. With directions of "
        "filters a and b are in lengths of the weights' own filters, so that networks of weights "
        "of other sizes compare."
    ),
    settings=LandscapeSettings(),
    compute=compute,
    draw=draw,
    most=3,
    images=128,
)
