"""Checks of what is known beside the network: its run's record, its images, published figures."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cure_fast.analysis.audit.attacking import of_record
from cure_fast.analysis.audit.case import Case, Finding, absent, found
from cure_fast.analysis.audit.published import highest_for
from cure_fast.config.attack_names import attack_name, parse_attack
from cure_fast.config.checks import format_radius
from cure_fast.errors import InputError
from cure_fast.evaluation.attack_result import AttackResult
from cure_fast.evaluation.record import stored_record
from cure_fast.loaders import ImageSet
from cure_fast.runs.folder import load_config

# Standard deviations that two measurements of one accuracy may differ by.
SURE = 3
# Percentage points by which attacks other than AutoAttack may leave more right than it does.
WEAKER_ATTACK = 5.0
# Attacks of a record that it is held against: AutoAttack leaves no more than PGD does.
FAMILIES = ("natural", "fgsm", "pgd", "cw", "aa")
# Share of test images that may be training images too: CIFAR-10's own duplicates are fewer.
FEW_SHARED = 1e-3


def counts(case: Case) -> Finding:
    """Check that the record of a run counts all test images, and adds up."""
    folder = case.subject.folder
    if folder is None:
        return absent("no record of a run: counts are what its results.json says")
    record, results = stored_record(folder / "results.json"), of_record(case)
    if record is None or not results:
        return absent("the run has no results.json with results of its network")
    try:
        test = case.known.test() if case.known.test else None
    except InputError as error:
        return absent(f"the test images cannot be read: {error}")
    whole = len(test) if test else record["test_images"]
    failed = []
    if record["test_images"] != whole:
        failed.append(
            f"results.json says that there are {record['test_images']} test images; the set has "
            f"{whole}"
        )
    for name, result in results.items():
        failed += wrong_sums(name, result, whole, test)
    failed += unlike(case, results)
    part = [f"{attack_name(n)} on {r.count}" for n, r in results.items() if r.count < whole]
    none = "no result is of all" if len(part) == len(results) else "of"
    doubtful = [f"{none} {whole} test images: {', '.join(part)}"] if part and not failed else []
    told = ", ".join(f"{attack_name(n)} {r.correct} of {r.count}" for n, r in results.items())
    return found(f"{told}; the set has {whole} test images", failed, doubtful)


def wrong_sums(name: str, result: AttackResult, whole: int, test: ImageSet | None) -> list[str]:
    """Return where the counts of a result do not add up to its shares of each class."""
    title = attack_name(name)
    if not 0 <= result.correct <= result.count or result.count > whole:
        return [f"{title}: {result.correct} of {result.count} images, of {whole} that there are"]
    if test is None or not result.by_class:
        return []
    sizes = np.bincount(test.labels[: result.count], minlength=len(result.by_class))
    right = [n * (s or 0) / 100 for n, s in zip(sizes, result.by_class, strict=False)]
    odd = any(abs(value - round(value)) > 1e-6 * max(1, value) for value in right)
    if len(sizes) != len(result.by_class) or odd or round(sum(right)) != result.correct:
        return [
            f"{title}: {result.correct} of {result.count} images are said to be right, which the "
            f"shares of the classes do not add up to ({sum(right):.1f})"
        ]
    return []


def unlike(case: Case, results: Mapping[str, AttackResult]) -> list[str]:
    """Return where the record differs from what is measured here, by more than chance.

    Under attack only more that are right speak against it.
    """
    failed = []
    known = {name: results[name] for name in results.keys() & {"natural"}} | recorded(case)
    for name, told in known.items():
        if parse_attack(name).family not in FAMILIES:
            continue
        measured = case.strongest[0] if name == "aa" else name
        here = case.measure(measured).result
        share = (told.correct + here.correct) / (told.count + here.count)
        noise = 100 * SURE * math.sqrt(share * (1 - share) * (1 / told.count + 1 / here.count))
        difference = told.accuracy - here.accuracy
        if (abs(difference) if name == "natural" else difference) > noise + 100 / here.count:
            what = (
                "natural accuracy" if name == "natural" else f"accuracy under {attack_name(name)}"
            )
            of = f" under {attack_name(measured)}" if name != measured else ""
            failed.append(
                f"{what} is {told.accuracy:.1f} % in results.json, and {here.accuracy:.1f} % of "
                f"{here.count} images here{of}"
            )
    return failed


def selection(case: Case) -> Finding:
    """Check that the epoch of a run's result was chosen on images held out of training."""
    folder = case.subject.folder
    if folder is None:
        return absent("no record of a run: only it says on which images its epoch was chosen")
    config = load_config(folder)
    epoch = (stored_record(folder / "results.json") or {"models": {}})["models"]
    which = epoch.get("trained", {}).get("epoch")
    if "best" not in config.eval.evaluate:
        return found("the result is of the last epoch: none was chosen")
    held = config.data.val_images
    told = f"epoch {which or '?'} of {config.optim.epochs} was chosen on {held} held-out images"
    try:
        _, val = case.known.training() if case.known.training else (None, None)
    except InputError as error:
        return found(f"{told} by config.json, which could not be looked at ({error})")
    if val is None:
        return found(f"{told} by config.json")
    shared = overlapping(case, val)
    if shared > FEW_SHARED * len(val):
        return found("", [f"{told}, of which {shared} are test images"])
    least = 10 * len(case.task.classes)
    told = f"{told}, of which {shared} are test images"
    few = [f"{told}; they are few for {len(case.task.classes)} classes"] if held < least else []
    return found(told, [], few)


