"""A set of images with labels in memory, and the checks that every set passes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cure_fast.errors import InputError


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images of one size with their labels; the arrays are shared, not copied, and never written.

    Attributes:
        name: name of the data set, as ``--data`` takes it.
        images: uint8 [N, H, W, 3], RGB.
        labels: int64 [N], in [0, len(classes)).
        classes: name of each class.
        source: where the images came from, in words.
    """

    name: str
    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    source: str

    def __len__(self) -> int:
        return len(self.images)

    @property
    def image_size(self) -> int:
        """Height and width of the images in pixels."""
        return self.images.shape[1]

    def subset(self, indices: NDArray[np.integer]) -> ImageSet:
        """Return the images at ``indices`` (integers [M], in this order) as a new set (a copy)."""
        return replace(self, images=self.images[indices], labels=self.labels[indices])

    def checksum(self) -> str:
        """Return :func:`content_checksum` of the images and labels."""
        return content_checksum(self.images.shape, [self.images], self.labels)


def content_checksum(
    shape: tuple[int, ...], images: Iterable[NDArray[np.uint8]], labels: NDArray[np.int64]
) -> str:
    """Return the SHA-256 of shape, pixels and labels (little-endian int64) as 64 hex digits.

    Args:
        shape: of all images, [N, H, W, 3].
        images: uint8, in one array or in several that follow one another.
        labels: int64 [N].
    """
    digest = hashlib.sha256(f"{tuple(map(int, shape))}".encode())
    for part in images:
        digest.update(np.ascontiguousarray(part).data)
    digest.update(np.ascontiguousarray(labels, dtype="<i8").data)
    return digest.hexdigest()


def check_images(image_set: ImageSet, *, training: bool = False) -> None:
    """Check types, shapes and labels of a set.

    Args:
        image_set: the set to check.
        training: also ask for at least one image of every class.

    Raises:
        InputError: naming the first index or the class that is wrong.
    """
    _check_pixels(image_set.name, image_set.images)
    _check_labels(image_set)
    if training:
        counts = np.bincount(image_set.labels, minlength=len(image_set.classes))
        empty = [name for name, n in zip(image_set.classes, counts, strict=True) if not n]
        if empty:
            raise InputError(
                f"{image_set.name}: expected training images of every class, got none of "
                f"{', '.join(empty)}; add images or remove the class."
            )


def _check_pixels(name: str, images: NDArray) -> None:
    """Raise unless ``images`` is uint8 [N, S, S, 3] with at least one pixel."""
    if images.dtype != np.uint8:
        if np.issubdtype(images.dtype, np.floating):
            bad = np.flatnonzero(~np.isfinite(images.reshape(len(images), -1)).all(axis=1))
            if len(bad):
                raise InputError(
                    f"{name}: image {bad[0]} holds a value that is not finite ({len(bad)} images "
                    f"do); images must be uint8, 0 to 255."
                )
        raise InputError(
            f"{name}: expected images of type uint8 (0 to 255), got {images.dtype}; "
            f"convert them first."
        )
    if images.ndim != 4 or images.shape[3] != 3 or images.shape[1] != images.shape[2]:
        raise InputError(
            f"{name}: expected images of shape [N, size, size, 3], got {list(images.shape)}."
        )
    if not images.size:
        raise InputError(f"{name}: expected at least one image, got shape {list(images.shape)}.")


def _check_labels(image_set: ImageSet) -> None:
    """Raise unless there is one int64 label in range per image."""
    name, labels, classes = image_set.name, image_set.labels, len(image_set.classes)
    if labels.dtype != np.int64 or labels.shape != (len(image_set),):
        raise InputError(
            f"{name}: expected {len(image_set)} labels of type int64, one per image, got "
            f"{labels.dtype} of shape {list(labels.shape)}."
        )
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        raise InputError(
            f"{name}: expected labels from 0 to {classes - 1}, got {labels[wrong[0]]} for image "
            f"{wrong[0]} ({len(wrong)} images are out of range); mend the labels or the classes."
        )
