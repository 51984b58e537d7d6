"""What several scenarios of faults share."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from environments import QUICK
from killing import Unbroken, measure_unbroken
from processes import start


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Four images of 8 pixels in each of two classes, for training and for testing."""
    for split in ("train", "test"):
        for value, name in enumerate(("bee", "cat")):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (8, 8), (100 * value, 10 * i, 7)).save(folder / f"{i}.png")
    return tmp_path / "photos"


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    """A run with nothing strange about it; the others take their natural start from its cache.

    What it printed is in ``stdout`` and ``stderr`` beside it.
    """
    base = tmp_path_factory.mktemp("environments")
    running = start([*QUICK, "--cache", str(base / "cache"), "--out", "plain"], base)
    assert running.wait() == 0, running.output()
    (base / "stdout").write_text(running.stdout(), encoding="utf-8", newline="")
    (base / "stderr").write_text(running.stderr(), encoding="utf-8", newline="")
    return base / "plain"


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Unbroken:
    """The tiny run without a fault, that a run which meets one is compared with."""
    return measure_unbroken(tmp_path_factory.mktemp("unbroken"))


@pytest.fixture
def short_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the report's pictures take one step of the attack, where they are not looked at."""
    monkeypatch.setattr("cure_fast.evaluation.results.EXAMPLE_STEPS", 1)
