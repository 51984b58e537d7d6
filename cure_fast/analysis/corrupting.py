"""Corruptions of images: the 19 of CIFAR-10-C, made anew but for frost.

Hendrycks and Dietterich, Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations, ICLR 2019, with the constants of the code that made CIFAR-10-C: they are of images of
32 pixels, and those that are lengths in pixels stay so at other sizes, where an image of fewer
pixels is corrupted more. What is drawn, such as noise, is drawn anew: the images are not those of
CIFAR-10-C, but others of the same kind. Frost needs photographs that are not there, and spatter of
severities 1 to 3 has plain drops, without the edges that OpenCV gives them.

Each image has random numbers of its own, decided by seed, corruption, severity and its place.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from cure_fast.config.checks import check, find
from cure_fast.errors import InputError
from cure_fast.evaluation.measurement import sources

SEVERITIES = (1, 2, 3, 4, 5)
GROUPS = ("blur", "digital", "weather", "noise", "extra")
# Images at a time, which bounds the memory and changes nothing else.
BLOCK = 256
SMALLEST = 4
# Weights of red, green and blue in an image's grey (ITU-R BT.601).
GREY = (0.299, 0.587, 0.114)
# Colours, 0 to 255.
WATER, MUD = (175, 238, 238), (63, 42, 20)
# Rounding must not take a whole number down to the one below.
TINY = 1e-6

Pixels = np.ndarray
Random = np.random.Generator


@dataclass(frozen=True)
class Corruption:
    """One kind of corruption.

    Attributes:
        group: one of :data:`GROUPS`; those of CURE's Fig. 7, and ``extra``.
        constants: of severities 1 to 5.
        make: from float64 [n, H, W, C] in [0, 1], the constants of one severity, and a source of
            random numbers per image to values that are cut to [0, 1] after; None where it cannot
            be made.
        coloured: whether it needs images of three channels.
    """

    group: str
    constants: Sequence[Any] = ()
    make: Callable[[Pixels, Any, Sequence[Random]], Pixels] | None = None
    coloured: bool = field(default=False, kw_only=True)


def corrupt(images: Pixels, name: str, severity: int, *, seed: int = 0) -> Pixels:
    """Return the images under one corruption.

    Args:
        images: uint8 [N, H, W, C] with C 1 or 3 and at least 4 pixels on a side; left as they are.
        name: of :data:`KINDS`.
        severity: 1 to 5.
        seed: of what is drawn; image i has the same draws in any N.

    Returns:
        uint8 [N, H, W, C]; fractions are cut off, as they are in CIFAR-10-C.

    Raises:
        InputError: for other images, names or severities.
    """
    kind = made(name)
    check(severity in SEVERITIES, "severity", severity, "1 to 5")
    check_images(images, [name])
    parts = []
    for start in range(0, len(images), BLOCK):
        block = images[start : start + BLOCK]
        places = torch.arange(start, start + len(block))
        random = [*sources(places, f"{name} {severity}", seed)]
        assert kind.make is not None
        parts.append(as_bytes(kind.make(block / 255.0, kind.constants[severity - 1], random)))
    return np.concatenate(parts) if parts else images.copy()


def made(name: str) -> Corruption:
    """Return the corruption, or raise ``InputError`` for one that is unknown or cannot be made."""
    kind = find("--corruptions", KINDS, name)
    if kind.make is None:
        raise InputError(
            f"--corruptions {name}: expected one that can be made anew, which takes photographs "
            "here. Leave it out, or read CIFAR-10-C with --corrupted FOLDER."
        )
    return kind


def check_images(images: Pixels, names: Sequence[str]) -> None:
    """Raise ``InputError`` for images that the named corruptions do not take."""
    right = images.dtype == np.uint8 and images.ndim == 4 and images.shape[3] in (1, 3)
    if not right or min(images.shape[1:3]) < SMALLEST:
        raise InputError(
            f"images: expected uint8 [N, H, W, C] of {SMALLEST} pixels or more with C 1 or 3, got "
            f"{images.dtype} {list(images.shape)}."
        )
    coloured = [name for name in names if KINDS[name].coloured]
    if images.shape[3] == 1 and coloured:
        raise InputError(
            f"--corruptions {coloured[0]}: expected images in colour, got grey ones. Leave it out."
        )


def as_bytes(values: Pixels) -> Pixels:
    """Return values as uint8, cut to [0, 1] before."""
    return (255 * np.clip(values, 0, 1) + TINY).astype(np.uint8)


def each(random: Sequence[Random], draw: Callable[[Random], Any]) -> np.ndarray:
    """Return what is drawn for each image, one upon the other."""
    return np.stack([draw(source) for source in random])


def gaussian_noise(x: Pixels, deviation: float, random: Sequence[Random]) -> Pixels:
    """Add noise of one deviation."""
    return x + deviation * each(random, lambda r: r.standard_normal(x.shape[1:]))


def shot_noise(x: Pixels, photons: float, random: Sequence[Random]) -> Pixels:
    """Count photons, of which white has so many on average."""
    pairs = zip(random, x * photons, strict=True)
    return np.stack([source.poisson(mean) for source, mean in pairs]) / photons


def impulse_noise(x: Pixels, share: float, random: Sequence[Random]) -> Pixels:
    """Set a share of the values to 0 or 1, either with the same chance."""
    draws = each(random, lambda r: r.random((2, *x.shape[1:])))
    return np.where(draws[:, 0] < share, draws[:, 1] < 0.5, x)


def speckle_noise(x: Pixels, deviation: float, random: Sequence[Random]) -> Pixels:
    """Add noise in proportion to the value."""
    return x + deviation * x * each(random, lambda r: r.standard_normal(x.shape[1:]))


def gaussian_blur(x: Pixels, sigma: float, _: Sequence[Random]) -> Pixels:
    """Blur by a Gaussian of a deviation in pixels."""
    from scipy.ndimage import gaussian_filter

    return gaussian_filter(x, (0, sigma, sigma, 0), mode="nearest")


def glass_blur(x: Pixels, constants: tuple[float, int, int], random: Sequence[Random]) -> Pixels:
    """Blur, put a neighbour's pixel in the place of each, and blur again.

    CIFAR-10-C means to exchange the two, but its code gives both the neighbour's, which lies up to
    ``reach`` above or left of the pixel: it is repeated here.
    """
    sigma, reach, passes = constants
    x = as_bytes(gaussian_blur(x, sigma, random)) / 255.0
    height, width = x.shape[1:3]
    rows, columns = range(height - reach, reach, -1), range(width - reach, reach, -1)
    shape = (passes, len(rows), len(columns), 2)
    moves = each(random, lambda r: r.integers(-reach, reach, shape))
    image = np.arange(len(x))
    for turn in range(passes):
        for i, row in enumerate(rows):
            for j, column in enumerate(columns):
                down, right = moves[:, turn, i, j].T
                x[:, row, column] = x[image, row + down, column + right]
    return gaussian_blur(x, sigma, random)


def disk(radius: float, sigma: float) -> np.ndarray:
    """Return the kernel of a lens out of focus: a disk, softened by 3 x 3 of a Gaussian.

    It is square, with its centre in the middle, and its sum is 1.
    """
    from scipy.ndimage import correlate1d

    reach = math.floor(radius) + 1
    grid = np.arange(-reach, reach + 1)
    inside = (grid[:, None] ** 2 + grid**2 <= radius**2).astype(float)
    soft = np.exp(-(np.array([-1, 0, 1]) ** 2) / (2 * sigma**2))
    soft /= soft.sum()
    inside /= inside.sum()
    return correlate1d(correlate1d(inside, soft, axis=0, mode="constant"), soft, mode="constant")


def defocus_blur(x: Pixels, constants: tuple[float, float], _: Sequence[Random]) -> Pixels:
    """Blur by :func:`disk`."""
    from scipy.ndimage import correlate

    return correlate(x, disk(*constants)[None, :, :, None], mode="mirror")


def smear(x: Pixels, radius: float, sigma: float, degrees: np.ndarray) -> Pixels:
    """Blur each image along its direction, to one side, as ImageMagick's motion blur does."""
    taps = np.arange(2 * math.ceil(radius) + 1)
    weights = np.exp(-(taps**2) / (2 * sigma**2))
    weights /= weights.sum()
    angles = np.deg2rad(degrees)[:, None]
    down, right = (np.ceil(taps * f(angles) - 0.5).astype(int) for f in (np.sin, np.cos))
    height, width = x.shape[1:3]
    image, out = np.arange(len(x))[:, None, None], np.zeros_like(x)
    for tap, weight in enumerate(weights):
        rows = np.clip(np.arange(height) + down[:, tap, None], 0, height - 1)
        columns = np.clip(np.arange(width) + right[:, tap, None], 0, width - 1)
        out += weight * x[image, rows[:, :, None], columns[:, None, :]]
    return out


