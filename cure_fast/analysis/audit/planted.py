"""The test of the attack itself: it has to find an adversarial image that is known to be there.

After Zimmermann, Brendel, Tramer and Carlini, Increasing Confidence in Adversarial Robustness
Evaluations, NeurIPS 2022, in words and code of our own. Around an image many inner points are
drawn, well inside the ball, and one point on its boundary. A new linear readout of the network's
features tells this point from the inner ones: the image itself is on the inner side, and at least
one point in the ball, the planted one, is on the other. An attack that does not get there is too
weak, or is misled by the features, whatever it reports of the network.

Simpler than the paper: the readout is a ridge regression and not a trained logistic one; features
are what enters the last linear layer, and the logits where there is no such layer; inner points
are of one radius; and the threshold lies at a fixed share of the way to the planted point, where
the paper makes the test harder until random points fail. How many random points pass is told.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from cure_fast.analysis.audit.case import Case, Finding, absent, found, refusing
from cure_fast.analysis.shape import Subject
from cure_fast.config.attack_names import attack_name
from cure_fast.evaluation.evaluate import measuring
from cure_fast.evaluation.measurement import start_in_ball, uniform_start
from cure_fast.evaluation.trust import weight_dtype

# Inner points per image, their largest distance as a share of the radius, and random points of
# the boundary that say how hard the test is.
INNER, INSIDE, RANDOM = 64, 0.5, 16
# The threshold's place between the highest inner score, 0, and that of the planted point, 1.
THRESHOLD = 0.9
# Weight of the readout's squared length, relative to the features' mean square.
RIDGE = 1e-3
# Share of planted images to be found: the paper's for a test that is passed; and the share below
# which the attack fails it.
ENOUGH, FEW = 0.95, 0.75
# Found images that excuse a single one that is missed.
SEVERAL = 8
# A planted point scores higher than all inner ones by this share of their spread, or no readout
# tells them apart.
TOLD_APART = 1e-3


class Features(nn.Module):
    """What enters the last linear layer of a network [N, D], or its logits where that is unknown.

    Attributes:
        layer: that layer; None takes the logits.
    """

    def __init__(self, model: nn.Module, layer: nn.Module | None) -> None:
        super().__init__()
        self.model = model
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Return the features of images [N, C, H, W]."""
        if self.layer is None:
            return self.model(x)
        seen: list[Tensor] = []
        hook = self.layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            self.model(x)
        finally:
            hook.remove()
        return seen[-1]


