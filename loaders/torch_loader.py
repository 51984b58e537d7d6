"""A plain torch DataLoader: worker processes gather the batches."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cure_fast.signals import SIGNALS

from .base import BatchSettings, Loader, Pixels, shared_tensors
from .image_set import ImageSet

T = TypeVar("T")

# Seconds that a worker lives on after SIGTERM: longer than schedulers wait before SIGKILL.
GRACE_S = 120


class TorchLoader(Loader):
    """Gathers batches in worker processes (``workers``; 0: in the training process itself)."""

    kind = "torch"

    def __init__(
        self, image_set: ImageSet, settings: BatchSettings, *, workers: int | None, why: str
    ) -> None:
        self.workers = usable_cores() if workers is None else workers
        super().__init__(image_set, settings, why=f"{why}; {self.workers} worker processes")
        self._batches = _Batches(*shared_tensors(image_set))

    @contextmanager
    def _read(self, batches: Sequence[Tensor]) -> Iterator[Iterable[Pixels]]:
        loader = DataLoader(
            self._batches,
            batch_sampler=[batch.tolist() for batch in batches],
            num_workers=min(self.workers, len(batches)),
            collate_fn=_unchanged,
            worker_init_fn=_leave_signals_to_the_parent,
            pin_memory=self.settings.device.type == "cuda",
        )
        with _signals_held():
            pairs: Any = iter(loader)
        device = self.settings.device
        try:
            yield (
                (images.to(device, non_blocking=True), labels.to(device, non_blocking=True), None)
                for images, labels in pairs
            )
        finally:
            # torch ends its workers when the iterator is collected, but an error's traceback, or
            # a caller that keeps the generator, holds it for as long as it likes.
            if loader.num_workers:
                pairs._shutdown_workers()


class _Batches(Dataset):
    """Whole batches by their indices, so that a worker makes one copy per batch."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return self.images[indices], self.labels[indices]


def _unchanged(batch: T) -> T:
    return batch


@contextmanager
def _signals_held() -> Iterator[None]:
    """Keep signals waiting, for this thread and the workers it starts.

    A worker takes its signals when it is ready for them: until then one would end it.
    """
    former = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def _leave_signals_to_the_parent(worker: int) -> None:
    """Let a worker outlive the signals that ask the run to stop.

    A terminal and most schedulers signal all processes of a run. A worker that died of it would
    fail the step that the parent means to finish and save, and one with the parent's handlers
    would print the parent's message again. The parent ends its workers itself.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(GRACE_S))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def usable_cores() -> int:
    """Return the number of cores this process may run on (a container's or a job's share)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
