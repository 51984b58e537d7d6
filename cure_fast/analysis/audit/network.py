"""Checks of the network itself: its answers, its classes, and where its gradients lead."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn

from cure_fast.analysis.audit.case import Case, Finding, found, refusing
from cure_fast.attacks import start_point
from cure_fast.evaluation.chance import LEAST_IMAGES, beats_chance
from cure_fast.evaluation.evaluate import measuring
from cure_fast.evaluation.measurement import PROBE_IMAGES
from cure_fast.evaluation.model_state import Watch
from cure_fast.evaluation.trust import Guard, find_instability, find_masking
from cure_fast.losses import margin

# Pixels whose gradient is compared with differences of the margin, so many of each image.
PIXELS, PER_IMAGE = 100, 10
# Half the width of these differences in pixel units: an eighth of a level of 8 bits, where float32
# still tells the margins apart.
WIDTH = 1 / 2040
# How far differences are from gradients, relative to their length: rounding and the kinks of ReLU
# leave hundredths, and a gradient that is made up leaves 1.
DIFFERENCE_DOUBT, DIFFERENCE_MOST = 0.2, 0.5
# Cosine of gradients a step of noise apart, below which no attack keeps a direction.
LEAST_COSINE = 0.05
# Share of images for which a class that no image has may be answered.
STRANGE = 0.05


def answers(case: Case) -> Finding:
    """Check that logits are finite, the same again, alone and in batches, and written nowhere."""
    model = case.subject.network
    watch = Watch(model, thorough=False)
    guard = Guard(model, stop=case.task.kept.stop)
    with measuring(model, case.task.device):
        for x, _ in case.task.batches(case.task.pixels):
            guard(x)
        told = find_instability(guard, probe(case))
    watch.check()
    count, classes = len(case.task.images), guard_classes(case)
    return found(
        f"{count} images have finite logits of {classes} classes, which are the same in a second "
        "pass and in half a batch",
        told,
    )


def guard_classes(case: Case) -> int:
    """Return the number of logits."""
    return case.logits(case.task.pixels[:1]).shape[1]


def probe(case: Case) -> list[tuple[Tensor, Tensor]]:
    """Return the images that are looked at closely, with their labels, in batches."""
    pixels = case.task.pixels[:PROBE_IMAGES]
    size = case.task.batch_size
    pairs = zip(pixels.split(size), case.task.labels[:PROBE_IMAGES].split(size), strict=True)
    dtype = Guard(case.subject.network).dtype
    return [(x.to(case.task.device, dtype), y.to(case.task.device)) for x, y in pairs]


def classes(case: Case) -> Finding:
    """Check that what is answered are classes of the labels, several, and better than by chance."""
    natural, attacked = case.measure("natural"), case.measure(f"pgd{case.steps[0]}")
    labels, count = case.task.labels, len(case.task.labels)
    draw = torch.Generator().manual_seed(case.task.seed)
    noise = torch.rand(case.task.pixels.shape, generator=draw)
    logits = case.logits(noise)
    kinds = {
        "natural": natural.told["answers"],
        "attacked": attacked.told["answers"],
        "random": logits.argmax(1).bincount().tolist(),
    }
    known, has = len(case.task.classes), set(labels.tolist())
    real = set(range(known)) if known else has
    # One class more than labels have is what a network that abstains has; more of them, or one
    # beside a single one, are rather classes of which there is no image here.
    one_more = logits.shape[1] == len(real) + 1 > 2
    failed, doubtful = [], []
    if known and known != logits.shape[1]:
        failed.append(f"{logits.shape[1]} logits for {known} classes: it may abstain")
    for kind, counts in kinds.items():
        for k, times in enumerate(counts):
            if times > max(2, STRANGE * count) and k not in real:
                sentence = (
                    f"class {k}, which no label has, is answered for {times} of {count} {kind} "
                    "images"
                )
                certain = one_more and kind != "random"
                (failed if certain else doubtful).append(
                    f"{sentence}: it may abstain, unless images of that class are missing here"
                )
    answered = [k for k, times in enumerate(kinds["natural"]) if times]
    right = natural.result.correct
    if len(answered) == 1 and len(has) > 1:
        failed.append(f"class {answered[0]} is answered for each of {count} images")
    elif count >= LEAST_IMAGES and not beats_chance(right, count, 1 / logits.shape[1]):
        failed.append(f"{right} of {count} natural images are right, no better than by chance")
    return found(
        f"{len(answered)} of {logits.shape[1]} classes are answered, and {right} of {count} "
        "natural images are right",
        failed,
        doubtful,
    )


def gradients(case: Case) -> Finding:
    """Check gradients for zeros, against differences, and against those beside; report linearity.

    The differences are central, of the margin, at ``PIXELS`` random pixels. Local linearity is the
    gap between the margin at the corner of the ball that the gradient points to and what the
    gradient foretells (Qin et al., Adversarial Robustness through Local Linearization, 2019),
    relative to what it foretells.
    """
    guard = Guard(case.subject.network, stop=case.task.kept.stop)
    with measuring(case.subject.network, case.task.device):
        batches = probe(case)
        failed = list(find_masking(guard, batches))
        x, y = batches[0]
        slope = gradient(guard, x, y)
        apart = difference(guard, x, y, slope, case.task.seed)
        cosine = beside(case, guard, x, y, slope)
        bent = linearity(case, guard, x, y, slope)
    doubtful = []
    if apart > DIFFERENCE_DOUBT:
        (failed if apart > DIFFERENCE_MOST else doubtful).append(
            f"gradients at {PIXELS} pixels are {apart:.0%} of their length away from differences "
            "of the margin"
        )
    if not failed and cosine < LEAST_COSINE:
        doubtful.append(f"gradients a step of noise apart have a cosine of {cosine:.2f}")
    zeros = float((slope == 0).double().mean())
    return found(
        f"{zeros:.1%} of gradients are exactly zero; they are {apart:.1%} away from differences at "
        f"{PIXELS} pixels, have a cosine of {cosine:.2f} with those a step of noise apart, and "
        f"miss what the margin becomes at the ball's edge by {bent:.0%}",
        failed,
        doubtful,
    )


def gradient(guard: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the gradient of the margin in images [n, C, H, W], of their shape."""
    leaf = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(margin(guard(leaf), y).sum(), leaf)
    return slope


