"""Work as the replay of a CUDA graph: one launch by the host, whatever is in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch

from cure_fast.batch import Batch
from cure_fast.engine.cuda_graph import CapturedStep
from cure_fast.step.run import Terms

R = TypeVar("R")
# Calls before the capture, in which kernels are compiled and algorithms chosen.
WARMUPS = 3


def captured(work: Callable[[], R]) -> Callable[[], R]:
    """Return ``work`` as the replay of a CUDA graph; ``work`` itself where there is no GPU.

    A replay returns what the capture returned, with other values in its tensors.

    Raises:
        RuntimeError: for work that waits for the device, or does what a graph cannot hold.
    """
    return Captured(work) if torch.cuda.is_available() else work


class Captured(Generic[R]):
    """Work that was recorded once, on the current GPU, and is replayed.

    Args:
        work: what is recorded; it is called a few times before.
    """

    def __init__(self, work: Callable[[], R]) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARMUPS):
                work()
        torch.cuda.current_stream().wait_stream(side)
        results: list[R] = []

        def compute(batch: Batch) -> Terms:
            results.append(work())
            return {}

        # The engine's own way to record, as it gives back what a capture that fails leaves behind.
        self._graph = CapturedStep(compute, empty_on_gpu(), ()).graph
        self._results = results[0]
        # A replay reads the tables and tensors that the work was prepared with, and the graph does
        # not keep them: it knows addresses alone.
        self._work = work

    def __call__(self) -> R:
        self._graph.replay()
        return self._results


def empty_on_gpu() -> Batch:
    """Return a batch without images on the current GPU: the work has its inputs already."""
    nothing = torch.empty(0, device=torch.device("cuda", torch.cuda.current_device()))
    return Batch(nothing, nothing, nothing)
