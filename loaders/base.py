"""What every loader promises: order, augmentation and batch shapes, whatever feeds the pixels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from cure_fast.batch import Batch, Part
from cure_fast.errors import InputError

from .augment import crop_flip
from .idbh import VARIANTS, idbh
from .image_set import ImageSet, check_images
from .mixing import Mix, Pixels
from .seeds import epoch_order

AUGMENTATIONS = ("crop-flip", *VARIANTS)


@dataclass(frozen=True, kw_only=True)
class BatchSettings:
    """What the batches of a loader look like.

    Attributes:
        batch_size: images per batch, at least 2.
        device: where batches are delivered.
        seed: seed of the order and the augmentation.
        crop_padding: padding in pixels before the random crop; 0 turns the crop off.
        flip: mirror each image left to right with probability 1/2.
        reflect: whether the padding mirrors the image; else it is zero.
        augment: one of ``AUGMENTATIONS``; all but ``crop-flip`` have a crop of their own.
        mix: generated images to mix into the batches; None for none.
        process: place, from 0, and number of the processes that share the images of each batch.
    """

    batch_size: int
    device: torch.device
    seed: int
    crop_padding: int
    flip: bool
    reflect: bool = False
    augment: str = "crop-flip"
    mix: Mix | None = None
    process: tuple[int, int] = (0, 1)

    def part(self, count: int) -> slice:
        """Return which of a batch's ``count`` images are this process's; their numbers differ by
        one at most.
        """
        place, processes = self.process
        return slice(place * count // processes, (place + 1) * count // processes)

    @property
    def read_size(self) -> int:
        """Images of a whole batch that this process reads of the training set."""
        own = self.part(self.batch_size)
        return own.stop - own.start - (self.mix.of_batch(self.batch_size) if self.mix else 0)


class Loader(ABC):
    """Training batches of one image set; the subclasses differ in where the pixels come from.

    With the same set and settings every subclass delivers the same batches, byte for byte: the
    order is a function of (seed, epoch), the augmentation of (seed, epoch, batch). The last batch
    holds what is left; a single image left over is passed over, since BatchNorm cannot train on
    it (another image each epoch).

    Attributes:
        kind: ``ffcv``, ``resident`` or ``torch``.
        reason: one line that says which loader this is and why it was chosen.
        batch_size: images per batch.
        set_size: images of the set and generated ones, each with its place below that.
        num_classes: classes of the set, each with its label below that.
        image_shape: channels, height and width of an image.
        num_images: images delivered in an epoch, which can be one less.
        batches_per_epoch: batches delivered in an epoch.
    """

    kind: ClassVar[str]

    def __init__(self, image_set: ImageSet, settings: BatchSettings, *, why: str) -> None:
        check_images(image_set, training=True)
        count, batch_size = len(image_set), settings.batch_size
        if batch_size < 2:
            raise InputError(
                f"--batch-size: expected at least 2, got {batch_size}: BatchNorm cannot train on a "
                "batch of one image."
            )
        if count < 2:
            raise InputError(
                f"{image_set.name}: expected at least 2 training images, got {count}: BatchNorm "
                f"cannot train on a batch of one; give more with --train-images."
            )
        smallest = min(image_set.images.shape[1:3])
        crops = settings.augment == "crop-flip"
        if crops and settings.reflect and settings.crop_padding >= smallest:
            raise InputError(
                f"--crop-padding: expected less than {smallest}, a side of the images, with "
                f"--crop-mode reflect, got {settings.crop_padding}."
            )
        left_over = count % batch_size == 1
        processes = settings.process[1]
        fewest = min(batch_size, (count - left_over) % batch_size or batch_size)
        if processes > 1 and fewest < 2 * processes:
            raise InputError(
                f"--batch-size: expected batches of 2 images or more for each of {processes} "
                f"processes, got one of {fewest}, as {count} images come in batches of "
                f"{batch_size}. Take another --batch-size or fewer processes."
            )
        self.settings = settings
        self.batch_size = batch_size
        self.num_images = count - left_over
        self.batches_per_epoch = -(-self.num_images // batch_size)
        self.reason = f"{self.kind}: {why}"
        if left_over:
            self.reason += (
                f"; {count} images in batches of {batch_size} leave one over, which is passed over "
                f"in each epoch, as BatchNorm cannot train on it"
            )
        self.set_size, self.num_classes = count, len(image_set.classes)
        self._own = count
        if mix := settings.mix:
            mix.check(batch_size)
            self.set_size += len(mix.images)
            self.reason += (
                f"; {mix.of_batch(batch_size)} of the {batch_size} images of a batch are of "
                f"{len(mix.images):,} generated ones"
            )
        height, width, channels = image_set.images.shape[1:]
        self.image_shape = (channels, height, width)

    @contextmanager
    def epoch(self, epoch: int, *, start_batch: int = 0) -> Iterator[Iterator[Batch]]:
        """Open an epoch; leaving the context at any time ends its threads and processes.

        Yields:
            an iterator of batches on the device: their images are augmented, their ``index`` is the
            images' place in the set, behind which generated images have theirs. All of it is the
            caller's to keep and to change.

        Args:
            epoch: number of the epoch, from 0.
            start_batch: batches to leave out at the start; the others are as in a whole epoch.

        Raises:
            InputError: for a ``start_batch`` beyond the end of the epoch.
        """
        if not 0 <= start_batch <= self.batches_per_epoch:
            raise InputError(
                f"start_batch: expected 0 to {self.batches_per_epoch}, got {start_batch}: "
                f"the data or the batch size has changed since the checkpoint."
            )
        seed, mix = self.settings.seed, self.settings.mix
        order = epoch_order(self._own, seed=seed, epoch=epoch)[: self.num_images]
        if mix:
            order = mix.order(order, self.batch_size, set_size=self._own, seed=seed, epoch=epoch)
        # Moved once per epoch: a copy from memory that is not pinned waits for the GPU.
        batches, places = (
            indices.split(self.batch_size)[start_batch:]
            for indices in (order, order.to(self.settings.device))
        )
        if not batches:
            yield iter(())
            return
        own = [batch[self.settings.part(len(batch))] for batch in batches]
        read = [places[places < self._own] for places in own] if mix else own
        with self._read(read) as pixels:
            if mix:
                pixels = mix.added(pixels, own, set_size=self._own)
            augmented = self._augment(pixels, places, epoch, start_batch)
            try:
                yield augmented
            finally:
                augmented.close()

    def _augment(
        self, pixels: Iterable[Pixels], places: Sequence[Tensor], epoch: int, start_batch: int
    ) -> Generator[Batch]:
        settings = self.settings
        if settings.augment == "crop-flip":
            padding = {"crop_padding": settings.crop_padding, "reflect": settings.reflect}
            augment = partial(crop_flip, **padding)
        else:
            augment = partial(idbh, variant=VARIANTS[settings.augment])
        shared = settings.process[1] > 1
        for batch, (index, (images, labels, indices)) in enumerate(
            zip(places, pixels, strict=True), start_batch
        ):
            own = settings.part(len(index))
            part = Part(own.start, own.stop - own.start, len(index)) if shared else None
            x = augment(
                images,
                indices=indices,
                seed=settings.seed,
                epoch=epoch,
                batch=batch,
                flip=settings.flip,
                part=part,
            )
            yield Batch(x, labels, index[own], part=part)

    @abstractmethod
    def _read(self, batches: Sequence[Tensor]) -> AbstractContextManager[Iterable[Pixels]]:
        """Open the batches whose image indices are given (each int64 [n] on the CPU).

        Yields:
            (images, labels int64 [n], indices) per batch, on the device: images uint8 [n, H, W, 3]
            and None, or [M, H, W, 3] and which of them, int64 [n]. The images need to stay as they
            are until the next batch is asked for, the labels for good.
        """


def shared_tensors(image_set: ImageSet) -> tuple[Tensor, Tensor]:
    """Return the images and labels as CPU tensors that share the set's memory where they can.

    Read-only arrays (a memory map) are copied: torch has no read-only tensors.
    """
    arrays = (image_set.images, image_set.labels)
    images, labels = (torch.from_numpy(a if a.flags.writeable else a.copy()) for a in arrays)
    return images, labels
