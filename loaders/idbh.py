"""IDBH, augmentation that hardens: flip, CropShift, ColorShape and RandomErasing, in this order.

Li and Spratling, Data Augmentation Alone Can Improve Adversarial Training, ICLR 2023; official code
TreeLLi/DA-Alone-Improves-AT. Each image is mirrored with probability 1/2, loses a few rows and
columns and is placed anew on black (CropShift), goes through one of eight operations on colour or
shape (ColorShape), and has a rectangle blackened (RandomErasing).

The parameters are drawn on the CPU from (seed, epoch, batch), their laws are those of the official
code. That code works on images of 32x32; here CropShift's pixels are in proportion to the smaller
side. The pixels are those that Pillow computes for the same parameters, byte for byte: integers
where it has integers, else single operations of IEEE 754, which CPU and GPU round alike. The images
of an operation are picked by indices that the host knows: nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cure_fast.batch import Part

from .augment import check_pixels, to_float
from .seeds import AUGMENTATION, generator_of

OPERATIONS = (
    "saturation",
    "brightness",
    "contrast",
    "sharpness",
    "autocontrast",
    "equalize",
    "shear",
    "rotation",
)
SHEAR, ROTATION = OPERATIONS.index("shear"), OPERATIONS.index("rotation")
# RandomErasing of torchvision: height over width, smallest share of the area, tries to fit.
RATIO = (0.3, 3.3)
SMALLEST = 0.02
TRIES = 10


@dataclass(frozen=True)
class Variant:
    """Constants of one variant.

    Attributes:
        shift: most rows and columns lost together, of images whose smaller side is 32.
        shares: probability of each of ``OPERATIONS``.
        shear: largest angle in radians; the smallest is 0.05.
        turn: largest angle in whole degrees; the smallest is 1.
        erase: probability of the rectangle.
        largest: its largest share of the area.
    """

    shift: int = 10
    shares: tuple[float, ...] = (0.125,) * 8
    shear: float = 0.15
    turn: int = 10
    erase: float = 1.0
    largest: float = 0.33

    @property
    def amounts(self) -> tuple[tuple[float, float], ...]:
        """Bounds of each operation's amount: a factor, an angle, or nothing."""
        turned = (1.0, self.turn + 1.0)
        wide, half = (0.1, 1.9), (0.5, 1.9)
        return (wide, half, half, wide, (0, 0), (0, 0), (0.05, self.shear), turned)


VARIANTS = {
    "idbh-weak": Variant(erase=0.5),
    "idbh-strong": Variant(),
    "idbh-svhn": Variant(
        shift=8,
        shares=(0.08, 0.08, 0.04, 0.08, 0.04, 0.08, 0.3, 0.3),
        shear=0.35,
        turn=30,
        largest=0.5,
    ),
}


@dataclass(frozen=True)
class Draw:
    """Parameters of one batch of N images, on the CPU; places and sizes are (row, column).

    Attributes:
        mirror: whether the image is mirrored left to right, bool [N].
        lost: rows and columns that CropShift takes off, int64 [2, N].
        source: first pixel of what it leaves, in the image, int64 [2, N] in [0, lost].
        target: where it places that, int64 [2, N] in [0, lost].
        operation: place in ``OPERATIONS``, int64 [N].
        amount: factor of a colour operation; angle of a shear in radians and of a rotation in whole
            degrees, with sign; float32 [N].
        sideways: whether a shear moves rows, else columns, bool [N].
        corner: first pixel of the blackened rectangle, int64 [2, N].
        size: its size, 0 where there is none, int64 [2, N].
    """

    mirror: NDArray[np.bool_]
    lost: NDArray[np.int64]
    source: NDArray[np.int64]
    target: NDArray[np.int64]
    operation: NDArray[np.int64]
    amount: NDArray[np.float32]
    sideways: NDArray[np.bool_]
    corner: NDArray[np.int64]
    size: NDArray[np.int64]


