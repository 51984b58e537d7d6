"""The count of what a graph costs: right where launches and bytes are known by hand.

What pretends to have a GPU changes the process for good, so this file runs itself in another one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from bench import fake_cuda, launches, lowered
from networks import Plain, network

# Inductor lowers for half a minute what a bench alone counts.
pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
# Images of 16 channels and of 32, and weights between them, all bf16.
SHAPE, WIDE, WEIGHT = (8, 16, 8, 8), (8, 32, 8, 8), (32, 16, 3, 3)
IMAGES, FEATURES, WEIGHTS = 8 * 16 * 64 * 2, 8 * 32 * 64 * 2, 32 * 16 * 9 * 2
# What each function of `graphs` launches: kind, bytes read and written, whether it only reorders.
EXPECTED = {
    "one fused kernel": [("kernel", 2 * IMAGES, IMAGES, False)],
    "a sum over positions": [("kernel", IMAGES, 8 * 16 * 2, False)],
    "another order": [("kernel", IMAGES, IMAGES, True)],
    "another type": [("kernel", IMAGES, 2 * IMAGES, False)],
    "a part of another type": [("kernel", IMAGES // 2, IMAGES, False)],
    "a convolution there and back": [
        ("convolution", IMAGES + WEIGHTS, FEATURES, False),
        ("input gradient", FEATURES + WEIGHTS, IMAGES, False),
        ("weight gradient", FEATURES + IMAGES, WEIGHTS, False),
    ],
}


def graphs() -> dict[str, Callable[..., Tensor | tuple[Tensor, ...]]]:
    options = (None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    convolution = torch.ops.aten.convolution.default
    back = torch.ops.aten.convolution_backward.default
    return {
        "one fused kernel": lambda x, y, w, g: x.relu() + y,
        "a sum over positions": lambda x, y, w, g: x.sum(dim=(2, 3)),
        "another order": lambda x, y, w, g: x.contiguous(),
        "another type": lambda x, y, w, g: x.float(),
        "a part of another type": lambda x, y, w, g: x[4:].float(),
        "a convolution there and back": lambda x, y, w, g: (
            convolution(x, w, *options),
            *back(g, x, w, *options, [True, True, False])[:2],
        ),
    }


def eager() -> list[launches.Launch]:
    """Count operations outside of a graph: a view, memory, an addition in place, and a sum."""
    x, y = (torch.empty(SHAPE, dtype=torch.bfloat16) for _ in range(2))
    with launches.Operations() as counter:
        x.view(8, -1)
        torch.empty_like(x)
        torch._foreach_add_([x, y], 1)
        x + x
        with counter.instead(launches.Cost()):
            x + x
    return counter.cost.launches


def report() -> dict[str, Any]:
    """Return what is counted here, as JSON."""
    with fake_cuda.pretended(), FakeTensorMode():
        x, y, weight, grad = (
            torch.empty(shape, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
            for shape in (SHAPE, SHAPE, WEIGHT, WIDE)
        )
        found = {"eager": {"launches": [asdict(launch) for launch in eager()]}}
        for name, function in graphs().items():
            graph = make_fx(lambda *given, f=function: list(as_tuple(f(*given))))(
                x, y, weight, grad
            )
            found[name] = asdict(launches.lower(graph, [x, y, weight, grad], {}))
    # Two convolutions in place of a published network's dozens, which are counted alike.
    with mock.patch("cure_fast.models.build_model", lambda name, num_classes: network(Plain)):
        cost = lowered.measure("natural", "resnet-small", {})
    return {**found, "engine": cost.figures()}


def as_tuple(found: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


@pytest.fixture(scope="module")
def counted() -> Mapping[str, Any]:
    if (reason := fake_cuda.missing()) is not None:
        pytest.skip(reason)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'support'}"}
    done = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", EXPECTED)
def test_counts_what_is_known_by_hand(name: str, counted: Mapping[str, Any]) -> None:
    found = [
        (one["kind"], one["read"], one["written"], one["reorders"])
        for one in counted[name]["launches"]
    ]
    assert sorted(found) == sorted(EXPECTED[name])
    assert counted[name]["kernels"] == sum(kind == "kernel" for kind, *_ in EXPECTED[name])


def test_counts_operations_outside_of_graphs(counted: Mapping[str, Any]) -> None:
    found = [(one["kind"], one["read"], one["written"]) for one in counted["eager"]["launches"]]
    assert found == [("eager", 2 * IMAGES, 2 * IMAGES), ("eager", IMAGES, IMAGES)]


def test_counts_the_fast_engines_loss(counted: Mapping[str, Any]) -> None:
    figures = counted["engine"]
    # Two in a row; images take no gradient.
    calls = [figures[kind] for kind in launches.CONVOLUTIONS]
    assert calls == [2, 1, 2]
    assert figures["convolution calls"] == 5
    assert figures["layout copies"] == 0
    # Of two BatchNorms and as many ways back, at least one each.
    assert figures["launches"] - figures["of them eager"] >= 4
    assert figures["GB"] == figures["GB read"] + figures["GB written"] > 0


def test_refuses_convolutions_that_it_would_miss() -> None:
    weight = torch.empty(4, 3, 3, 3)
    with launches.Operations(), pytest.raises(RuntimeError, match="only in what is compiled"):
        torch.nn.functional.conv2d(torch.empty(1, 3, 8, 8), weight)


def test_names_what_is_above_the_limit() -> None:
    other = {"launches": 100, "convolution calls": 50, "GB": 2.0, "GB read": 1.0}
    assert lowered.above({**other, "launches": 103, "GB read": 9.0}, other) == []
    assert lowered.above({**other, "launches": 104}, other) == ["launches"]
    assert lowered.above({**other, "convolution calls": 52, "GB": 2.07}, other) == [
        "convolution calls",
        "GB",
    ]


if __name__ == "__main__":
    print(json.dumps(report()))
