"""What a run's folder is called, and which one --resume finds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cure_fast.config import Config
from cure_fast.config.values import to_dict
from cure_fast.errors import InputError
from cure_fast.files import write_json
from cure_fast.recipes import find_recipe
from cure_fast.runs.folder import run_folder


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def made(config: Config, name: str) -> Path:
    """A run of the configuration in a folder of that name."""
    path = Path("runs") / name
    path.mkdir(parents=True)
    write_json(path / "config.json", to_dict(config))
    return path


@pytest.mark.parametrize(
    ("data", "model", "name"),
    [
        ("cifar10", "wrn34-10", "cifar10-wrn34-10-cure-s0"),
        ("folder:/somewhere/my photos/", "resnet18", "my-photos-resnet18-cure-s0"),
        ("folder:..", "resnet18", "folder-resnet18-cure-s0"),
        ("cifar10", "own.nets:small", "cifar10-small-cure-s0"),
        ("folder:" + "x" * 300, "resnet18", f"{'x' * 64}-resnet18-cure-s0"),
    ],
)
def test_a_run_is_named_after_what_is_trained(data, model, name):
    config = replace(find_recipe("quickstart"), name="anything")
    config = replace(config, data=replace(config.data, data=data))
    config = replace(config, model=replace(config.model, model=model))
    assert run_folder(config, resume=False) == Path("runs") / name


def test_resume_takes_the_newest_of_the_same_recipe():
    plain, fast = find_recipe("cifar10-resnet18"), find_recipe("cifar10-resnet18-fast")
    base = "cifar10-resnet18-cure-s0"
    for config in (plain, fast):
        assert run_folder(config, resume=False) == Path("runs") / base
        with pytest.raises(InputError, match=f"there is no run in runs/{base}; name its folder"):
            run_folder(config, resume=True)
    made(plain, base)
    # What a recipe is called does not decide what a run is.
    assert run_folder(replace(plain, name="mine"), resume=True) == Path("runs") / base
    for number in (2, 9, 10):
        made(fast if number == 10 else plain, f"{base}-{number}")
    assert run_folder(plain, resume=True) == Path("runs") / f"{base}-9"
    assert run_folder(fast, resume=True) == Path("runs") / f"{base}-10"
    assert run_folder(plain, resume=False) == Path("runs") / f"{base}-3"
