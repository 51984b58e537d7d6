"""Methods that a test defines, and the engines that its runs are computed by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import tiny_step
from cure_fast.methods import METHODS, find_method
from cure_fast.models import build_model
from cure_fast.step.state import TrainState


@pytest.fixture(params=("eager", "fast"))
def engine(request: pytest.FixtureRequest) -> str:
    """An engine's name; tests that ask for it hold for both."""
    return request.param


@pytest.fixture
def changed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Adds a method for the test, changed(base, field=value, ...), and returns its name."""

    def add(base: str, **changes: object) -> str:
        method = replace(find_method(base), name="changed", **changes)
        monkeypatch.setitem(METHODS, method.name, method)
        return method.name

    return add


@pytest.fixture
def small_run(engine: str) -> Callable[..., TrainState]:
    """Makes a run of the engine on a ResNet and images of 8x8: small_run(method, ...)."""

    def make(method: str, **options: object) -> TrainState:
        torch.manual_seed(4)
        images = torch.rand(2, 8, 3, 8, 8).unbind()
        run = tiny_step.tiny_run(
            method,
            batches=[
                (x.contiguous(memory_format=torch.channels_last), torch.arange(8) % 4)
                for x in images
            ],
            model=build_model("resnet-small", num_classes=4, width=3),
            dtype=torch.float32,
            engine=engine,
            **options,
        )
        assert run.engine.name == engine
        return run

    return make