def draw_idbh(
    variant: Variant,
    count: int,
    sides: tuple[int, int],
    *,
    seed: int,
    epoch: int,
    batch: int,
    flip: bool,
) -> Draw:
    """Return the parameters of ``count`` images of ``sides`` (height, width).

    Args:
        variant: the constants.
        count: number of images N.
        sides: height and width of the images.
        seed: the run's seed.
        epoch: number of the epoch, from 0.
        batch: number of the batch in the epoch, from 0.
        flip: mirror each image with probability 1/2. Turning it off leaves the rest as it is.
    """
    generator = generator_of(seed, AUGMENTATION, epoch, batch)
    uniform = torch.rand(12 + 2 * TRIES + 2, count, dtype=torch.float64, generator=generator)
    u, erased, corner = np.split(uniform.numpy(), [12, 12 + 2 * TRIES])
    shift = _below(u[0], variant.shift * min(sides) // 32 + 1)
    columns = _below(u[1], shift + 1)
    lost = np.stack((shift - columns, columns))
    operation = np.searchsorted(np.cumsum(variant.shares)[:-1], u[6], side="right")
    low, high = np.array(variant.amounts)[operation].T
    amount = low + u[7] * (high - low)
    amount[operation == ROTATION] //= 1
    amount[(operation >= SHEAR) & (u[8] < 0.5)] *= -1
    size = _rectangles(variant, sides, *np.split(erased, 2)) * (u[9] < variant.erase)
    return Draw(
        mirror=(u[10] < 0.5) & flip,
        lost=lost,
        source=_below(u[2:4], lost + 1),
        target=_below(u[4:6], lost + 1),
        operation=operation,
        amount=amount.astype(np.float32),
        sideways=u[11] < 0.5,
        corner=_below(corner, np.array(sides)[:, None] - size + 1),
        size=size,
    )


def idbh(
    images: Tensor,
    variant: Variant,
    *,
    seed: int,
    epoch: int,
    batch: int,
    flip: bool,
    indices: Tensor | None = None,
    part: Part | None = None,
) -> Tensor:
    """Return augmented images as float32 [N, 3, H, W] in [0, 1], channels_last.

    Args:
        images: uint8 [M, H, W, 3], on any device; not changed.
        variant: one of ``VARIANTS``.
        seed: see :func:`draw_idbh`, like the next three.
        epoch: see there.
        batch: see there.
        flip: see there.
        indices: which of the images, int64 [N] on their device; None takes all.
        part: which images of the batch they are, where they are not all; the draws are the same.

    Raises:
        ValueError: for another dtype or shape.
    """
    check_pixels(images)
    _, height, width, _ = images.shape
    count = len(images) if indices is None else len(indices)
    whole = count if part is None else part.whole
    draw = draw_idbh(
        variant, whole, (height, width), seed=seed, epoch=epoch, batch=batch, flip=flip
    )
    if part is not None:
        draw = Draw(**{name: each[..., part.rows] for name, each in vars(draw).items()})
    with _one_thread(images.device):
        return to_float(apply_idbh(images, draw, indices))


def apply_idbh(images: Tensor, draw: Draw, indices: Tensor | None = None) -> Tensor:
    """Return ``images`` augmented as ``draw`` says, uint8 [N, H, W, 3] on their device.

    Args:
        images: uint8 [M, H, W, 3], on any device; not changed.
        draw: parameters of N images.
        indices: which images, int64 [N] on their device; None takes all.
    """
    _, height, width, _ = images.shape
    if indices is None:
        indices = torch.arange(len(images), device=images.device)
    order = draw.operation.argsort(kind="stable")
    affine = _affine(draw, height, width)
    # One transfer for all integers; from pageable memory it is staged at once and stalls nothing.
    kept = np.array([[height], [width]]) - draw.lost
    moved = draw.target - draw.source
    parts = (order, affine, draw.mirror, moved, draw.target, kept, draw.corner, draw.size)
    table = torch.from_numpy(np.vstack(parts)).to(images.device, non_blocking=True)
    order, affine, mirror, moved, target, kept, corner, size = table.split((1, 6, 1, 2, 2, 2, 2, 2))
    amount = torch.from_numpy(draw.amount).to(images.device, non_blocking=True)
    shown = _inside(target, kept, height, width)
    x = _moved(images, indices, mirror[0].bool(), moved, shown)
    counts = np.bincount(draw.operation, minlength=len(OPERATIONS)).tolist()
    for name, chosen in zip(OPERATIONS, order[0].split(counts), strict=True):
        if len(chosen):
            some = x.index_select(0, chosen)
            if name in COLOUR:
                some = COLOUR[name](some, amount.index_select(0, chosen)[:, None, None, None])
            elif name in HISTOGRAM:
                some = HISTOGRAM[name](some)
            else:
                some = _transform(some, affine.index_select(1, chosen))
            x.index_copy_(0, chosen, some)
    return x.mul_(~_inside(corner, size, height, width)[..., None])


@contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """Compute with one thread on a CPU.

    Where both cores of a machine had other work too, 128 images of 32x32 took 12 to 23 ms so, and
    106 to 452 ms with two threads: each of some hundred operations waits for the slower one.
    """
    threads = torch.get_num_threads()
    try:
        if device.type == "cpu":
            torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(threads)


def _below(uniform: NDArray[np.float64], limit: NDArray[np.int64] | int) -> NDArray[np.int64]:
    """Return whole numbers in [0, limit) from numbers in [0, 1)."""
    return (uniform * limit).astype(np.int64)


def _rectangles(
    variant: Variant,
    sides: tuple[int, int],
    area: NDArray[np.float64],
    ratio: NDArray[np.float64],
) -> NDArray[np.int64]:
    """Return sizes [2, N], the first of the tries [TRIES, N] that fit, or 0 where none does."""
    area = (SMALLEST + area * (variant.largest - SMALLEST)) * sides[0] * sides[1]
    low, high = np.log(RATIO)
    ratio = np.exp(low + ratio * (high - low))
    size = np.rint(np.sqrt((area * ratio, area / ratio))).astype(np.int64)
    fits = (size < np.array(sides)[:, None, None]).all(axis=0)
    first = fits.argmax(axis=0)
    places = np.arange(fits.shape[1])
    return size[:, first, places] * fits[first, places]


def _affine(draw: Draw, height: int, width: int) -> NDArray[np.int64]:
    """Return where an output pixel's source lies, [6, N]: x, y for x' = 0, and both per x' and y'.

    In 65536ths of a pixel, as Pillow's affine transformation has them; of use for shears and
    rotations alone. The image's centre stays where it is.
    """
    turned = draw.operation == ROTATION
    amount = draw.amount.astype(np.float64)
    angle = np.where(turned, np.radians(amount), amount)
    sine, tangent = np.sin(angle), np.tan(angle)
    one = np.where(turned, np.cos(angle), 1.0)
    x_by_y = np.where(turned, -sine, tangent * draw.sideways)
    y_by_x = np.where(turned, sine, tangent * ~draw.sideways)
    x, y = width / 2, height / 2
    first = (x - one * x - x_by_y * y, y - y_by_x * x - one * y)
    # Of the middle of the first pixel.
    first = (first[0] + (one + x_by_y) / 2, first[1] + (y_by_x + one) / 2)
    parts = np.stack((*first, one, x_by_y, y_by_x, one))
    return np.floor(parts * 65536 + 0.5).astype(np.int64)


def _moved(images: Tensor, indices: Tensor, mirror: Tensor, by: Tensor, shown: Tensor) -> Tensor:
    """Mirror, then move by rows and columns ``by`` [2, N]; what is not ``shown`` is black."""
    _, height, width, _ = images.shape
    row = torch.arange(height, device=images.device) - by[0, :, None]
    column = torch.arange(width, device=images.device) - by[1, :, None]
    column = torch.where(mirror[:, None], width - 1 - column, column)
    return _picked(images, indices, row[:, :, None], column[:, None, :], shown)


def _transform(images: Tensor, affine: Tensor) -> Tensor:
    """Return what ``affine`` shows of the images by the nearest pixel; black outside of them."""
    count, height, width, _ = images.shape
    x, y, x_by_x, x_by_y, y_by_x, y_by_y = affine[:, :, None, None]
    across = torch.arange(width, device=images.device)
    down = torch.arange(height, device=images.device)[:, None]
    column = (x + x_by_x * across + x_by_y * down) >> 16
    row = (y + y_by_x * across + y_by_y * down) >> 16
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    return _picked(images, torch.arange(count, device=images.device), row, column, inside)


def _picked(images: Tensor, indices: Tensor, row: Tensor, column: Tensor, shown: Tensor) -> Tensor:
    """Return pixel (row, column) of images [M, H, W, 3] where ``shown`` [N, H, W], else black."""
    _, height, width, _ = images.shape
    first = indices[:, None, None] * (height * width)
    place = first + row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
    pixels = images.reshape(-1, 3).index_select(0, place.flatten())
    return pixels.view(*shown.shape, 3).mul_(shown[..., None])


def _inside(corner: Tensor, size: Tensor, height: int, width: int) -> Tensor:
    """Return which pixels lie in each rectangle, bool [N, H, W]."""
    within = []
    for first, length, side in zip(corner, size, (height, width), strict=True):
        place = torch.arange(side, device=corner.device)
        within.append((place >= first[:, None]) & (place < (first + length)[:, None]))
    return within[0][:, :, None] & within[1][:, None, :]


def _blended(base: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    """Return base + factor * (images - base), cut to [0, 255] and truncated, as Pillow blends.

    In separate operations: fused to one, as some functions of torch are, it would round otherwise.
    """
    return (base + factor * (images.float() - base)).clamp_(0, 255).byte()


def _grey(images: Tensor) -> Tensor:
    """Return the luma of ITU-R 601 in [0, 255], int32 [N, H, W, 1], rounded as Pillow does."""
    red, green, blue = images.int().split(1, dim=3)
    return (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16


def _saturation(images: Tensor, factor: Tensor) -> Tensor:
    return _blended(_grey(images), images, factor)


def _brightness(images: Tensor, factor: Tensor) -> Tensor:
    return _blended(torch.zeros_like(factor), images, factor)


def _contrast(images: Tensor, factor: Tensor) -> Tensor:
    count = images.shape[1] * images.shape[2]
    total = _grey(images).sum(dim=(1, 2), keepdim=True)
    return _blended((2 * total + count) // (2 * count), images, factor)


def _sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the mean of 3x3 pixels, the middle one five times; the border stays."""
    base = images.int()
    rows = base[:, :-2] + base[:, 1:-1] + base[:, 2:]
    total = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * base[:, 1:-1, 1:-1]
    base[:, 1:-1, 1:-1] = (2 * total + 13) // 26
    return _blended(base, images, factor)


def _autocontrast(images: Tensor) -> Tensor:
    """Stretch each channel to [0, 255]. Pillow counts in float64, whose rounding shows."""
    low = images.amin(dim=(1, 2), keepdim=True).double()
    high = images.amax(dim=(1, 2), keepdim=True).double()
    scale = torch.full_like(high, 255) / (high - low).clamp_(min=1)
    stretched = (images * scale + -low * scale).clamp_(0, 255).byte()
    return torch.where(high > low, stretched, images)


def _equalize(images: Tensor) -> Tensor:
    """Give each channel a flat histogram."""
    count, height, width, depth = images.shape
    device = images.device
    table = 256 * torch.arange(count * depth, device=device).view(count, 1, 1, depth)
    place = (table + images).flatten()
    histogram = torch.zeros(count * depth * 256, dtype=torch.int64, device=device)
    histogram.scatter_add_(0, place, torch.ones_like(place))
    histogram = histogram.view(-1, 256)
    highest = images.amax(dim=(1, 2)).long().view(-1, 1)
    step = (height * width - histogram.gather(1, highest)) // 255
    darker = histogram.cumsum(dim=1) - histogram
    flat = (darker + step // 2) // step.clamp(min=1)
    flat = torch.where(step > 0, flat, torch.arange(256, device=device)).clamp_(max=255).byte()
    return flat.flatten().index_select(0, place).view_as(images)


COLOUR = {
    "saturation": _saturation,
    "brightness": _brightness,
    "contrast": _contrast,
    "sharpness": _sharpness,
}
HISTOGRAM = {"autocontrast": _autocontrast, "equalize": _equalize}