class Readouts(nn.Module):
    """A network of two classes per image of a batch: the inner side, and the planted one.

    Attributes:
        weight: of the readouts, [N, D], by the places of the images in the batch.
        middle: features that each begins from, [N, D]: they differ little within a ball.
    """

    weight: Tensor
    middle: Tensor

    def __init__(self, features: Features, weight: Tensor, middle: Tensor) -> None:
        super().__init__()
        self.features = features
        self.register_buffer("weight", weight)
        self.register_buffer("middle", middle)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [n, 2] of the first n images, [n, C, H, W]."""
        z = self.features(x)
        score = ((z - self.middle[: len(z)]) * self.weight[: len(z)]).sum(1) - 1
        return torch.stack([-score, score], dim=1)


def planted(case: Case) -> Finding:
    """Check that attacks find planted images."""
    return case.one("check planted", partial(refusing, partial(tried, case)))


def tried(case: Case) -> Finding:
    """Return what :func:`planted` finds."""
    task, eps = case.task, case.task.eps
    if eps == 0:
        return absent("a ball of radius 0 has room for nothing else")
    count = min(case.settings.planted, len(task.images))
    features = Features(case.subject.network, last_layer(case))
    x = task.pixels[:count].to(task.device, weight_dtype(case.subject.network))
    with measuring(case.subject.network, task.device):
        weight, middle, apart = readouts(case, features, x)
    if not apart.any():
        text = f"no readout tells a point of the ball from those inside it, for {count} images"
        return found("", doubtful=[text])
    kept = apart.nonzero().flatten()
    model = Readouts(features, weight[kept], middle[kept]).eval()
    there = replace(
        task,
        images=task.images[kept.cpu()],
        labels=torch.zeros(len(kept), dtype=torch.int64),
        batch_size=len(kept),
    )
    subject = Subject(case.subject.name, model=model)
    hit = {
        name: case.logits(there.attacked(subject, name), model=model, size=count).argmax(1) == 1
        for name in case.strongest
    }
    chance = by_chance(case, model, x[kept])
    either = torch.stack([*hit.values()]).any(0)
    share = float(either.double().mean())
    each = ", ".join(f"{attack_name(name)} {int(h.sum())}" for name, h in hit.items())
    of = "features before the last layer" if features.layer is not None else "logits"
    text = (
        f"{int(either.sum())} of {len(kept)} planted images are found ({each}) by {of}; "
        f"{chance:.1%} of random points of the boundary are such"
    )
    # Of few images one is more than a twentieth, and says little.
    one_missed = int(either.sum()) == len(kept) - 1 >= SEVERAL
    if share >= ENOUGH or one_missed:
        return found(text)
    return found("", [text]) if share < FEW else found("", doubtful=[text])


def last_layer(case: Case) -> nn.Module | None:
    """Return the linear layer whose output the logits are, or None where there is none."""
    model = case.subject.network
    x = case.task.pixels[:2].to(case.task.device, weight_dtype(model))
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not layers:
        return None
    outputs: list[tuple[Tensor, Tensor]] = []

    def note(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        outputs.append((inputs[0], output))

    hook = layers[-1].register_forward_hook(note)
    try:
        with measuring(model, case.task.device):
            logits = model(x)
    finally:
        hook.remove()
    if len(outputs) != 1:
        return None
    inputs, output = outputs[0]
    same = output.shape == logits.shape and torch.equal(output.float(), logits.float())
    return layers[-1] if same and inputs.ndim == 2 else None


def boundary(case: Case, shape: Sequence[int], count: int, word: str) -> Tensor:
    """Return moves of the audit's radius, [count, *shape]."""
    indices = torch.arange(count)
    if case.task.norm == "linf":
        return case.task.eps * uniform_start(shape, indices, word, case.task.seed).sign()
    moves = start_in_ball(shape, indices, word, case.task.seed)
    lengths = moves.flatten(1).norm(dim=1).clamp(min=1e-12)
    return case.task.eps * moves / lengths.view(-1, 1, 1, 1)


def readouts(case: Case, features: Features, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return weights and middles [n, D] of each image's readout, and which tell points apart [n].

    By ``weight * (z - middle)`` the planted point is 1 from the highest inner one, and the
    threshold, at 1, is ``THRESHOLD`` of the way there.
    """
    draw = {"linf": uniform_start, "l2": start_in_ball}[case.task.norm]
    weights, middles, apart = [], [], []
    for row, image in enumerate(x):
        inner = draw(image.shape, torch.arange(INNER), f"inner {row}", case.task.seed)
        moves = torch.cat(
            [
                torch.zeros(1, *image.shape),
                INSIDE * case.task.eps * inner,
                boundary(case, image.shape, 1, f"planted {row}"),
            ]
        )
        z = features((image + moves.to(image)).clamp(0, 1)).double()
        # The dual of ridge regression, as points are fewer than features.
        centred = z - z[:-1].mean(0)
        gram = centred @ centred.T
        damp = RIDGE * max(float(gram.diagonal().mean()), 1e-30)
        target = torch.zeros_like(gram[0])
        target[-1] = 1
        weight = centred.T @ torch.linalg.solve(gram + damp * torch.eye(len(z)).to(gram), target)
        scores = centred @ weight
        top, highest = float(scores[:-1].max()), float(scores[-1])
        clear = highest - top > TOLD_APART * abs(top) and highest > 0
        # In units of the way between, so that no loss is flat or saturated.
        unit = highest - top if clear else 1.0
        threshold = top + THRESHOLD * unit
        # The point on the weight's line where the score is the threshold less a unit.
        length = float(weight.square().sum()) or 1.0
        middles.append(z[:-1].mean(0) + weight * ((threshold - unit) / length))
        weights.append(weight / unit)
        apart.append(clear)
    weight, middle = (torch.stack(each).to(x.dtype) for each in (weights, middles))
    return weight, middle, torch.tensor(apart, device=x.device)


def by_chance(case: Case, model: Readouts, x: Tensor) -> float:
    """Return the share of random points of the boundary that are on the planted side."""
    hits = 0
    with measuring(model, case.task.device):
        for row in range(RANDOM):
            moves = boundary(case, x.shape[1:], len(x), f"random {row}").to(x)
            hits += int((model((x + moves).clamp(0, 1)).argmax(1) == 1).sum())
    return hits / (RANDOM * len(x)) if len(x) else math.nan
