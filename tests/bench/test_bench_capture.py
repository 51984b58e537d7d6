"""Work as a CUDA graph, with stand-ins for the GPU: what is kept, and what a failure gives back."""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext

import pytest
import torch

from bench import capture
from bench.kernel_cases import ema_case, model_case
from cure_fast.batch import Batch
from cure_fast.kernels import TensorList
from cure_fast.kernels.workspace import Workspace

CPU = torch.device("cpu")
POOL = (0, 7)


class Gpu:
    """Stands for what torch knows of a GPU.

    Attributes:
        streams: set as the current one, outside of a block that ends by itself.
        pools: of memory that captures allocate from.
        replays: of any graph.
        loaded: how often the states of random sources were set.
    """

    def __init__(self) -> None:
        self.streams: list[object] = []
        self.pools: set[tuple[int, int]] = set()
        self.replays = self.loaded = 0

    def wait_stream(self, other: object) -> None:
        """As a stream."""

    def replay(self) -> None:
        """As a graph."""
        self.replays += 1

    def clone_state(self) -> None:
        """As a random source."""

    def graphsafe_set_state(self, state: object) -> None:
        self.loaded += 1

    def end(self, device: int | None, pool: tuple[int, int]) -> None:
        if pool not in self.pools:
            raise RuntimeError("not recording")
        self.pools.remove(pool)


@pytest.fixture
def gpu(monkeypatch) -> Gpu:
    found = Gpu()

    class Capture:
        """As torch's: where the step has failed the end does too, and the stream stays."""

        def __init__(self, graph, pool=None, capture_error_mode="global") -> None:
            self.pool = pool

        def __enter__(self) -> None:
            found.pools.add(self.pool)

        def __exit__(self, kind, *_) -> None:
            if kind is not None:
                raise RuntimeError("operation failed due to a previous error")
            found.end(0, self.pool)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("Stream", "current_stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, lambda: found)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "set_stream", found.streams.append)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: POOL)
    monkeypatch.setattr(torch.cuda, "default_generators", {None: found})
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", found.end)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda device, pool: None)
    nothing = Batch(*(torch.empty(0) for _ in range(3)))
    monkeypatch.setattr(capture, "empty_on_gpu", lambda: nothing)
    return found


@pytest.mark.parametrize(
    "make",
    [
        lambda: model_case("update+ema", "rehearsal", ["triton-graph"]),
        lambda: model_case("mask", "rehearsal", ["triton-graph"]),
        lambda: ema_case("rehearsal", rehearsal=False),
    ],
    ids=["update", "mask", "ema"],
)
@pytest.mark.usefixtures("gpu", "one_thread")
def test_what_a_graph_reads_lives_as_long_as_its_replay(monkeypatch, make) -> None:
    case = make()
    inputs, made = case.make(CPU), []
    for kind in (TensorList, Workspace):

        def noted(self, *args, former=kind.__init__, **kwargs) -> None:
            former(self, *args, **kwargs)
            made.append(weakref.ref(self))

        monkeypatch.setattr(kind, "__init__", noted)
    replay = case.providers["triton-graph"](inputs)
    gc.collect()
    assert isinstance(replay, capture.Captured)
    assert len(made) > 1 and all(each() is not None for each in made)
    del replay
    gc.collect()
    assert all(each() is None for each in made)


def test_work_runs_before_the_capture_and_in_it_and_then_is_replayed(gpu) -> None:
    calls = []

    def work() -> list[int]:
        calls.append(1)
        return calls

    replay = capture.captured(work)
    assert len(calls) == capture.WARMUPS + 1
    assert replay() is calls and replay() is calls
    assert gpu.replays == 2 and len(calls) == capture.WARMUPS + 1
    assert not gpu.streams and not gpu.pools and not gpu.loaded


def test_a_capture_that_fails_leaves_nothing_behind(gpu) -> None:
    calls = iter(range(9))

    def work() -> None:
        if next(calls) == capture.WARMUPS:
            raise ValueError("this waits for the device")

    with pytest.raises(ValueError, match="this waits for the device"):
        capture.captured(work)
    assert gpu.streams == [gpu] and not gpu.pools and gpu.loaded == 1


def test_without_a_gpu_work_stays_as_it_is(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert capture.captured(gc.collect) is gc.collect