def motion_blur(x: Pixels, constants: tuple[float, float], random: Sequence[Random]) -> Pixels:
    """Blur along a direction between -45 and 45 degrees."""
    return smear(x, *constants, each(random, lambda r: r.uniform(-45, 45)))


def zoomed(x: Pixels, factor: float) -> Pixels:
    """Return the middle of images [n, H, W, C] enlarged to their size, bilinearly."""
    from scipy.ndimage import zoom

    def enlarging(size: int) -> np.ndarray:
        """Return what takes a line of pixels to the line of as many from its middle, [size] * 2."""
        part = math.ceil(size / factor)
        first = (size - part) // 2
        unit = np.eye(size)[first : first + part]
        # Beyond the edge by rounding alone: there is nothing else to be nearest to.
        large = np.asarray(zoom(unit, (factor, 1), order=1, mode="nearest"))
        first = (len(large) - size) // 2
        return large[first : first + size]

    rows, columns = (enlarging(size) for size in x.shape[1:3])
    return np.einsum("ij,njkc,lk->nilc", rows, x, columns, optimize=True)


def zoom_blur(x: Pixels, end: float, _: Sequence[Random]) -> Pixels:
    """Average the image with enlarged ones, by 1, 1.01 and so on up to ``end``."""
    # NumPy's rounding leaves ``end`` in where it is 1.06 or 1.11, as it does for CIFAR-10-C.
    factors = np.arange(1, end, 0.01)
    return (x + sum(zoomed(x, factor) for factor in factors)) / (len(factors) + 1)


