"""A whole training step in one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from cure_fast.batch import Batch
from cure_fast.step.run import Terms


class CapturedStep:
    """A step recorded once and replayed for every batch of the same shape.

    Recording computes nothing, so weights, statistics and random sources stay as they were. What
    the step reads must stay at its address; what changes between replays is in tensors.

    Args:
        compute: the step, from a batch to the terms of its loss; has run before.
        batch: of the shapes of those to come.
        generators: random sources that the step draws from; each replay draws anew.

    Raises:
        RuntimeError: for a step that waits for the device, or does what a graph cannot hold.
    """

    def __init__(
        self,
        compute: Callable[[Batch], Terms],
        batch: Batch,
        generators: Iterable[torch.Generator],
    ) -> None:
        # With the notes that policies leave before the step.
        self.fixed = {name: torch.empty_like(t) for name, t in tensors_of(batch).items()}
        notes = {name: t for name, t in self.fixed.items() if name in batch.notes}
        images: dict[str, Any] = {name: t for name, t in self.fixed.items() if name not in notes}
        self.graph = torch.cuda.CUDAGraph()
        for generator in generators:
            self.graph.register_generator_state(generator)
        stream, pool = torch.cuda.current_stream(), torch.cuda.graph_pool_handle()
        failure: Exception | None = None
        try:
            # A loader's thread may call CUDA meanwhile; only this thread's calls are recorded.
            with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
                try:
                    self.terms = compute(Batch(**images, notes=notes, part=batch.part))
                except Exception as error:
                    failure = error
                    raise
        except Exception as error:
            failure = failure or error
            # Where the end of the capture fails too, torch leaves its own stream current, and
            # random sources waiting for an end: they would refuse to draw.
            torch.cuda.set_stream(stream)
            end_capture_memory(batch.x.device.index, pool)
            own = torch.cuda.default_generators[batch.x.device.index]
            for generator in (own, *generators):
                generator.graphsafe_set_state(generator.clone_state())
        if failure is not None:
            try:
                # Out of reach of the error of the end, and not kept by this frame: in a circle of
                # references, the step's tensors would wait for the garbage collector.
                raise failure
            finally:
                failure = None

    def replay(self, batch: Batch) -> Terms:
        """Compute the step for a batch; the terms returned are overwritten by the next replay."""
        for name, tensor in tensors_of(batch).items():
            self.fixed[name].copy_(tensor, non_blocking=True)
        self.graph.replay()
        return self.terms


def tensors_of(batch: Batch) -> dict[str, Tensor]:
    """Return the tensors of a batch before its attack, by field or note."""
    return {"x": batch.x, "y": batch.y, "index": batch.index, **batch.notes}


def end_capture_memory(device: int, pool: tuple[int, int]) -> None:
    """End the allocations of a failed capture in its pool, where torch left them going on.

    The pool, with a step's memory, would be kept for the rest of the process otherwise, and
    ``torch.cuda.empty_cache`` could fail. Memory that is referred to stays until it is let go.
    """
    # No public function ends what a capture began. The second name is that of torch before 2.8.
    names = ("_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool")
    end = next(getattr(torch._C, name) for name in names if hasattr(torch._C, name))
    try:
        end(device, pool)
    except RuntimeError:
        # Nothing goes on: the capture did not begin, or did end, and the graph releases its pool.
        return
    torch._C._cuda_releasePool(device, pool)
