"""Images of any kind as one array: RGB, square, of one size, resized and cropped where asked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cure_fast.console import track
from cure_fast.errors import InputError

from .cached import written_once
from .image_set import ImageSet

if TYPE_CHECKING:
    from PIL.Image import Image

# Pillow's modes of at most 8 bits per channel.
MODES = ("RGB", "L", "P", "1", "RGBA", "LA", "CMYK", "YCbCr")
# Images that take more are mapped where that can be.
IN_MEMORY_BYTES = 1 << 30
REMEDY = "or give --image-size N, which resizes and centre-crops all to NxN"


def stack_images(
    images: Iterable[tuple[str, Image]],
    *,
    count: int,
    image_size: int | None,
    title: str,
    file: Path | None = None,
) -> NDArray[np.uint8]:
    """Return images as uint8 [N, S, S, 3]: in memory, or mapped where they are a lot.

    Args:
        images: see :func:`uniform`, like the next three.
        count: how many there are.
        image_size: see there.
        title: see there.
        file: where more than ``IN_MEMORY_BYTES`` of them are kept, one after the other, from then
            on; None keeps all in memory. A file that is there has to be of these images.

    Raises:
        InputError: as :func:`uniform`, or if the file cannot be written.
    """
    each = uniform(images, count=count, image_size=image_size, title=title)
    first = next(each, None)
    if first is None:
        return np.empty((count, 0, 0, 3), np.uint8)
    each, shape = chain([first], each), (count, *first.shape)
    if file is None or count * first.nbytes <= IN_MEMORY_BYTES:
        stacked = np.empty(shape, np.uint8)
        for place, pixels in enumerate(each):
            stacked[place] = pixels
        return stacked
    written_once(file, lambda target: write_images(target, each, shape))
    # Copies on write: nothing writes, and torch shares the memory of arrays that might be written.
    return np.load(file, mmap_mode="c")


def write_images(
    target: IO[bytes], images: Iterable[NDArray[np.uint8]], shape: tuple[int, ...]
) -> None:
    """Write images as an array of NumPy's format, one at a time."""
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(target, header)  # pyright: ignore[reportArgumentType]
    for pixels in images:
        target.write(pixels.tobytes())


def uniform(
    images: Iterable[tuple[str, Image]], *, count: int, image_size: int | None, title: str
) -> Iterator[NDArray[np.uint8]]:
    """Yield images as uint8 [S, S, 3]; those of other modes become RGB, alpha is dropped.

    Args:
        images: each with what messages call it.
        count: how many there are.
        image_size: pixels that the shorter side is resized to, and that are then cropped out of the
            middle of the longer; None takes images as they are.
        title: what the progress bar says.

    Raises:
        InputError: naming the image that is not square, or not of the first one's size.
    """
    shape, first = None, ""
    with track(title, count) as advance:
        for name, image in images:
            pixels = _pixels(name, image, image_size)
            if shape is None:
                shape, first = pixels.shape, name
                if shape[0] != shape[1]:
                    raise InputError(
                        f"{name}: expected a square image, got {_size(shape)} pixels; bring all "
                        f"images to one square size, {REMEDY}."
                    )
            if pixels.shape != shape:
                raise InputError(
                    f"{name}: expected {_size(shape)} pixels like {first}, got "
                    f"{_size(pixels.shape)}; bring all images to one size, {REMEDY}."
                )
            yield pixels
            advance(1)


def resized(image_set: ImageSet, image_size: int) -> ImageSet:
    """Return a set with its images brought to another size."""
    from PIL.Image import fromarray

    images = ((image_set.name, fromarray(image)) for image in image_set.images)
    title = f"resizing {image_set.name}"
    stacked = stack_images(images, count=len(image_set), image_size=image_size, title=title)
    return replace(image_set, images=stacked)


def to_image(name: str, image: Any) -> Image:
    """Return a Pillow image of what a data set holds, which messages call ``name``.

    That is a Pillow image, an array of uint8 [H, W] or [H, W, C], or a tensor [C, H, W] of uint8 or
    of floats in [0, 1], as torchvision's ``ToTensor`` makes it.

    Raises:
        InputError: for anything else.
    """
    from PIL import Image
    from torch import Tensor
    from torchvision.transforms.functional import to_pil_image

    if isinstance(image, Image.Image):
        return image
    if isinstance(image, Tensor) and image.is_floating_point():
        # Written so that NaN is outside.
        if not bool(((image >= 0) & (image <= 1)).all()):
            raise InputError(
                f"{name}: expected values in [0, 1], got {float(image.min()):g} to "
                f"{float(image.max()):g}; leave out what normalises: --normalize dataset has the "
                "model do it."
            )
        # Rounded, where to_pil_image would cut.
        image = (image * 255).round().byte()
    if str(getattr(image, "dtype", "")) in ("uint8", "torch.uint8"):
        with suppress(TypeError, ValueError):
            return to_pil_image(image)
    came = type(image).__name__
    if hasattr(image, "dtype"):
        came = f"{came} of {image.dtype} {list(image.shape)}"
    raise InputError(
        f"{name}: expected a Pillow image, an array of uint8 [H, W, 3] or a tensor [3, H, W] of "
        f"uint8 or of floats in [0, 1], got {came}."
    )


def to_rgb(name: str, image: Image) -> Image:
    """Return a Pillow image as RGB; refuse one of more than 8 bits, which would be cut."""
    if image.mode not in MODES:
        raise InputError(
            f"{name}: expected 8 bits per channel, got an image of mode {image.mode}; "
            "convert it first."
        )
    return image.convert("RGB")


def _pixels(name: str, image: Image, image_size: int | None) -> NDArray[np.uint8]:
    """Return an image as uint8 [H, W, 3]."""
    from torchvision.transforms import functional as F

    image = to_rgb(name, image)
    if image_size is not None:
        image = F.center_crop(F.resize(image, [image_size]), [image_size])  # pyright: ignore
    return np.asarray(image)


def _size(shape: tuple[int, ...]) -> str:
    """Return width x height as text."""
    return f"{shape[1]}x{shape[0]}"
