"""How many CPU threads torch computes with: as asked, as before, or as a short trial finds best.

Threads wait for one another after each operation. Where tensors are small, or another program holds
one of the cores, that takes longer than a single thread does: docs/log.md has measurements.
"""

from __future__ import annotations

import copy
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from cure_fast.classifier import ImageClassifier, attack_mode
from cure_fast.console import say

# Seconds of a trial, and of processor time that a pass of it takes at least where a batch does: one
# image of a ResNet-18 is no quicker with two threads, and sixteen take 55 % of the time.
TRIAL_S, PASS_S = 0.8, 0.1
# More threads are taken where they save a fifth of the time: they lose far more than that as soon
# as another program begins.
WORTH = 0.8


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Have torch compute with so many CPU threads for the block."""
    former = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(former)


def choose_threads(
    asked: int | str,
    model: ImageClassifier,
    device: torch.device,
    *,
    image_size: int,
    batch_size: int,
    recorded: int | None = None,
) -> int:
    """Return the number of threads to compute with, and say in a line where it was measured.

    Args:
        asked: the number, or ``auto``: the one ``recorded``, as rounding depends on it, else what
            OMP_NUM_THREADS says, else what a second's trial finds best; on a GPU torch's own.
        model: what will be computed, on the CPU; a copy of it is tried.
        device: where it will be.
        image_size: height and width of its images in pixels.
        batch_size: images of one pass.
        recorded: how many a run computed with before; None for one that begins.
    """
    most = torch.get_num_threads()
    if isinstance(asked, int):
        return asked
    if recorded is not None:
        return recorded
    if device.type != "cpu" or most == 1 or os.environ.get("OMP_NUM_THREADS"):
        return most
    numbers = sorted({1, most // 2, most})
    seconds = timed(model, numbers, image_size=image_size, batch_size=batch_size)
    best = quickest(seconds)
    told = ", ".join(f"{s * 1000:.3g} ms with {number}" for number, s in seconds.items())
    say(f"threads: {best}, as a pass takes {told} (--threads N sets the number)")
    return best


def quickest(seconds: dict[int, float]) -> int:
    """Return the number of threads, ascending in ``seconds``, that is worth its cores."""
    best = min(seconds)
    for number, taken in seconds.items():
        if taken < WORTH * seconds[best]:
            best = number
    return best


def timed(
    model: ImageClassifier, numbers: list[int], *, image_size: int, batch_size: int
) -> dict[int, float]:
    """Return the median seconds of a pass with each number of threads.

    A pass is what attacks consist of: to the logits and back to the images, in evaluation mode. The
    numbers take turns, so that what else happens meanwhile happens to each.
    """
    model = copy.deepcopy(model)
    taken: dict[int, list[float]] = {number: [] for number in numbers}
    started = time.perf_counter()
    with attack_mode(model, "eval"):
        with threads(1):
            images = fitting(model, image_size=image_size, batch_size=batch_size)
        while not taken[numbers[-1]] or time.perf_counter() < started + TRIAL_S:
            for number in numbers:
                with threads(number):
                    before = time.perf_counter()
                    there_and_back(model, images)
                    taken[number].append(time.perf_counter() - before)
    return {number: statistics.median(each) for number, each in taken.items()}


def pace(
    model: ImageClassifier,
    number: int,
    *,
    image_size: int,
    batch_size: int,
    dtype: torch.dtype | None = None,
) -> float:
    """Return the seconds of a pass of one image in attacks, on the CPU with so many threads.

    Passes are counted as in :mod:`cure_fast.progress`: back to the images is a second one. They
    are computed in ``dtype``, by default in float32.
    """
    autocast = torch.autocast("cpu", dtype) if dtype else nullcontext()
    with attack_mode(model, "eval"), threads(number), autocast:
        images = fitting(model, image_size=image_size, batch_size=batch_size)
        before = time.perf_counter()
        there_and_back(model, images)
        return (time.perf_counter() - before) / (2 * len(images))


def fitting(model: ImageClassifier, *, image_size: int, batch_size: int) -> Tensor:
    """Return grey images [n, 3, H, W]: a batch of them, or as many as keep the trial short."""
    count = 1
    while True:
        grey = torch.full((count, 3, image_size, image_size), 0.5)
        images = grey.contiguous(memory_format=torch.channels_last).requires_grad_()
        # Not the time of the clock, which passes while another program has the core.
        before = time.process_time()
        there_and_back(model, images)
        if count == batch_size or time.process_time() - before >= PASS_S:
            return images
        count = min(2 * count, batch_size)


def there_and_back(model: ImageClassifier, images: Tensor) -> None:
    """Compute the gradient of the summed logits in the images."""
    torch.autograd.grad(model(images).sum(), images)
