"""Captures that fail: what is raised, and what is given back."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from cure_fast.batch import Batch
from cure_fast.engine.cuda_graph import CapturedStep, end_capture_memory

POOL = (0, 7)
REFUSED = "endAllocatePool: not currently recording to mempool_id"


class Allocator:
    """Stands for what torch knows of memory pools: which are in use, and allocated from."""

    def __init__(self):
        self.held: set[tuple[int, int]] = set()
        self.going_on: set[tuple[int, int]] = set()

    def begin(self, pool):
        self.held.add(pool)
        self.going_on.add(pool)

    def end(self, device, pool):
        if pool not in self.going_on:
            raise RuntimeError(REFUSED)
        self.going_on.remove(pool)

    def release(self, device, pool):
        self.held.remove(pool)


@pytest.fixture
def allocator(monkeypatch):
    found = Allocator()
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", found.end)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", found.release)
    return found


@pytest.fixture
def captures(allocator, monkeypatch):
    """A capture whose end fails if the step did, as that of a device that was waited for."""

    class Capture:
        def __init__(self, graph, *, pool, capture_error_mode):
            self.pool = pool

        def __enter__(self):
            allocator.begin(self.pool)

        def __exit__(self, kind, *_):
            if kind is not None:
                raise RuntimeError("operation failed due to a previous error")
            allocator.end(0, self.pool)

    class Graph:
        def register_generator_state(self, generator):
            pass

    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: POOL)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "former")
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: streams.append(stream))
    monkeypatch.setattr(torch.cuda, "default_generators", {None: Source()})
    streams: list[str] = []
    return streams


class Source:
    """Stands for a random source of a GPU."""

    def __init__(self):
        self.loaded = 0

    def clone_state(self):
        return self

    def graphsafe_set_state(self, state):
        self.loaded += 1


def test_memory_that_goes_on_is_ended_and_released(allocator):
    allocator.begin(POOL)
    end_capture_memory(0, POOL)
    assert not allocator.going_on and not allocator.held


def test_memory_of_an_ended_capture_is_left_to_its_graph(allocator):
    allocator.begin(POOL)
    allocator.end(0, POOL)
    end_capture_memory(0, POOL)
    assert allocator.held == {POOL}


def test_the_name_of_an_older_torch_is_known(allocator, monkeypatch):
    monkeypatch.delattr(torch._C, "_cuda_endAllocateToPool")
    monkeypatch.setattr(
        torch._C, "_cuda_endAllocateCurrentStreamToPool", allocator.end, raising=False
    )
    allocator.begin(POOL)
    end_capture_memory(0, POOL)
    assert not allocator.going_on and not allocator.held


def test_a_step_that_fails_gives_everything_back(allocator, captures):
    """Its own error is raised, and no tensor of it waits for the garbage collector."""
    batch, source, made = Batch(*(torch.ones(2) for _ in range(3))), Source(), []

    def step(batch):
        tensor = batch.x * 2
        made.append(weakref.ref(tensor))
        raise ValueError("this step waits")

    gc.disable()
    try:
        try:
            CapturedStep(step, batch, [source])
        except ValueError as error:
            message = str(error)
        assert message == "this step waits"
        assert [tensor() for tensor in made] == [None]
    finally:
        gc.enable()
    assert not allocator.going_on and not allocator.held
    assert captures == ["former"] and source.loaded == 1


def test_a_step_that_succeeds_keeps_its_memory(allocator, captures):
    batch, source = Batch(*(torch.ones(2) for _ in range(3))), Source()
    captured = CapturedStep(lambda batch: {"total": batch.x.sum()}, batch, [source])
    assert allocator.held == {POOL} and captures == [] and source.loaded == 0
    own = captured.fixed["x"]
    assert own.shape == batch.x.shape and own.data_ptr() != batch.x.data_ptr()
