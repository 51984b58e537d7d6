from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cure_fast.loaders import ImageSet, ensure_beton
from cure_fast.loaders.ffcv_reader import ffcv_problem

CLASSES = ("ape", "bee", "cat")


def random_images(count: int = 67, size: int = 8, *, seed: int = 0) -> ImageSet:
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % len(CLASSES)
    return ImageSet(
        name="random",
        images=rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8),
        labels=rng.permutation(labels).astype(np.int64),
        classes=CLASSES,
        source="a generator",
    )


@pytest.fixture(scope="session")
def make_images() -> Callable[..., ImageSet]:
    """Makes random images of three classes: make_images(count, size, seed=...)."""
    return random_images


@pytest.fixture(scope="session")
def ffcv_here() -> None:
    """Skips the tests that need FFCV where it is absent."""
    if problem := ffcv_problem():
        pytest.skip(problem)


@pytest.fixture(scope="session")
def cache(ffcv_here, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for FFCV files that the tests share, so that each set is written once.

    Its name has what a path in C must survive.
    """
    return tmp_path_factory.mktemp("Ablage für später")


@pytest.fixture(scope="session")
def written(cache: Path) -> tuple[Path, ImageSet]:
    """A .beton file with its manifest and what is in it; copy it before altering it."""
    images = random_images()
    return ensure_beton(images, cache), images
