"""Checks of attacks: their order, their ball, and whether others find more than they do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from cure_fast.analysis.audit.case import Case, Finding, absent, found, refusing
from cure_fast.analysis.audit.rescoring import in_new_process
from cure_fast.analysis.opening import load
from cure_fast.config.attack_names import attack_name
from cure_fast.evaluation.attack_result import AttackResult
from cure_fast.evaluation.autoattack import SQUARE_SHARE, attack_batch, autoattack_settings
from cure_fast.evaluation.evaluate import measuring
from cure_fast.evaluation.record import stored_record
from cure_fast.evaluation.trust import EPS_TOLERANCE, Guard, trust_warnings
from cure_fast.runs.folder import load_config

# Percentage points by which the last doubling of the steps may still lower the accuracy.
STILL_FALLING = 2.0
# Percentage points that the rounding of adversarial images to 8 bits may give back.
LOST_IN_ROUNDING = 5.0
# Radii of the curve in L-inf, in pixel units, beside the half, whole and double of the audit's.
# From the half of the range on, all images can be made one gray: no more are right than are of
# one class. The whole range makes each image any other.
WIDE, GRAY, ALL = 64 / 255, 0.5, 1.0
# Percent that may be right at the wide radius, where that is several times the audit's, and at
# the whole range.
RIGHT_AT_WIDE, RIGHT_AT_ALL = 10.0, 1.0
# Images that Square is tried on.
SQUARE_IMAGES = 64


def zero(case: Case) -> Finding:
    """Check that an attack of radius 0 leaves exactly the natural accuracy."""
    natural, none = case.measure("natural"), case.measure(f"pgd{case.steps[0]}", 0.0)
    name = attack_name(none.result.attack)
    told = f"{name} of radius 0 leaves {none.result.correct} of {none.result.count} images right"
    if natural.result.correct == none.result.correct:
        return found(f"{told}, as many as without an attack")
    return found("", [f"{told}, and without an attack they are {natural.result.correct}"])


def order(case: Case) -> Finding:
    """Check that stronger attacks leave less, here and in the record of the run."""
    names = ["natural", "fgsm", *(f"pgd{k}" for k in case.steps), case.strongest[1]]
    results = {name: case.measure(name).result for name in names}
    failed = in_order(results)
    told = ", ".join(f"{attack_name(n)} {r.accuracy:.1f} %" for n, r in results.items())
    record = of_record(case)
    if record:
        failed += [f"results.json: {text}" for text in in_order(record)]
        recorded = ", ".join(f"{attack_name(n)} {r.accuracy:.1f} %" for n, r in record.items())
        told = f"{told}; results.json has {recorded}"
    return found(told, failed)


def in_order(results: Mapping[str, AttackResult]) -> list[str]:
    """Return what is out of order between results, without what speaks against single ones."""
    return trust_warnings({name: replace(r, warnings=()) for name, r in results.items()})


def of_record(case: Case) -> dict[str, AttackResult]:
    """Return the results that a run has recorded of its network; empty where there are none."""
    if case.subject.folder is None:
        return {}
    record = stored_record(case.subject.folder / "results.json")
    attacks = record["models"].get("trained", {}).get("attacks", {}) if record else {}
    return {name: AttackResult.from_dict(told) for name, told in attacks.items()}


def plateau(case: Case) -> Finding:
    """Check that the last doubling of steps, and restarts, lower the accuracy no further."""
    pgd = [case.measure(f"pgd{k}") for k in case.steps[1:]]
    most = case.strongest[1]
    names = [attack_name(m.result.attack) for m in pgd]
    half, whole = (m.accuracy for m in pgd)
    either = 100 * float(case.survivors().double().mean())
    noise = max(STILL_FALLING, 200 / len(case.task.images))
    told = (
        f"{half:.1f} % under {names[0]}, {whole:.1f} % under {names[1]}, and {either:.1f} % are "
        f"right under both this and {attack_name(most)}"
    )
    if half - whole > noise:
        return found("", doubtful=[f"{told}: more steps are likely to find more"])
    return found(told)


def ball(case: Case) -> Finding:
    """Check distance and range of adversarial images, also as 8 bits hold them."""
    measured = [case.measure(name) for name in ("fgsm", *case.strongest)]
    eps, count = case.task.eps, len(case.task.images)
    farthest = max(m.told["farthest"] for m in measured)
    low = min(m.told["range"][0] for m in measured)
    high = max(m.told["range"][1] for m in measured)
    failed = []
    if not (farthest <= eps + EPS_TOLERANCE * max(1, eps) and low >= 0 and high <= 1):
        failed.append(f"images lie {farthest:g} away at eps {eps:g}, from {low:g} to {high:g}")
    last = case.measure(case.strongest[1])
    whole, rounded = int(last.right.sum()), last.told["right_in_8_bits"]
    told = (
        f"images of {len(measured)} attacks lie at most {farthest:.6f} away (eps {eps:.6f}), from "
        f"{low:g} to {high:g}; {whole} of {count} are right, and {rounded} after rounding to 8 bits"
    )
    lost = 100 * (rounded - whole) / count > max(LOST_IN_ROUNDING, 200 / count)
    return found(told, failed, [f"{told}: rounding undoes the attack"] if lost else [])


def curve(case: Case) -> Finding:
    """Check that the accuracy falls to 0 where the ball has all images.

    The numbers have ``curve``, pairs of radius in pixel units and accuracy in percent.
    """
    eps, attack = case.task.eps, case.strongest[0]
    # A change of every pixel by r is as long as r times the root of their number.
    scale = math.sqrt(case.task.pixels[0].numel()) if case.task.norm == "l2" else 1.0
    ends = [r * scale for r in (WIDE, GRAY, ALL)]
    radii = sorted({eps / 2, eps, 2 * eps, *ends})
    points = [(0.0, case.measure("natural").accuracy)]
    for radius in [r for r in radii if r <= ALL * scale]:
        gone = points[-1][1] == 0
        points.append((radius, 0.0 if gone else case.measure(attack, radius).accuracy))
    at = dict(points)
    counts = case.task.labels.bincount()
    largest = 100 * float(counts.max()) / len(case.task.labels)
    noise = 200 / len(case.task.images)
    failed, doubtful = [], []
    if at[ends[1]] > largest:
        failed.append(
            f"{at[ends[1]]:.1f} % are right at radius {ends[1]:.3g}, where all images can be made "
            f"one, of which {largest:.1f} % at most are right"
        )
    if at[ends[2]] > RIGHT_AT_ALL + noise:
        failed.append(f"{at[ends[2]]:.1f} % are right at radius {ends[2]:.3g}, the whole range")
    if 4 * eps <= ends[0] and at[ends[0]] > RIGHT_AT_WIDE:
        doubtful.append(f"{at[ends[0]]:.1f} % are right at radius {ends[0]:.3g}")
    for (a, before), (b, after) in pairwise(points):
        if after > before + noise:
            doubtful.append(f"{after:.1f} % at radius {b:.3g} after {before:.1f} % at {a:.3g}")
    told = ", ".join(f"{value:.1f} % at {radius:.3g}" for radius, value in points)
    return {**found(told, failed, doubtful), "curve": points}


def black_box(case: Case) -> Finding:
    """Check that Square, and images that fool the run's start, break nothing that gradients left.

    The start is the naturally trained network that a method such as CURE begins from.
    """
    left = case.survivors()
    if not left.any():
        return absent("the attacks with gradients left no image right")
    told = []
    # In L2 its squares are of a fifth of an image.
    if case.task.norm == "linf" or case.task.images.shape[1] >= 5:
        fell = case.one(f"square, {case.settings.queries} queries", partial(by_square, case, left))
        tried = min(int(left.sum()), SQUARE_IMAGES)
        told = [(fell, tried, f"Square of {case.settings.queries} queries")]
    start = case.subject.folder and case.subject.folder / "start.safetensors"
    if start and start.exists():
        other = case.one("transfer", partial(by_transfer, case, left, start))
        told.append((other, int(left.sum()), "images that fool the start"))
    if not told:
        return absent("Square in L2 needs images of 5 pixels or more, and there is no start")
    failed, doubtful = [], []
    for broke, of, what in told:
        share = broke / of * float(left.double().mean())
        if broke and share > SQUARE_SHARE:
            text = f"{what} broke {broke} of {of} images that attacks with gradients left right"
            # A single one may be the last that a longer attack would have found.
            (failed if broke > max(1, 0.02 * of) else doubtful).append(text)
    return found(
        "; ".join(f"{what} broke {broke} of {of} images left right" for broke, of, what in told),
        failed,
        doubtful,
    )


def by_square(case: Case, left: Tensor) -> int:
    """Return how many of the first images that are left right Square breaks."""
    indices = left.nonzero().flatten()[:SQUARE_IMAGES]
    guard = Guard(case.subject.network, stop=case.task.kept.stop)
    device, task = case.task.device, case.task
    x, y = task.pixels[indices].to(device, guard.dtype), task.labels[indices].to(device)
    with measuring(case.subject.network, device):
        classes = guard(x[:1]).shape[1]
        settings = autoattack_settings(
            eps=task.eps,
            norm=task.norm,
            num_classes=classes,
            batch_size=task.batch_size,
            seed=task.seed,
        )
        settings["square_queries"] = case.settings.queries
        broken = [
            attack_batch(guard, "square", *pair, settings)[1]
            for pair in zip(x.split(task.batch_size), y.split(task.batch_size), strict=True)
        ]
    return int(torch.cat(broken).sum())


def by_transfer(case: Case, left: Tensor, start: Path) -> int:
    """Return how many images that are left right fall to those that fool another network."""
    folder = start.parent
    other = load(start, model=load_config(folder).model.model).to(case.task.device)
    task = replace(case.task, subjects=[replace(case.subject, model=other)])
    attacked = task.attacked(task.subjects[0], case.strongest[0])
    wrong = case.logits(attacked).argmax(1) != case.task.labels
    return int((wrong & left).sum())


def rescoring(case: Case) -> Finding:
    """Check that saved images score the same one by one, many at once, and in a new process."""
    return case.one("check rescoring", partial(refusing, partial(rescored, case)))


def rescored(case: Case) -> Finding:
    """Return what :func:`rescoring` finds; the new process is made for a run, by its files."""
    task, subject = case.task, case.subject
    attacked = task.attacked(subject, f"pgd{case.steps[0]}")
    right = {
        size: int((case.logits(attacked, size=size).argmax(1) == task.labels).sum())
        for size in (1, 256)
    }
    told = [f"{count} of {len(attacked)} in batches of {size}" for size, count in right.items()]
    counts: Sequence[int] = [*right.values()]
    if subject.folder is not None:
        counts = [*counts, in_new_process(subject.folder, attacked, task.labels)]
        told.append(f"{counts[-1]} in a new process")
    text = f"{', '.join(told)} are right"
    if subject.folder is None:
        text += "; a new process has no such network, and was not asked"
    return found(text) if len({*counts}) == 1 else found("", [text])


CHECKS = {
    "zero": zero,
    "order": order,
    "plateau": plateau,
    "ball": ball,
    "curve": curve,
    "black-box": black_box,
    "rescoring": rescoring,
}
