"""Tests that need a GPU, run on the CPU with their graphs pretended, so that they keep up.

A GPU is seldom at hand, and a test that has broken unseen would waste its time there.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from cure_fast.engine import fast
from networks import Plain, network

pytestmark = pytest.mark.usefixtures("one_thread")


QUICK = {"attack": {"attack_steps": 1}}


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[Callable]:
    """Steps that would have been captured; they are computed where they would be replayed."""
    found = []

    def capture(compute: Callable, *_: object) -> SimpleNamespace:
        found.append(compute)
        return SimpleNamespace(replay=compute)

    monkeypatch.setattr(fast, "CapturedStep", capture)
    return found


@pytest.fixture
def gpu_tests(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The tests of the fast engine on a GPU, as a module whose GPU is the CPU."""
    path = Path(__file__).with_name("test_gpu_engine.py")
    spec = spec_from_file_location("gpu_tests_on_the_cpu", path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "GPU", torch.device("cpu"))
    # Fewer layers, pixels and attack steps than a GPU takes, which change nothing here.
    data, make = module.data, module.runs.make_run
    monkeypatch.setattr(module, "data", lambda *a, **options: data(*a, **{"pixels": 4} | options))
    monkeypatch.setattr(
        module.runs,
        "make_run",
        lambda *a, **options: make(*a, **{"model": network(Plain)} | QUICK | options),
    )
    monkeypatch.setattr(fast, "ON_GPU", fast.COMPILED)
    return module


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("test_masks_agree_but_where_rounding_decides", ()),
        ("test_each_feature_can_be_left_out", ("graph",)),
        ("test_a_smaller_last_batch_is_computed_alike_and_not_captured", ()),
        ("test_the_phases_of_a_natural_warm_up_have_graphs_of_their_own", ()),
        ("test_a_resumed_run_equals_an_undisturbed_one", ("cure", None, 5)),
    ],
)
def test_a_gpu_test_passes_on_the_cpu(gpu_tests, captures, name, arguments):
    getattr(gpu_tests, name)(*arguments)
    assert bool(captures) == ("graph" not in arguments)
