"""Random crop and flip of a batch, and the way from uint8 pixels to floats in [0, 1].

The parameters come from a CPU generator seeded by (seed, epoch, batch), and a pixel is divided by
255 with correct rounding, so the same batch has the same bytes on every device and from every
loader.

On the CPU NumPy does the work, in one thread: 0.6 ms for 128 CIFAR images. The same steps in torch
took 0.9 ms on one thread and 3 to 20 ms on two threads of a machine whose two cores had other work
too (as a loader's thread gives them), since each step waits for the slowest thread.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray
from torch import Tensor

from cure_fast.batch import Part
from cure_fast.kernels import augment_crop_flip

from .seeds import AUGMENTATION, generator_of


@dataclass(frozen=True)
class CropFlip:
    """Parameters of one batch.

    Attributes:
        padding: pixels added on every side before the crop.
        top: first row of the crop in the padded image, int64 [N] in [0, 2 * padding].
        left: first column of the crop, int64 [N] in [0, 2 * padding].
        mirror: whether the crop is mirrored left to right, bool [N].
        reflect: whether the pixels added are the image mirrored at its outermost ones, which takes
            a padding below its sides; else they are zero.
    """

    padding: int
    top: Tensor
    left: Tensor
    mirror: Tensor
    reflect: bool = False


def draw_crop_flip(
    count: int,
    *,
    seed: int,
    epoch: int,
    batch: int,
    crop_padding: int,
    flip: bool,
    reflect: bool = False,
) -> CropFlip:
    """Return the parameters of ``count`` images, on the CPU.

    Args:
        count: number of images N.
        seed: the run's seed.
        epoch: number of the epoch, from 0.
        batch: number of the batch in the epoch, from 0.
        crop_padding: padding in pixels; 0 turns the crop off.
        flip: mirror each image with probability 1/2. Turning it off leaves the crops as they are.
        reflect: see :class:`CropFlip`; the draws are the same.
    """
    generator = generator_of(seed, AUGMENTATION, epoch, batch)
    corner = torch.randint(0, 2 * crop_padding + 1, (2, count), generator=generator)
    mirror = torch.randint(0, 2, (count,), generator=generator).bool()
    return CropFlip(crop_padding, corner[0], corner[1], mirror & flip, reflect)


def crop_flip(
    images: Tensor,
    *,
    seed: int,
    epoch: int,
    batch: int,
    crop_padding: int,
    flip: bool,
    reflect: bool = False,
    indices: Tensor | None = None,
    part: Part | None = None,
) -> Tensor:
    """Return randomly cropped and mirrored images as float32 [N, 3, H, W] in [0, 1], channels_last.

    Args:
        images: uint8 [M, H, W, 3], on any device; not changed.
        seed: see :func:`draw_crop_flip`, like the others.
        epoch: see there.
        batch: see there.
        crop_padding: see there.
        flip: see there.
        reflect: see there.
        indices: which of the images, int64 [N] on their device; None takes all.
        part: which images of the batch they are, where they are not all; the draws are the same.

    Raises:
        ValueError: for another dtype or shape.
    """
    if not crop_padding and not flip:
        return to_float(images, indices)
    count = len(images) if indices is None else len(indices)
    draw = draw_crop_flip(
        count if part is None else part.whole,
        seed=seed,
        epoch=epoch,
        batch=batch,
        crop_padding=crop_padding,
        flip=flip,
        reflect=reflect,
    )
    if part is not None:
        own = {name: getattr(draw, name)[part.rows] for name in ("top", "left", "mirror")}
        draw = replace(draw, **own)
    return apply_crop_flip(images, draw, indices)


def apply_crop_flip(images: Tensor, draw: CropFlip, indices: Tensor | None = None) -> Tensor:
    """Return ``images`` (uint8 [M, H, W, 3]) cropped, mirrored and scaled as ``draw`` says.

    Args:
        images: on any device.
        draw: parameters of N images.
        indices: which images, int64 [N] on their device; None takes all.

    Raises:
        ValueError: for another dtype or shape.
    """
    check_pixels(images)
    if images.device.type != "cpu":
        return _on_gpu(images, indices, draw)
    return _scale_numpy(_crop_flip_numpy(_chosen(images, indices), draw))


def to_float(images: Tensor, indices: Tensor | None = None) -> Tensor:
    """Return uint8 [M, H, W, 3] as float32 [N, 3, H, W] in [0, 1], channels_last; no augmentation.

    Args:
        images: on any device.
        indices: which images, int64 [N] on their device; None takes all.

    Raises:
        ValueError: for another dtype or shape.
    """
    check_pixels(images)
    if images.device.type != "cpu":
        return _on_gpu(images, indices, None)
    return _scale_numpy(_chosen(images, indices))


def _chosen(images: Tensor, indices: Tensor | None) -> NDArray[np.uint8]:
    pixels = images.numpy()
    return pixels if indices is None else pixels.take(indices.numpy(), axis=0)


def check_pixels(images: Tensor) -> None:
    """Raise ``ValueError`` for anything but uint8 [N, H, W, 3]."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(
            f"images: expected uint8 [N, H, W, 3], got {images.dtype} {list(images.shape)}."
        )


def _crop_flip_numpy(images: NDArray[np.uint8], draw: CropFlip) -> NDArray[np.uint8]:
    count, height, width, _ = images.shape
    p = draw.padding
    if draw.reflect:
        padded = np.pad(images, ((0, 0), (p, p), (p, p), (0, 0)), mode="reflect")
    else:
        padded = np.zeros((count, height + 2 * p, width + 2 * p, 3), np.uint8)
        padded[:, p : p + height, p : p + width] = images
    image, row, column, byte = padded.strides
    # Every crop of every image, [N, 2p+1, 2p+1, H, W * 3], as a view; one per image is copied out.
    crops = as_strided(
        padded, (count, 2 * p + 1, 2 * p + 1, height, width * 3), (image, row, column, row, byte)
    )
    out = crops[np.arange(count), draw.top.numpy(), draw.left.numpy()].reshape(images.shape)
    mirror = draw.mirror.numpy()
    out[mirror] = out[mirror][:, :, ::-1]
    return out


def _scale_numpy(images: NDArray[np.uint8]) -> Tensor:
    out = images.astype(np.float32)
    np.divide(out, np.float32(255), out=out)
    return torch.from_numpy(out).permute(0, 3, 1, 2)


def _on_gpu(images: Tensor, indices: Tensor | None, draw: CropFlip | None) -> Tensor:
    """Do all of it in one kernel, from wherever on the device the images lie."""
    device = images.device
    if indices is None:
        indices = torch.arange(len(images), device=device)
    if draw is None:
        return augment_crop_flip(images, indices, top=None, left=None, mirror=None)
    # One transfer for the three; from pageable memory it is staged at once and stalls nothing.
    drawn = torch.stack((draw.top, draw.left, draw.mirror.long()))
    top, left, mirror = drawn.to(device, non_blocking=True)
    return augment_crop_flip(
        images,
        indices,
        top=top,
        left=left,
        mirror=mirror.bool(),
        padding=draw.padding,
        reflect=draw.reflect,
    )