def plasma(size: int, decay: float, random: Sequence[Random]) -> np.ndarray:
    """Return clouds [n, size, size] from 0 to 1, of midpoints moved ever less (diamond-square).

    ``size`` is a power of 2, and edges meet as on a torus.
    """
    clouds, step, scale = np.zeros((len(random), size, size)), size, 100.0

    def moved(total: np.ndarray) -> np.ndarray:
        drawn = each(random, lambda r: r.uniform(-scale, scale, total.shape[1:]))
        return total / 4 + scale * drawn

    while step >= 2:
        half = step // 2
        corners = clouds[:, ::step, ::step]
        pairs = corners + np.roll(corners, -1, axis=1)
        clouds[:, half::step, half::step] = moved(pairs + np.roll(pairs, -1, axis=2))
        middles = clouds[:, half::step, half::step]
        for axis, (down, right) in ((1, (0, half)), (2, (half, 0))):
            # Two middles on either side, and the two corners at the ends of the line.
            sides = middles + np.roll(middles, 1, axis=axis)
            ends = corners + np.roll(corners, -1, axis=3 - axis)
            clouds[:, down::step, right::step] = moved(sides + ends)
        step, scale = half, scale / decay
    clouds -= clouds.min(axis=(1, 2), keepdims=True)
    return clouds / clouds.max(axis=(1, 2), keepdims=True)


def fog(x: Pixels, constants: tuple[float, float], random: Sequence[Random]) -> Pixels:
    """Add clouds, and scale to where the image's largest value was."""
    strength, decay = constants
    height, width = x.shape[1:3]
    size = 2 ** math.ceil(math.log2(max(height, width)))
    clouds = plasma(size, decay, random)[:, :height, :width, None]
    largest = x.max(axis=(1, 2, 3), keepdims=True)
    return (x + strength * clouds) * largest / (largest + strength)


