"""Generated images among those of the training set: which of them a batch holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cure_fast.errors import InputError

from .image_set import ImageSet
from .seeds import GENERATED, generator_of

# Images, labels, and which of the images, where they are not those of one batch.
Pixels = tuple[Tensor, Tensor, Tensor | None]


@dataclass(frozen=True, eq=False)
class Mix:
    """Generated images, and the share of each batch that they are.

    An epoch has as many batches and images as without them: in each batch they take the places of
    that share of the images, so that an epoch sees another part of the training set each time.

    Attributes:
        images: M of them, with the places behind those of the training set.
        share: above 0, below 1.
    """

    images: ImageSet
    share: float

    def of_batch(self, size: int) -> int:
        """Return how many of the images of a batch are generated: one at least is not."""
        return min(size - 1, round(size * self.share))

    def check(self, batch_size: int) -> None:
        """Raise :class:`InputError` for too few images, of which a batch would hold one twice.

        So too for a share that is no image of a batch.
        """
        least = self.of_batch(batch_size)
        if not least:
            raise InputError(
                f"--aux-share: expected the share of one image of a batch at least, got "
                f"{self.share:g} of {batch_size}; give a higher one, or a larger --batch-size."
            )
        if len(self.images) < least:
            raise InputError(
                f"--aux: expected at least {least} generated images, as many as a batch of "
                f"{batch_size} holds of them, got {len(self.images)}; give more, or a lower "
                "--aux-share."
            )

    def order(
        self, order: Tensor, batch_size: int, *, set_size: int, seed: int, epoch: int
    ) -> Tensor:
        """Return an epoch's places with generated images in their share of each batch.

        Passes over the generated images go on from epoch to epoch: none comes again before all
        have come (but for what a pass has left over, less than a batch's share).

        Args:
            order: places in the training set, int64 [N]; the first of them are kept.
            batch_size: images of each batch but the last.
            set_size: images of the training set; generated ones have the places from there on.
            seed: the run's seed.
            epoch: number of the epoch, from 0.

        Returns:
            places, int64 [N]: a function of the arguments, each once in a batch.
        """
        sizes = [len(part) for part in order.split(batch_size)]
        each = self.of_batch(batch_size)
        first, in_pass = epoch * len(sizes), len(self.images) // each
        own, mixed, pass_number, generated = 0, [], -1, order[:0]
        for number, size in enumerate(sizes, first):
            if number // in_pass != pass_number:
                pass_number = number // in_pass
                random = generator_of(seed, GENERATED, 0, pass_number)
                generated = torch.randperm(len(self.images), generator=random)
            count, start = self.of_batch(size), number % in_pass * each
            places = [order[own : own + size - count], generated[start : start + count] + set_size]
            random = generator_of(seed, GENERATED, 1, number)
            mixed.append(torch.cat(places)[torch.randperm(size, generator=random)])
            own += size - count
        return torch.cat(mixed)

    def added(
        self, pixels: Iterable[Pixels], batches: Sequence[Tensor], *, set_size: int
    ) -> Iterator[Pixels]:
        """Yield the batches with their generated images; those of the set come from ``pixels``.

        Args:
            pixels: per batch the images of the training set alone, in the batch's order.
            batches: all places of each batch, int64 [n] on the CPU.
            set_size: as for :meth:`order`.
        """
        for (images, labels, indices), places in zip(pixels, batches, strict=True):
            if indices is not None:
                images = images.index_select(0, indices)
            from_set = places < set_size
            numbers = (places[~from_set] - set_size).numpy()
            found = (self.images.images[numbers], self.images.labels[numbers])
            more, their_labels = (to_device(torch.from_numpy(a), images.device) for a in found)
            # Which of the images, the set's and then the generated, each place of the batch has.
            behind = torch.argsort(torch.argsort((~from_set).byte(), stable=True))
            behind = to_device(behind, images.device)
            both = torch.cat([labels, their_labels]).index_select(0, behind)
            yield torch.cat([images, more]), both, behind


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; from pinned memory, so that the host does not wait for a GPU."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
