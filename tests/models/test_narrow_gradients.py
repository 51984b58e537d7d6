"""Gradients of narrow networks against float64, on the vectors of this CPU and on AVX2's alone.

oneDNN's weight gradient of a narrow 1x1 convolution with a stride corrupts memory (see
cure_fast/models/pointwise.py), so each comparison runs in a process of its own.
"""

from __future__ import annotations

import copy
import operator
import os
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils._python_dispatch import TorchDispatchMode

import narrow_gradients
from cure_fast.models import ImageClassifier, build_model, protect_pointwise
from cure_fast.models.pointwise import restore_pointwise
from narrow_gradients import FAMILIES, SOME, gradients
from tiny_step import tiny_run


@pytest.mark.parametrize("vectors", ["AVX2", "DEFAULT"])
def test_gradients_are_those_of_float64(vectors, pytestconfig):
    """Of some widths without --slow: the test below knows what none of them may call."""
    families, words = (FAMILIES, []) if pytestconfig.getoption("--slow") else (SOME, ["some"])
    done = subprocess.run(
        [sys.executable, narrow_gradients.__file__, *words],
        env={
            **os.environ,
            "ONEDNN_MAX_CPU_ISA": vectors,
            "MALLOC_CHECK_": "3",
            # Threads that spin would make two of them slow on a busy machine.
            "OMP_WAIT_POLICY": "passive",
        },
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, (done.returncode, lines[-1:], done.stderr)
    assert len(lines) == 2 * sum(map(len, families.values()))
    assert not [line for line in lines if not line.endswith("right")]


class AffectedConvolutions(TorchDispatchMode):
    """Counts calls of 1x1 convolutions with a stride and fewer than 16 channels."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "convolution" in func.name():
            weight, stride = (2, 4) if "backward" in func.name() else (1, 3)
            inputs, *size = args[weight].shape[1:]
            strided = max(args[stride]) > 1
            self.count += size == [1, 1] and strided and inputs < 16
        return func(*args, **(kwargs or {}))


def affected(model, images):
    """Return the number of calls, in double precision, which oneDNN does not compute."""
    with AffectedConvolutions() as convolutions:
        gradients(copy.deepcopy(model).double(), images.double())
    return convolutions.count


@pytest.mark.parametrize(("name", "widths"), FAMILIES.items())
def test_no_network_calls_what_is_affected(name, widths):
    for width in widths:
        assert not affected(build_model(name, num_classes=3, width=width), torch.rand(2, 3, 8, 8))


class Own(ImageClassifier):
    """A network as a user may write it: shortcuts of a plain, a named and a normed layer."""

    stem_names = ("stem",)
    classifier_name = "linear"

    def __init__(self):
        super().__init__(width=4)
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.first = nn.Conv2d(4, 8, 1, stride=2)
        self.second = nn.Conv2d(8, 12, 1, stride=(2, 1), padding="valid")
        self.third = weight_norm(nn.Conv2d(12, 20, 1, stride=2, bias=False))
        self.linear = nn.Linear(20, 3)

    def logits(self, x):
        x = self.third(self.second(self.first(self.stem(x)).relu()).relu())
        return self.linear(x.mean((2, 3)))


@pytest.mark.parametrize("size", [16, 15])
def test_a_run_protects_a_network_of_the_users_own(size):
    model = Own()
    images = torch.rand(2, 3, size, size)
    keys = list(model.state_dict())
    assert affected(model, images) == 6
    plain = gradients(copy.deepcopy(model).double(), images.double())
    batches = [(images, torch.tensor([0, 1]))]
    run = tiny_run("natural", model=model, batches=batches, dtype=torch.float32)
    assert list(run.model.state_dict()) == keys
    for twin in (run.model, copy.deepcopy(run.model)):
        assert not affected(twin, images)
        for found, expected in zip(gradients(twin.double(), images.double()), plain, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_stored_network_stays_protected():
    model = build_model("resnet-small", num_classes=3, width=4)
    assert not affected(pickle.loads(pickle.dumps(model)), torch.rand(2, 3, 8, 8))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(16, 8, 1, stride=2),
        nn.Conv2d(8, 8, 1),
        nn.Conv2d(8, 8, 3, stride=2),
        nn.Conv2d(8, 8, 1, stride=2, padding=1),
        nn.Conv2d(8, 8, 1, stride=2, groups=2),
    ],
    ids=["wide", "stride 1", "3x3", "padded", "groups"],
)
def test_other_layers_stay_as_they_are(layer):
    before = dict(vars(layer))
    protect_pointwise(layer)
    assert vars(layer) == before


def test_a_compiled_network_stays_protected():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.graph)
        return graph.forward

    model = build_model("resnet-small", num_classes=3, width=4)
    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(torch.rand(2, 3, 8, 8))
    (graph,) = graphs
    assert sum(node.target is operator.getitem for node in graph.nodes) == 2


def test_a_restored_network_is_as_it_was():
    model = build_model("resnet-small", num_classes=3, width=4)
    images = torch.rand(2, 3, 8, 8)
    restore_pointwise(model)
    assert affected(model, images) == 4
    protect_pointwise(model)
    assert not affected(model, images)