def snow(x: Pixels, constants: tuple[float, ...], random: Sequence[Random]) -> Pixels:
    """Whiten the image, and add flakes blown one way, and the other way round again."""
    mean, deviation, factor, threshold, radius, sigma, mix = constants
    shape = (*x.shape[1:3], 1)
    layer = zoomed(each(random, lambda r: r.normal(mean, deviation, shape)), factor)
    flakes = as_bytes(np.where(layer < threshold, 0, layer)) / 255.0
    flakes = smear(flakes, radius, sigma, each(random, lambda r: r.uniform(-135, -45)))
    flakes = as_bytes(flakes) / 255.0
    grey = x @ np.array(GREY)[:, None] if x.shape[3] == 3 else x
    white = np.maximum(x, 1.5 * grey + 0.5)
    return mix * x + (1 - mix) * white + flakes + np.rot90(flakes, 2, axes=(1, 2))


def spatter(x: Pixels, constants: tuple[float, ...], random: Sequence[Random]) -> Pixels:
    """Add drops of water, or cover with mud."""
    mean, deviation, sigma, threshold, strength, muddy = constants
    shape = (*x.shape[1:3], 1)
    layer = gaussian_blur(each(random, lambda r: r.normal(mean, deviation, shape)), sigma, random)
    if muddy:
        cover = gaussian_blur(np.where(layer > threshold, 1.0, 0.0), strength, random)
        cover[cover < 0.8] = 0
        return x * (1 - cover) + cover * (np.array(MUD) / 255)
    drops = np.where(layer < threshold, 0, layer)
    largest = drops.max(axis=(1, 2, 3), keepdims=True)
    return x + strength * (np.array(WATER) / 255) * drops / np.where(largest > 0, largest, 1)


def contrast(x: Pixels, share: float, _: Sequence[Random]) -> Pixels:
    """Leave a share of the distance to the mean of each channel."""
    means = x.mean(axis=(1, 2), keepdims=True)
    return (x - means) * share + means


def brightness(x: Pixels, more: float, _: Sequence[Random]) -> Pixels:
    """Raise the value of HSV; hue and saturation stay."""
    value = x.max(axis=3, keepdims=True)
    raised = np.minimum(value + more, 1)
    return np.where(value > 0, x * raised / np.where(value > 0, value, 1), raised)


def saturate(x: Pixels, constants: tuple[float, float], _: Sequence[Random]) -> Pixels:
    """Scale the saturation of HSV and add to it; hue, of grey red, and value stay."""
    factor, more = constants
    value, least = x.max(axis=3, keepdims=True), x.min(axis=3, keepdims=True)
    spread = value - least
    # How far each channel lies below the value, as a share of the farthest.
    below = np.where(spread > 0, (value - x) / np.where(spread > 0, spread, 1), [0.0, 1.0, 1.0])
    saturation = spread / np.where(value > 0, value, 1)
    return value * (1 - below * np.clip(factor * saturation + more, 0, 1))


def through_pillow(x: Pixels, change: Callable[[Any], Any]) -> Pixels:
    """Return what a function of Pillow's images makes of each."""
    from PIL import Image

    grey = x.shape[3] == 1
    images = (Image.fromarray(each[..., 0] if grey else each) for each in as_bytes(x))
    return np.stack([np.asarray(change(image)) for image in images]).reshape(x.shape) / 255.0


def jpeg_compression(x: Pixels, quality: int, _: Sequence[Random]) -> Pixels:
    """Compress and read again."""

    def change(image: Any) -> Any:
        from PIL import Image

        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        return Image.open(file)

    return through_pillow(x, change)


def pixelate(x: Pixels, share: float, _: Sequence[Random]) -> Pixels:
    """Average to a share of the size, and enlarge again."""

    def change(image: Any) -> Any:
        from PIL.Image import Resampling

        small = tuple(int(share * size) for size in image.size)
        return image.resize(small, Resampling.BOX).resize(image.size, Resampling.BOX)

    return through_pillow(x, change)