def overlap(case: Case) -> Finding:
    """Check by their pixels that no test image is a training image."""
    if case.known.training is None:
        return absent("the training images are not known; from Python give train_images")
    try:
        train, _ = case.known.training()
        shared = None if train is None else overlapping(case, train)
    except InputError as error:
        return absent(f"images cannot be read: {error}")
    if train is None or shared is None:
        return absent("there are no training images")
    count = len(test_images(case))
    told = f"{shared} of {count} test images are among {len(train)} training images"
    if shared > FEW_SHARED * count:
        return found("", [told])
    return found(told, doubtful=[told] if shared else [])


def test_images(case: Case) -> Tensor:
    """Return all test images, or those of the audit where the others are not known."""
    if case.known.test is None:
        return case.task.images
    return torch.from_numpy(case.known.test().images)


def overlapping(case: Case, others: Tensor) -> int:
    """Return how many test images are among these."""
    there = digests(others)
    return sum(each in there for each in digests(test_images(case), all_of=True))


def digests(images: Tensor, *, all_of: bool = False) -> Any:
    """Return the hashes of images [N, H, W, C] as 8 bits hold them, as a set or ``all_of`` them."""
    pixels = images if images.dtype == torch.uint8 else (255 * images).round().to(torch.uint8)
    rows = pixels.contiguous().numpy()
    hashes = (hashlib.sha256(row.tobytes()).digest() for row in rows)
    return list(hashes) if all_of else set(hashes)


def published(case: Case) -> Finding:
    """Check that no accuracy is far above the highest that is published."""
    task = case.task
    row = highest_for(case.data, task.norm, task.eps)
    if row is None:
        ball = format_radius(task.eps, task.norm)
        return absent(
            f"no published figures are known here of {case.data or 'these images'}, {ball}"
        )
    results = {f"{attack_name(n)}, results.json": r for n, r in recorded(case).items()}
    # The least that the audit's own attacks leave: each leaves at least what is truly robust.
    for name in case.strongest:
        results[attack_name(name)] = case.measure(name).result
    least = min(results, key=lambda name: results[name].accuracy)
    result = results[least]
    share = result.correct / result.count
    noise = 100 * SURE * math.sqrt(share * (1 - share) / result.count)
    room = noise + (0 if result.attack == "aa" else WEAKER_ATTACK)
    failed, doubtful = [], []
    told = f"{result.accuracy:.1f} % are right under {least}; the highest published are "
    told += f"{row.alone} % ({row.alone_of}), with further images {row.any} % ({row.any_of})"
    if result.accuracy - room > row.any:
        failed.append(f"{told}: implausible")
    elif result.accuracy - room > row.alone:
        doubtful.append(f"{told}: plausible only with further images")
    return found(told, failed, doubtful)


def recorded(case: Case) -> dict[str, AttackResult]:
    """Return the results under attack that a run has recorded at the audit's radius."""
    results = of_record(case)
    return {
        name: result
        for name, result in results.items()
        if name != "natural" and math.isclose(result.settings.get("eps", 0), case.task.eps)
    }


CHECKS = {
    "counts": counts,
    "selection": selection,
    "overlap": overlap,
    "published": published,
}
