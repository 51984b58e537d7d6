"""Hold validation images out of a training set, and draw a smaller training set evenly."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from cure_fast.errors import InputError

from .folder import Listing
from .image_set import ImageSet, check_images

T = TypeVar("T", ImageSet, Listing)


def split_train(
    image_set: T, *, train_images: int | None, val_images: int, seed: int
) -> tuple[T, T]:
    """Return (training, validation) sets that share no image, in the order of ``image_set``.

    Classes get the same number of validation images, one more or less where the number does not
    divide, and fewer where a class has too few (each keeps at least one for training). The
    training images are drawn from the rest by the same rule. The validation images depend on
    ``val_images`` and ``seed`` alone, so runs with fewer training images are comparable.

    Args:
        image_set: the whole training set, or its files, at least two images per class.
        train_images: training images to draw, at least one per class; None takes all the rest.
        val_images: images to hold out, at least one per class.
        seed: seed of the draw, 0 or more.

    Raises:
        InputError: for numbers that the set cannot give, naming ``--train-images`` or
            ``--val-images``, or a class with one image only.
    """
    if isinstance(image_set, ImageSet):
        check_images(image_set, training=True)
    labels, classes = image_set.labels, len(image_set.classes)
    sizes = np.bincount(labels, minlength=classes)
    _check_counts(image_set, sizes, train_images, val_images)
    rng = np.random.Generator(np.random.PCG64(seed))
    pools = [rng.permutation(np.flatnonzero(labels == c)) for c in range(classes)]
    val_counts = _share(val_images, sizes - 1, rng)
    val = [pool[:n] for pool, n in zip(pools, val_counts, strict=True)]
    rest = [pool[n:] for pool, n in zip(pools, val_counts, strict=True)]
    if train_images is not None:
        counts = _share(train_images, sizes - val_counts, rng)
        rest = [pool[:n] for pool, n in zip(rest, counts, strict=True)]
    train_indices, val_indices = (np.sort(np.concatenate(part)) for part in (rest, val))
    return image_set.subset(train_indices), image_set.subset(val_indices)


def _share(total: int, available: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """Share ``total`` between classes as evenly as ``available`` [C] allows (int64 [C])."""
    counts = np.zeros_like(available)
    while (left := total - int(counts.sum())) > 0:
        open_classes = np.flatnonzero(counts < available)
        each = left // len(open_classes)
        if each:
            room = (available - counts)[open_classes]
            counts[open_classes] += np.minimum(each, room)
        else:
            counts[rng.permutation(open_classes)[:left]] += 1
    return counts


def _check_counts(
    image_set: ImageSet | Listing,
    sizes: NDArray[np.int64],
    train_images: int | None,
    val_images: int,
) -> None:
    """Raise for numbers of images that ``split_train`` cannot give."""
    name, total, classes = image_set.name, len(image_set), len(sizes)
    for class_name, size in zip(image_set.classes, sizes, strict=True):
        if size < 2:
            raise InputError(
                f"{name}: expected at least two training images of every class, one of them for "
                f"validation, got {size} of {class_name}; add images."
            )
    if not classes <= val_images <= total - classes:
        raise InputError(
            f"--val-images: expected {classes} to {total - classes} ({name} has {total} training "
            f"images in {classes} classes, and each class needs one on either side), "
            f"got {val_images}."
        )
    if train_images is not None and not classes <= train_images <= total - val_images:
        raise InputError(
            f"--train-images: expected {classes} to {total - val_images} ({name} has {total} "
            f"training images in {classes} classes, {val_images} of them held out by "
            f"--val-images), got {train_images}."
        )
