"""A whole training step in one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from cure_fast.step.method import Terms


class CapturedStep:
    """A step recorded once and replayed for every batch of the same shape.

    Recording computes nothing, so weights, statistics and random sources stay as they were. What
    the step reads must stay at its address; what changes between replays is in tensors.

    Args:
        compute: the step, from images and labels to the terms of its loss; has run before.
        x: images of a batch, for their shape.
        y: labels of a batch.
        generators: random sources that the step draws from; each replay draws anew.

    Raises:
        RuntimeError: for a step that waits for the device, or does what a graph cannot hold.
    """

    def __init__(
        self,
        compute: Callable[[Tensor, Tensor], Terms],
        x: Tensor,
        y: Tensor,
        generators: Iterable[torch.Generator],
    ) -> None:
        self.x = torch.empty_like(x, memory_format=torch.preserve_format)
        self.y = torch.empty_like(y)
        self.graph = torch.cuda.CUDAGraph()
        for generator in generators:
            self.graph.register_generator_state(generator)
        stream = torch.cuda.current_stream()
        pool = torch.cuda.graph_pool_handle()
        failure: Exception | None = None
        try:
            # A loader's thread may call CUDA meanwhile; only this thread's calls are recorded.
            with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
                try:
                    self.terms = compute(self.x, self.y)
                except Exception as error:
                    failure = error
                    raise
        except Exception as error:
            if failure is None:
                failure = error
            # Where the end of the capture fails too, torch leaves its own stream current, and
            # random sources waiting for an end: they would refuse to draw.
            torch.cuda.set_stream(stream)
            end_capture_memory(x.device.index, pool)
            own = torch.cuda.default_generators[x.device.index]
            for generator in (own, *generators):
                generator.graphsafe_set_state(generator.clone_state())
        if failure is not None:
            try:
                # Out of reach of the error of the end, and not kept by this frame: in a circle of
                # references, the step's tensors would wait for the garbage collector.
                raise failure
            finally:
                failure = None

    def replay(self, x: Tensor, y: Tensor) -> Terms:
        """Compute the step for a batch; the terms returned are overwritten by the next replay."""
        self.x.copy_(x, non_blocking=True)
        self.y.copy_(y, non_blocking=True)
        self.graph.replay()
        return self.terms


def end_capture_memory(device: int, pool: tuple[int, int]) -> None:
    """End the allocations of a failed capture, where torch left them going on.

    Where the device refuses to end a capture, :class:`torch.cuda.graph` raises before it tells the
    allocator. The pool would be kept for the rest of the process, cached memory would not be given
    back when memory is short, and ``torch.cuda.empty_cache`` could fail. What is done here instead
    is the end of :func:`torch.cuda.use_mem_pool`: it changes the allocator's lists alone, whatever
    state the device is in. Memory that is still referred to stays until it is let go.

    Args:
        device: index of the GPU.
        pool: of this capture alone, from :func:`torch.cuda.graph_pool_handle`.
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
