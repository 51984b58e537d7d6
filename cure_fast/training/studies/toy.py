"""Two circles in three dimensions: how adversarial training oscillates, and PIAT calms it.

Parameter Interpolation Adversarial Training (Liu, He et al., TIFS 2025), Fig. 2 to 5. The text
gives two concentric circles, a network of one hidden layer, SGD with momentum 0.9 and rate 0.5, 50
epochs; radii, noise, counts, width, eps and steps are not legible and are chosen here: x1 is r cos
t, x2 is r sin t, x3 is 0, each with Gaussian noise, r is 1 or 2; PGD of 10 steps of eps/3 in
training, 20 of eps/4 in the test, each from a uniform start, and no walls as pixels have them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from statistics import mean
from typing import TYPE_CHECKING, Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cure_fast.analysis.shape import Numbers, Settings
from cure_fast.config.checks import Bounds, Count, Weight
from cure_fast.errors import DivergedError
from cure_fast.figures import (
    INK,
    MARK,
    PAGE,
    colour_of,
    line_styles,
    new_figure,
    outside_legend,
)
from cure_fast.losses import cross_entropy
from cure_fast.policies.piat import PiatSettings
from cure_fast.training.studies.shape import Found, Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Loss and whether weights are interpolated; labels; and what has the method's colour elsewhere.
METHODS = {
    "PGD-AT": ("at", False, "pgd_at"),
    "ALP": ("alp", False, "alp"),
    "NMSE": ("nmse", False, "nmse"),
    "PIAT": ("at", True, "piat"),
    "PIAT + NMSE": ("nmse", True, "piat_nmse"),
}
RADII = (1.0, 2.0)
# Of each circle, in training and test.
POINTS = 500
HIDDEN, BATCH, MOMENTUM = 64, 128, 0.9
# Half the side of the square that boundaries are drawn in, and points along it.
HALF, SIDE = 3.0, 61
# Epochs before which the network still learns, and does not yet oscillate.
SETTLED = 10


@dataclass(frozen=True, kw_only=True)
class ToySettings(Settings):
    """Settings of ``toy``."""

    epochs: Annotated[int, Bounds(SETTLED + 2, 10_000)] = 50
    """Epochs, 12 or more."""
    lr: Weight = 0.5
    """Learning rate, 0 or more."""
    eps: Weight = 0.3
    """Radius of the attacks in the plane's units, in which the circles' are 1 and 2."""
    noise: Weight = 0.1
    """Standard deviation of the noise of each coordinate, in the same units."""
    alp_weight: Weight = 0.5
    """Weight of ALP's squared distance of logits, summed over the two classes, 0 or more."""
    mu: Weight = 5.0
    """Weight of NMSE's distance, 0 or more."""
    points: Count = POINTS
    """Points of each circle, in training and in the test alike, 1 or more."""