def elastic_transform(
    x: Pixels, constants: tuple[float, float, float], random: Sequence[Random]
) -> Pixels:
    """Move three points of the image, and then all pixels by smooth distances.

    The constants, largest distance, smoothness and the points' distance, are shares of the size.
    """
    from scipy.ndimage import gaussian_filter, map_coordinates

    height, width = x.shape[1:3]
    size = min(height, width)
    alpha, sigma, reach = (share * size for share in constants)
    grid = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij")).astype(float)
    middle, side = np.array([height // 2, width // 2]), size // 3
    points = middle + side * np.array([[1, 1], [-1, 1], [-1, -1]])

    def bent(image: Pixels, source: Random) -> Pixels:
        moved = points + source.uniform(-reach, reach, points.shape)
        # From where each pixel comes: rows of [row, column, 1] times this [3, 2].
        back = np.linalg.solve(np.c_[moved, np.ones(3)], points)
        places = np.einsum("ihw,ij->jhw", grid, back[:2]) + back[2][:, None, None]
        layers = np.moveaxis(image, 2, 0)
        layers = [map_coordinates(c, places, order=1, mode="mirror") for c in layers]
        if alpha:
            drawn = source.uniform(-1, 1, grid.shape)
            smooth = gaussian_filter(drawn, (0, sigma, sigma), mode="reflect", truncate=3)
            places = grid + alpha * smooth
            layers = [map_coordinates(c, places, order=1, mode="reflect") for c in layers]
        return np.stack(layers, axis=2)

    return np.stack([bent(image, source) for image, source in zip(x, random, strict=True)])


# By the names of CIFAR-10-C's files, in the order of CURE's groups.
KINDS: dict[str, Corruption] = {
    "defocus_blur": Corruption(
        "blur", ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)), defocus_blur
    ),
    "glass_blur": Corruption(
        "blur",
        ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
        glass_blur,
    ),
    "motion_blur": Corruption("blur", ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)), motion_blur),
    "gaussian_blur": Corruption("blur", (0.4, 0.6, 0.7, 0.8, 1), gaussian_blur),
    "zoom_blur": Corruption("blur", (1.06, 1.11, 1.16, 1.21, 1.26), zoom_blur),
    "contrast": Corruption("digital", (0.75, 0.5, 0.4, 0.3, 0.15), contrast),
    "elastic_transform": Corruption(
        "digital",
        (
            (0, 0, 0.08),
            (0.05, 0.2, 0.07),
            (0.08, 0.06, 0.06),
            (0.1, 0.04, 0.05),
            (0.1, 0.03, 0.03),
        ),
        elastic_transform,
    ),
    "jpeg_compression": Corruption("digital", (80, 65, 58, 50, 40), jpeg_compression),
    "pixelate": Corruption("digital", (0.95, 0.9, 0.85, 0.75, 0.65), pixelate),
    "brightness": Corruption("weather", (0.05, 0.1, 0.15, 0.2, 0.3), brightness),
    "fog": Corruption("weather", ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)), fog),
    "frost": Corruption("weather"),
    "snow": Corruption(
        "weather",
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
        snow,
    ),
    "gaussian_noise": Corruption("noise", (0.04, 0.06, 0.08, 0.09, 0.1), gaussian_noise),
    "impulse_noise": Corruption("noise", (0.01, 0.02, 0.03, 0.05, 0.07), impulse_noise),
    "speckle_noise": Corruption("noise", (0.06, 0.1, 0.12, 0.16, 0.2), speckle_noise),
    "shot_noise": Corruption("noise", (500, 250, 100, 75, 50), shot_noise),
    "saturate": Corruption(
        "extra", ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)), saturate, coloured=True
    ),
    "spatter": Corruption(
        "extra",
        (
            (0.62, 0.1, 0.7, 0.7, 0.5, 0),
            (0.65, 0.1, 0.8, 0.7, 0.5, 0),
            (0.65, 0.3, 1, 0.69, 0.5, 0),
            (0.65, 0.1, 0.7, 0.69, 0.6, 1),
            (0.65, 0.1, 0.5, 0.68, 0.6, 1),
        ),
        spatter,
        coloured=True,
    ),
}
