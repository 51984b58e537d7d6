"""FFCV reads and orders the images; everything random is done afterwards, on the device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .base import BatchSettings, Loader, Pixels
from .beton import ensure_beton
from .ffcv_reader import ffcv_version, open_epoch, open_reader
from .image_set import ImageSet

# Measured on CIFAR-10 and 2 cores: one thread copies 1.3 million images a second, two copy 1.0, and
# compiling for two takes half as long again.
DEFAULT_THREADS = 1


class FfcvLoader(Loader):
    """Reads a checked .beton file of the set, which is written into ``cache`` on first use."""

    kind = "ffcv"

    def __init__(
        self, image_set: ImageSet, settings: BatchSettings, *, workers: int | None, cache: Path
    ) -> None:
        path = ensure_beton(image_set, cache)
        super().__init__(image_set, settings, why=f"FFCV {ffcv_version()} reads {path}")
        self._reader = open_reader(
            path,
            batch_size=len(range(settings.batch_size)[settings.part(settings.batch_size)]),
            threads=DEFAULT_THREADS if workers is None else workers,
        )

    @contextmanager
    def _read(self, batches: Sequence[Tensor]) -> Iterator[Iterable[Pixels]]:
        with open_epoch(self._reader, torch.cat(list(batches)).numpy()) as arrays:
            on_gpu = self.settings.device.type == "cuda"
            yield _to_gpu(arrays, self.settings.device) if on_gpu else _to_tensors(arrays)


Batches = Iterator[tuple[NDArray[np.uint8], NDArray[np.int64]]]


def _to_tensors(arrays: Batches) -> Iterator[Pixels]:
    """Yield CPU tensors: the images in FFCV's slot (the augmentation copies), the labels copied."""
    for images, labels in arrays:
        yield torch.from_numpy(images), torch.from_numpy(labels.copy()), None


def _to_gpu(arrays: Batches, device: torch.device) -> Iterator[Pixels]:
    """Yield copies on the GPU, made on a stream of their own.

    The training stream waits for the copy on the GPU; the host waits for it only before it asks
    for the next batch, which lets FFCV write the slot again. So the host never waits for training.
    """
    copies = torch.cuda.Stream(device)
    for arrays_of_batch in arrays:
        with torch.cuda.stream(copies):
            tensors = [torch.from_numpy(a).to(device, non_blocking=True) for a in arrays_of_batch]
            copied = copies.record_event()
        training = torch.cuda.current_stream(device)
        training.wait_event(copied)
        for tensor in tensors:
            tensor.record_stream(training)
        try:
            yield tensors[0], tensors[1], None
        finally:
            copied.synchronize()