def circles(settings: ToySettings, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return points [N, 3] of the two circles, and which one each is of, int64 [N]."""
    y = torch.arange(2).repeat_interleave(settings.points)
    angle = 2 * math.pi * torch.rand(len(y), generator=generator)
    radius = torch.tensor(RADII)[y]
    plane = [radius * angle.cos(), radius * angle.sin(), torch.zeros(len(y))]
    noise = settings.noise * torch.randn(len(y), 3, generator=generator)
    return torch.stack(plane, dim=1) + noise, y


@torch.no_grad()
def attacked(
    model: nn.Sequential,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    step: float,
    steps: int,
    generator: torch.Generator,
) -> Tensor:
    """Return PGD points [N, 3] within ``eps`` of each coordinate of ``x``, uniform start.

    Of two classes the cross-entropy's gradient is that of the other logit less the own, times a
    positive number, so its sign needs no softmax; here it is written out, ten times as quick.
    """
    first, last = model[0], model[2]
    assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
    away = (last.weight[1] - last.weight[0]) * (1 - 2 * y)[:, None]
    start = x @ first.weight.T + first.bias
    delta = eps * (2 * torch.rand(x.shape, generator=generator) - 1)
    for _ in range(steps):
        active = start + delta @ first.weight.T > 0
        grad = (active * away) @ first.weight
        delta = (delta + step * grad.sign()).clamp_(-eps, eps)
    return x + delta


def loss_of(kind: str, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, s: Any) -> Tensor:
    """Return the loss of PGD-AT, with ALP's pairing or NMSE (:mod:`cure_fast.methods.nmse`)."""
    logits_adv = model(x_adv)
    ce = cross_entropy(logits_adv, y).mean()
    if kind == "at":
        return ce
    logits = model(x)
    if kind == "alp":
        return ce + s.alp_weight * (logits_adv - logits).square().sum(dim=1).mean()
    apart = (F.normalize(logits_adv, dim=1) - F.normalize(logits, dim=1)).square().sum(dim=1)
    true = logits.softmax(dim=1).gather(1, y[:, None]).squeeze(1)
    return ce + s.mu * ((1 - true) * apart).mean()


def train(method: str, seed: int, settings: ToySettings) -> dict[str, Any]:
    """Return accuracies by epoch as shares, and logits on the plane around the largest drop.

    Raises:
        DivergedError: if a loss or a logit is not finite.
    """
    kind, interpolated, _ = METHODS[method]
    # Data, first weights, batches and attacks of a seed are the same for all methods.
    data, drawn, test_noise = (torch.Generator().manual_seed(3 * seed + k) for k in range(3))
    (x, y), (x_test, y_test) = circles(settings, data), circles(settings, data)
    model = network(drawn)
    optimizer = torch.optim.SGD(model.parameters(), lr=settings.lr, momentum=MOMENTUM)
    eps, share = settings.eps, PiatSettings().share
    found: dict[str, Any] = {"clean": [], "robust": []}
    former, states = deepcopy(model.state_dict()), []
    for epoch in range(settings.epochs):
        place = f"{method}, seed {seed}, epoch {epoch + 1}"
        for places in torch.randperm(len(y), generator=drawn).split(BATCH):
            own = x[places], y[places]
            x_adv = attacked(model, *own, eps=eps, step=eps / 3, steps=10, generator=drawn)
            optimizer.zero_grad()
            loss = loss_of(kind, model, own[0], x_adv, own[1], settings)
            finite(loss, "loss", place).backward()
            optimizer.step()
        if interpolated:
            with torch.no_grad():
                for name, weight in model.named_parameters():
                    weight.lerp_(former[name], share(epoch))
        former = deepcopy(model.state_dict())
        states.append(former)
        x_adv = attacked(
            model, x_test, y_test, eps=eps, step=eps / 4, steps=20, generator=test_noise
        )
        for images, name in ((x_test, "clean"), (x_adv, "robust")):
            logits = finite(model(images).detach(), "logits", place)
            found[name].append(float((logits.argmax(1) == y_test).double().mean()))
    drop, planes = largest_drop(found["robust"]), []
    for state in states[drop - 1 : drop + 1]:
        model.load_state_dict(state)
        planes.append(plane_of(model))
    return found | {"drop": drop, "planes": planes}


def network(generator: torch.Generator) -> nn.Sequential:
    """Return a network 3-64-2 whose weights and biases are drawn as torch's linear layers are."""
    model = nn.Sequential(nn.Linear(3, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2))
    with torch.no_grad():
        for layer, fan_in in ((model[0], 3), (model[2], HIDDEN)):
            for parameter in layer.parameters():
                parameter.uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=generator)
    return model


def finite(values: Tensor, what: str, place: str) -> Tensor:
    """Return the values; raise ``DivergedError`` unless all of them are finite."""
    if not values.isfinite().all():
        raise DivergedError(f"toy, {place}: the {what} is not finite. Take a lower --lr.")
    return values


@torch.no_grad()
def plane_of(model: nn.Module) -> list[list[float]]:
    """Return by how much the outer circle's logit is the larger on x3 = 0, rows by x2 upwards."""
    line = torch.linspace(-HALF, HALF, SIDE)
    up, across = torch.meshgrid(line, line, indexing="ij")
    logits = model(torch.stack([across, up, torch.zeros_like(up)], dim=-1))
    return [
        [round(value, 3) for value in row] for row in (logits[..., 1] - logits[..., 0]).tolist()
    ]


def largest_drop(robust: list[float]) -> int:
    """Return the 0-based epoch after :data:`SETTLED` that lost most against the one before."""
    return min(range(SETTLED, len(robust)), key=lambda e: robust[e] - robust[e - 1])


