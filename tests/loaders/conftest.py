from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cure_fast.loaders import (
    ImageSet,
    beton,
    ensure_beton,
    ffcv_loader,
    ffcv_reader,
    ffcv_writer,
)
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
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `cache`, whose name has what a path in C must survive."""
    return tmp_path_factory.mktemp("Ablage für später")


@pytest.fixture(scope="session")
def readers() -> Callable[..., Any]:
    """FFCV's readers, each made once: it compiles a second for each, and epochs are apart."""
    return functools.cache(ffcv_reader.open_reader)


@pytest.fixture
def cache(
    ffcv_here, shared: Path, readers: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A folder for FFCV files that the tests share, so that each set is written once.

    It is written in this process: a child of it, which imports and compiles for 8 s, is what
    test_beton.py is about.
    """
    monkeypatch.setattr(beton, "_run_child", write_here)
    monkeypatch.setattr(ffcv_loader, "open_reader", readers)
    return shared


def write_here(work: Path, temporary: Path, *_: object) -> str:
    """Write as the child does; return the checksum that it prints."""
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        ffcv_writer.main([str(work / "images.npy"), str(work / "labels.npy"), str(temporary)])
    return told.getvalue().strip()


@pytest.fixture(scope="session")
def written(ffcv_here, shared: Path) -> tuple[Path, ImageSet]:
    """A .beton file with its manifest and what is in it; copy it before altering it."""
    images = random_images()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(beton, "_run_child", write_here)
        path = ensure_beton(images, shared)
    return path, images
