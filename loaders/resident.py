"""The whole uint8 set on the device; batches are gathered there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from .base import BatchSettings, Loader, Pixels, shared_tensors
from .image_set import ImageSet


class ResidentLoader(Loader):
    """Keeps all images on the device; no threads, no processes, no copies from the host."""

    kind = "resident"

    def __init__(self, image_set: ImageSet, settings: BatchSettings, *, why: str) -> None:
        super().__init__(image_set, settings, why=why)
        images, labels = shared_tensors(image_set)
        self._images = images.to(settings.device)
        self._labels = labels.to(settings.device)

    @contextmanager
    def _read(self, batches: Sequence[Tensor]) -> Iterator[Iterable[Pixels]]:
        order = torch.cat(list(batches)).to(self.settings.device)
        yield (
            (self._images, self._labels.index_select(0, indices), indices)
            for indices in order.split([len(batch) for batch in batches])
        )


def fits_device(image_set: ImageSet, device: torch.device) -> bool:
    """Whether the set takes less than a quarter of the device's free memory.

    On the CPU it takes none: the images are in memory already and are shared.
    """
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return image_set.images.nbytes < free / 4