def summary(robust: list[float], clean: list[float]) -> dict[str, float]:
    """Return what a run is judged by, as shares.

    ``robust`` and ``clean`` are means over the last ten epochs; ``oscillation`` is the mean change
    from one epoch to the next, without its sign, and ``drop`` the largest loss, both after
    :data:`SETTLED` epochs.
    """
    changes = [robust[e] - robust[e - 1] for e in range(SETTLED, len(robust))]
    return {
        "robust": mean(robust[-10:]),
        "clean": mean(clean[-10:]),
        "oscillation": mean(map(abs, changes)),
        "drop": max(0.0, *(-change for change in changes)),
    }


def compute(found: Found) -> Numbers:
    """Return a row per method, means over seeds, with curves and planes of the first seed."""
    settings = found.settings
    assert isinstance(settings, ToySettings)
    parts: dict[str, Callable[[], Any]] = {
        f"{method}, seed {seed}": partial(train, method, seed, settings)
        for seed in range(found.seeds)
        for method in METHODS
    }
    runs = found.kept.each(parts, "toy")
    rows = []
    for method in METHODS:
        own = [runs[f"{method}, seed {seed}"] for seed in range(found.seeds)]
        judged = [summary(run["robust"], run["clean"]) for run in own]
        means = {name: mean(each[name] for each in judged) for name in judged[0]}
        rows.append({"method": method, **means})
    first = {method: runs[f"{method}, seed 0"] for method in METHODS}
    return {
        "subjects": [{"name": n, "method": own, "origin": ""} for n, (*_, own) in METHODS.items()],
        "rows": rows,
        "robust": {method: run["robust"] for method, run in first.items()},
        "drop": {method: run["drop"] for method, run in first.items()},
        "planes": {method: run["planes"] for method, run in first.items()},
    }


def draw(numbers: Numbers) -> Figure:
    """Return robust accuracy by epoch, and boundaries before and after the largest drop."""
    figure, panels = new_figure(2, 3, width=PAGE, height=4.9)
    axes, *planes = panels
    styles = line_styles(numbers["subjects"])
    for (method, robust), style in zip(numbers["robust"].items(), styles, strict=True):
        epochs = range(1, len(robust) + 1)
        percent = [100 * value for value in robust]
        axes.plot(epochs, percent, label=method, markevery=7, linewidth=1.1, **style)
    axes.set_xlabel("epoch")
    axes.set_ylabel("robust accuracy in %, seed 0")
    for each, method in zip(planes, METHODS, strict=True):
        draw_plane(each, numbers, method)
    outside_legend(figure, [axes, planes[0]], columns=5)
    return figure


def draw_plane(axes: Axes, numbers: Numbers, method: str) -> None:
    """Draw the circles, and the boundaries before and after the largest drop, or smallest rise."""
    from matplotlib.patches import Circle

    line = [-HALF + 2 * HALF * place / (SIDE - 1) for place in range(SIDE)]
    for radius in RADII:
        axes.add_patch(Circle((0, 0), radius, fill=False, color=MARK, linewidth=1))
    colour, looks = colour_of(METHODS[method][2]), (("before", "-"), ("after", "--"))
    for plane, (when, dashes) in zip(numbers["planes"][method], looks, strict=True):
        axes.contour(line, line, plane, [0.0], colors=[colour], linestyles=[dashes], linewidths=1.2)
        axes.plot([], [], color=INK, linestyle=dashes, label=f"boundary {when}")
    drop, robust = numbers["drop"][method], numbers["robust"][method]
    change = "largest drop" if robust[drop] < robust[drop - 1] else "smallest rise"
    axes.set_title(f"{method}: {change},\nepochs {drop} and {drop + 1}", loc="left")
    axes.set_aspect("equal")
    axes.set_xlabel("x1, where x3 = 0")
    axes.set_ylabel("x2")


TOY = Study(
    name="toy",
    title="Oscillation of adversarial training on two circles, and PIAT against it",
    source="PIAT, Fig. 2 to 5",
    about=(
        "A network 3-64-2 trained by five methods, and its boundary before and after the epoch "
        "that cost most; circles in grey. Radii, noise, eps and steps are chosen here, as the "
        "paper's are not legible."
    ),
    compute=compute,
    draw=draw,
    settings=ToySettings(),
    seeds=4,
)
