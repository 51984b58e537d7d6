"""Images per second of each loader, as training gets them.

    python -m pytest bench/bench_loaders.py --benchmark-only

One round is a whole epoch of 50,000 random images of 32 x 32 pixels in batches of 128, on the GPU
where there is one; the time of a batch does not depend on what the pixels show. ``images_per_s``
(extra_info) is the median round's. FFCV's file is written before, and the first epoch, which
compiles, is timed on its own in a fresh process. ``bare`` is FFCV without the step to floats.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cure_fast.loaders import ImageSet, crop_flip, ensure_beton, make_loader
from cure_fast.loaders.ffcv_reader import ffcv_problem, open_epoch, open_reader

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
COUNT, BATCH, SIZE, ROUNDS = 50_000, 128, 32, 5
AUGMENTED = {"crop_padding": 4, "flip": True}
PLAIN = {"crop_padding": 0, "flip": False}


@pytest.fixture(scope="module")
def images() -> ImageSet:
    rng = np.random.default_rng(0)
    return ImageSet(
        name="random",
        images=rng.integers(0, 256, (COUNT, SIZE, SIZE, 3), dtype=np.uint8),
        labels=rng.permutation(COUNT) % 10,
        classes=tuple("0123456789"),
        source="a generator",
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def measure(benchmark, epoch, images: int) -> None:
    """Time ``epoch``, a function that returns the number of images it read."""
    assert benchmark.pedantic(epoch, rounds=ROUNDS, warmup_rounds=1) == images
    benchmark.extra_info["device"] = str(DEVICE)
    benchmark.extra_info["torch_threads"] = torch.get_num_threads()
    benchmark.extra_info["images_per_s"] = round(images / benchmark.stats.stats.median)
    print(f"\n{benchmark.name}: {benchmark.extra_info['images_per_s']:,} images/s")


@pytest.mark.parametrize("augmentation", [AUGMENTED, PLAIN], ids=["augmented", "plain"])
@pytest.mark.parametrize("kind", ["ffcv", "resident", "torch"])
def test_loader(benchmark, images, cache, kind, augmentation) -> None:
    if kind == "ffcv" and (problem := ffcv_problem()):
        pytest.skip(problem)
    loader = make_loader(
        kind, images, batch_size=BATCH, device=DEVICE, seed=0, workers=None, cache=cache,
        **augmentation,
    )  # fmt: skip

    def epoch() -> int:
        with loader.epoch(0) as batches:
            seen = sum(len(batch) for batch in batches)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return seen

    measure(benchmark, epoch, loader.num_images)


@pytest.mark.parametrize("threads", [1, 2])
def test_bare_ffcv(benchmark, images, cache, threads) -> None:
    if problem := ffcv_problem():
        pytest.skip(problem)
    reader = open_reader(ensure_beton(images, cache), batch_size=BATCH, threads=threads)
    order = np.random.default_rng(0).permutation(COUNT)

    def epoch() -> int:
        with open_epoch(reader, order) as batches:
            return sum(len(labels) for _, labels in batches)

    measure(benchmark, epoch, COUNT)


def test_augmentation(benchmark, images) -> None:
    batches = torch.from_numpy(images.images[: 40 * BATCH]).to(DEVICE).split(BATCH)

    def epoch() -> int:
        seen = 0
        for number, batch in enumerate(batches):
            seen += len(crop_flip(batch, seed=0, epoch=0, batch=number, **AUGMENTED))
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return seen

    measure(benchmark, epoch, 40 * BATCH)


FIRST_BATCH = """
import sys, time
import torch
started = time.perf_counter()
from cure_fast.loaders.ffcv_reader import open_epoch, open_reader
import numpy as np
with open_epoch(open_reader(sys.argv[1], batch_size=128, threads=1), np.arange(256)) as batches:
    next(batches)
print(time.perf_counter() - started)
"""


def test_first_batch_of_a_process(benchmark, images, cache) -> None:
    """What FFCV costs a process once, after torch: its import and numba's compiling."""
    if problem := ffcv_problem():
        pytest.skip(problem)
    path = ensure_beton(images, cache)

    def first_batch() -> float:
        command = [sys.executable, "-c", FIRST_BATCH, str(path)]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    seconds = benchmark.pedantic(first_batch, rounds=3)
    benchmark.extra_info["seconds_after_torch"] = round(seconds, 2)
    print(f"\n{benchmark.name}: {seconds:.2f} s")
    assert 0 < seconds < 60