def difference(guard: nn.Module, x: Tensor, y: Tensor, slope: Tensor, seed: int) -> float:
    """Return the distance of gradients and central differences, relative to the longer of them.

    It is 0 where both are 0 everywhere.
    """
    draw = torch.Generator().manual_seed(seed)
    count = min(len(x), PIXELS // PER_IMAGE)
    size = x[0].numel()
    places = torch.stack([torch.randperm(size, generator=draw)[:PER_IMAGE] for _ in range(count)])
    rows = torch.arange(count).repeat_interleave(places.shape[1]).to(x.device)
    columns = places.flatten().to(x.device)
    step = torch.zeros(len(rows), size, dtype=x.dtype, device=x.device)
    step.scatter_(1, columns[:, None], WIDTH)
    step = step.view(-1, *x.shape[1:])
    # Inside [0, 1] on both sides, as a network may clip what it is given.
    middle = x[rows].clamp(WIDTH, 1 - WIDTH)
    with torch.no_grad():
        ends = [margin(guard(middle + s * step), y[rows]) for s in (1, -1)]
    steep = (ends[0] - ends[1]) / (2 * WIDTH)
    own = slope.flatten(1)[rows, columns]
    longer = max(float(steep.norm()), float(own.norm()))
    return float((steep - own).norm()) / longer if longer else 0.0


def beside(case: Case, guard: nn.Module, x: Tensor, y: Tensor, slope: Tensor) -> float:
    """Return the mean cosine of gradients with those at an eighth of the radius of noise away."""
    draw = torch.Generator(device=x.device).manual_seed(case.task.seed)
    radius = case.task.eps / 8
    near = start_point(x, eps=radius, start="uniform", norm=case.task.norm, generator=draw)
    other = gradient(guard, near, y)
    return float(nn.functional.cosine_similarity(slope.flatten(1), other.flatten(1)).mean())


def linearity(case: Case, guard: nn.Module, x: Tensor, y: Tensor, slope: Tensor) -> float:
    """Return the mean gap between the margin at the ball's edge and what the gradient foretells."""
    flat = slope.flatten(1)
    length = flat.norm(dim=1, keepdim=True).clamp(min=1e-12)
    towards = flat.sign() if case.task.norm == "linf" else flat / length
    moved = (x + case.task.eps * towards.view_as(x)).clamp(0, 1)
    foretold = (flat * (moved - x).flatten(1)).sum(1)
    with torch.no_grad():
        came = margin(guard(moved), y) - margin(guard(x), y)
    longer = float(foretold.abs().sum())
    return float((came - foretold).abs().sum()) / longer if longer else math.nan


# Checks that no attack precedes, and that are kept once made.
KEPT = {"answers": answers, "gradients": gradients}


def kept(case: Case, name: str) -> Finding:
    """Return what one of these checks finds, from a part of the task."""
    return case.one(f"check {name}", partial(refusing, partial(KEPT[name], case)))
