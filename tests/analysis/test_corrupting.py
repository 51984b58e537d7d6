"""Each corruption against a computation of another kind, with the constants of CIFAR-10-C."""

from __future__ import annotations

import colorsys
import io
import math

import numpy as np
import pytest
from PIL import Image

from cure_fast.analysis import corrupting
from cure_fast.analysis.corrupting import KINDS, SEVERITIES, corrupt
from cure_fast.errors import InputError

pytest.importorskip("scipy")
MADE = [name for name, kind in KINDS.items() if kind.make]


class Drawn:
    """A source of random numbers that always gives the same."""

    def __init__(self, normal=0.0, uniform=0.0):
        self.values = {"normal": normal, "uniform": uniform}

    def normal(self, mean, deviation, shape):
        return np.full(shape, self.values["normal"])

    def uniform(self, low, high, shape=None):
        return np.full(() if shape is None else shape, self.values["uniform"])


@pytest.fixture(scope="module")
def colours():
    """Images of all hues, black, white and grey among them, uint8 [3, 6, 6, 3]."""
    found = np.random.default_rng(1).integers(0, 256, (3, 6, 6, 3), np.uint8)
    found[0, 0, :3] = [[0, 0, 0], [255, 255, 255], [90, 90, 90]]
    return found


@pytest.fixture(scope="module")
def smooth():
    """Images of waves, uint8 [8, 32, 32, 3]."""
    draw, line = np.random.default_rng(2), np.arange(32)
    found = np.full((8, 32, 32, 3), 127.0)
    for _ in range(12):
        across, down, phase = draw.uniform(-0.8, 0.8, (3, 8, 1, 1, 3))
        found += 18 * np.sin(across * line[:, None] + down * line[:, None, None] + 9 * phase)
    return np.clip(found, 0, 255).astype(np.uint8)


def flat(level, count=1, size=32, channels=3):
    return np.full((count, size, size, channels), level, np.uint8)


def floor(values):
    return np.floor(255 * np.clip(values, 0, 1) + 1e-6)


def assert_near(found, expected, most=1e-9):
    assert np.abs(found - expected).max() <= most


NOISES = {
    "gaussian_noise": [0.04, 0.06, 0.08, 0.09, 0.10],
    "speckle_noise": [0.5 * c for c in (0.06, 0.1, 0.12, 0.16, 0.2)],
    "shot_noise": [math.sqrt(0.5 / c) for c in (500, 250, 100, 75, 50)],
}


@pytest.mark.parametrize("name", NOISES)
@pytest.mark.parametrize("severity", [1, 3, 5])
def test_noise_has_its_mean_and_deviation(name, severity):
    x = 127.5 / 255
    found = corrupt(flat(128, 12), name, severity).astype(float) / 255
    values = found.ravel()
    deviation = NOISES[name][severity - 1] * (128 / 255 / 0.5) ** (0.5 if "shot" in name else 1)
    deviation = NOISES[name][severity - 1] if "gaussian" in name else deviation
    error = deviation / math.sqrt(2 * len(values))
    # Cutting off takes away half a step and adds the variance of a step.
    expected = math.sqrt(deviation**2 + 1 / 255**2 / 12)
    assert values.std() == pytest.approx(expected, abs=5 * error)
    assert values.mean() == pytest.approx(x, abs=5 * deviation / math.sqrt(len(values)))


@pytest.mark.parametrize(("severity", "share"), [*enumerate([0.01, 0.02, 0.03, 0.05, 0.07], 1)])
def test_impulses_are_a_share_and_half_of_them_white(severity, share):
    found = corrupt(flat(77, 12), "impulse_noise", severity).ravel()
    assert {*np.unique(found)} == {0, 77, 255}
    for value in (0, 255):
        error = math.sqrt(share / 2 / len(found))
        assert (found == value).mean() == pytest.approx(share / 2, abs=5 * error)


@pytest.mark.parametrize(("severity", "share"), [*enumerate([0.75, 0.5, 0.4, 0.3, 0.15], 1)])
def test_contrast_is_a_share_of_the_distance_to_the_mean(colours, severity, share):
    expected = np.empty(colours.shape)
    for n in range(len(colours)):
        for c in range(3):
            plane = colours[n, :, :, c] / 255
            expected[n, :, :, c] = share * plane + (1 - share) * plane.mean()
    assert np.array_equal(corrupt(colours, "contrast", severity), floor(expected))


def in_hsv(image, change):
    """Return an image with each pixel changed by a function of hue, saturation and value."""
    found = np.empty(image.shape)
    for place in np.ndindex(image.shape[:2]):
        hue, saturation, value = change(*colorsys.rgb_to_hsv(*(image[place] / 255)))
        found[place] = colorsys.hsv_to_rgb(hue, min(saturation, 1), min(value, 1))
    return found


@pytest.mark.parametrize("severity", SEVERITIES)
def test_brightness_and_saturation_are_those_of_hsv(colours, severity):
    more = (0.05, 0.1, 0.15, 0.2, 0.3)[severity - 1]
    factor, plus = ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2))[severity - 1]
    cases = {
        "brightness": lambda h, s, v: (h, s, v + more),
        "saturate": lambda h, s, v: (h, factor * s + plus, v),
    }
    for name, change in cases.items():
        expected = np.stack([in_hsv(image, change) for image in colours])
        assert np.array_equal(corrupt(colours, name, severity), floor(expected))


@pytest.mark.parametrize(("severity", "quality"), [*enumerate([80, 65, 58, 50, 40], 1)])
def test_jpeg_is_pillows(smooth, severity, quality):
    file = io.BytesIO()
    Image.fromarray(smooth[1]).save(file, format="jpeg", quality=quality)
    expected = np.asarray(Image.open(file))
    assert np.array_equal(corrupt(smooth, "jpeg_compression", severity)[1], expected)


@pytest.mark.parametrize(("severity", "share"), [*enumerate([0.95, 0.9, 0.85, 0.75, 0.65], 1)])
def test_pixels_of_pixelate_are_means_over_areas(smooth, severity, share):
    size, small = 32, int(32 * share)
    # Pillow takes the pixels whose middles lie inside.
    inside = ((np.arange(size) + 0.5) * small / size).astype(int) == np.arange(small)[:, None]
    areas = inside / inside.sum(1, keepdims=True)
    means = np.einsum("ij,njkc,lk->nilc", areas, smooth.astype(float), areas)
    back = ((np.arange(size) + 0.5) * small / size).astype(int)
    expected = means[:, back][:, :, back]
    # Pillow rounds after either axis.
    assert np.abs(corrupt(smooth, "pixelate", severity) - expected).max() <= 1.01


@pytest.mark.parametrize(
    "name",
    [n for n in MADE if KINDS[n].group in ("blur", "digital") and n != "jpeg_compression"],
)
def test_what_moves_pixels_leaves_one_colour_as_it_is(name):
    for level in (0, 77, 255):
        for severity in SEVERITIES:
            assert (corrupt(flat(level), name, severity) == level).all()


def spread_of(name, severity, size=21):
    """Return what becomes of one white pixel in the middle of black ones."""
    image = flat(0, size=size, channels=1)
    image[0, size // 2, size // 2] = 255
    return corrupt(image, name, severity)[0, :, :, 0]


@pytest.mark.parametrize(("severity", "sigma"), [*enumerate([0.4, 0.6, 0.7, 0.8, 1], 1)])
def test_gaussian_blur_spreads_a_pixel_by_its_kernel(severity, sigma):
    offsets = np.arange(21) - 10
    line = np.exp(-(offsets**2) / (2 * sigma**2)) * (np.abs(offsets) <= int(4 * sigma + 0.5))
    line /= line.sum()
    assert np.array_equal(spread_of("gaussian_blur", severity), floor(np.outer(line, line)))


DISKS = [(0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)]


@pytest.mark.parametrize(("severity", "radius", "sigma"), [(s, *d) for s, d in enumerate(DISKS, 1)])
def test_defocus_spreads_a_pixel_over_a_disk(severity, radius, sigma):
    inside = [
        (i, j) for i in range(-8, 9) for j in range(-8, 9) if i * i + j * j <= radius * radius
    ]
    ends = math.exp(-1 / (2 * sigma**2))
    soft = {-1: ends / (1 + 2 * ends), 0: 1 / (1 + 2 * ends), 1: ends / (1 + 2 * ends)}
    expected = np.zeros((21, 21))
    for i, j in inside:
        for di in soft:
            for dj in soft:
                expected[10 + i + di, 10 + j + dj] += soft[di] * soft[dj] / len(inside)
    assert expected.sum() == pytest.approx(1)
    assert np.array_equal(spread_of("defocus_blur", severity), floor(expected))


def test_motion_spreads_a_pixel_along_its_direction():
    image = np.zeros((2, 21, 21, 1))
    image[:, 10, 10] = 1
    found = corrupting.smear(image, 6, 1.5, np.array([0.0, 90.0]))
    weights = np.array([math.exp(-(k**2) / (2 * 1.5**2)) for k in range(13)])
    weights /= weights.sum()
    assert_near(found[0, 10, :11, 0], weights[10::-1])
    assert_near(found[1, :11, 10, 0], weights[10::-1])


def test_a_zoomed_slope_is_a_slope_that_is_less_steep():
    slope = np.arange(32.0)
    x = np.broadcast_to(slope[None, :, None, None], (1, 32, 32, 1))
    for factor in (1.05, 1.25):
        part = math.ceil(32 / factor)
        large = round(part * factor)
        places = (np.arange(32) + (large - 32) // 2) * (part - 1) / (large - 1)
        found = corrupting.zoomed(x, factor)
        assert_near(found[0, :, 5, 0], (32 - part) // 2 + places)


def test_zoom_blur_is_a_mean_of_enlarged_images(smooth):
    x = smooth / 255
    for severity, count in enumerate([7, 12, 16, 21, 26], 1):
        # Not 1 + k / 100: of 32.5 pixels, 26 by 1.25, there are 33 for what is added up to 1.25.
        factors = np.arange(1, 1 + 0.05 * severity + 0.01, 0.01)
        assert len(factors) == count
        enlarged = [corrupting.zoomed(x, factor) for factor in factors]
        expected = (x + np.sum(enlarged, 0)) / (count + 1)
        found = corrupt(smooth, "zoom_blur", severity)
        assert np.abs(found - 255 * expected).max() < 1.001


def test_glass_puts_a_near_pixel_in_the_place_of_each(smooth):
    x = smooth[:, :12, :12]
    found = corrupt(x, "glass_blur", 1).astype(int)
    near = [np.roll(x, (i, j), (1, 2)) for i in (0, 1) for j in (0, 1)]
    assert (np.stack([(found == each).all(-1) for each in near]).any(0)).all()
    assert (found != x).any(axis=(1, 2, 3)).all()


def clouds_one_by_one(size, decay, source):
    """Return clouds by the rule of diamonds and squares, a point at a time."""
    clouds, step, scale = np.zeros((size, size)), size, 100.0

    def mean_of(*points):
        return sum(clouds[i % size, j % size] for i, j in points) / 4

    while step > 1:
        half = step // 2
        firsts = range(0, size, step)
        count = len(firsts)
        for kind in ("middles", "beside", "below"):
            noise = scale * source.uniform(-scale, scale, (count, count))
            for a, i in enumerate(firsts):
                for b, j in enumerate(firsts):
                    if kind == "middles":
                        points = (i, j), (i + step, j), (i, j + step), (i + step, j + step)
                        i_, j_ = i + half, j + half
                    elif kind == "beside":
                        i_, j_ = i, j + half
                        points = (i, j), (i, j + step), (i - half, j_), (i + half, j_)
                    else:
                        i_, j_ = i + half, j
                        points = (i, j), (i + step, j), (i_, j - half), (i_, j + half)
                    clouds[i_, j_] = mean_of(*points) + noise[a, b]
        step, scale = half, scale / decay
    clouds -= clouds.min()
    return clouds / clouds.max()


def test_clouds_follow_the_rule_point_by_point():
    sources = [np.random.default_rng(k) for k in range(2)]
    found = corrupting.plasma(16, 1.75, sources)
    for k in range(2):
        assert_near(found[k], clouds_one_by_one(16, 1.75, np.random.default_rng(k)))
    assert found.min() == 0 and found.max() == 1


FOGS = (0.2, 0.5, 0.75, 1, 1.5)


@pytest.mark.parametrize(("severity", "strength"), [*enumerate(FOGS, 1)])
def test_fog_lies_between_no_cloud_and_the_whitest(smooth, severity, strength):
    found, x = corrupt(smooth, "fog", severity), smooth / 255
    largest = x.max(axis=(1, 2, 3), keepdims=True)
    assert (found >= floor(x * largest / (largest + strength))).all()
    assert (found <= floor((x + strength) * largest / (largest + strength)) + 1).all()
    assert (corrupt(flat(0), "fog", severity) == 0).all()


MIXES = (0.95, 0.9, 0.9, 0.85, 0.8)


@pytest.mark.parametrize(("severity", "mix"), [*enumerate(MIXES, 1)])
def test_snow_whitens_and_adds_flakes(smooth, severity, mix):
    x = smooth / 255
    grey = 0.299 * x[..., :1] + 0.587 * x[..., 1:2] + 0.114 * x[..., 2:]
    bare = mix * x + (1 - mix) * np.maximum(x, grey * 1.5 + 0.5)
    constants = KINDS["snow"].constants[severity - 1]
    without = [Drawn(normal=constants[3] - 0.01)] * len(x)
    assert_near(corrupting.snow(x, constants, without), bare)
    # Where all is above the threshold, flakes are everywhere, twice, in 255ths.
    level = constants[3] + 0.01
    full = corrupting.snow(x, constants, [Drawn(normal=level)] * len(x))
    assert_near(full, bare + 2 * level, 4 / 255)


def test_spatter_is_water_or_mud_where_the_layer_is_high(smooth):
    x = smooth / 255
    for severity, (_, _, _, threshold, strength, muddy) in enumerate(KINDS["spatter"].constants, 1):
        assert muddy == (severity > 3)
        low, high = ([Drawn(normal=threshold + d)] * len(x) for d in (-0.01, 0.01))
        constants = KINDS["spatter"].constants[severity - 1]
        assert_near(corrupting.spatter(x, constants, low), x)
        water = x + strength * np.array([175, 238, 238]) / 255
        mud = np.broadcast_to(np.array([63, 42, 20]) / 255, x.shape)
        found = corrupting.spatter(x, constants, high)
        assert_near(found, mud if muddy else water)


def test_elastic_moves_by_what_is_drawn(smooth):
    x = smooth[:2] / 255
    for constants in KINDS["elastic_transform"].constants:
        still = corrupting.elastic_transform(x, constants, [Drawn()] * 2)
        assert_near(still, x)
        # All three points by one pixel, and then each pixel from alpha farther on.
        moved = corrupting.elastic_transform(x, constants, [Drawn(uniform=1.0)] * 2)
        shift = constants[0] * 32 - 1
        down, part = math.floor(shift), shift - math.floor(shift)
        inside = slice(5, 26)
        near = [
            [x[:, 5 + down + i : 26 + down + i, 5 + down + j : 26 + down + j] for j in (0, 1)]
            for i in (0, 1)
        ]
        expected = sum(
            (part if i else 1 - part) * (part if j else 1 - part) * near[i][j]
            for i in (0, 1)
            for j in (0, 1)
        )
        assert_near(moved[:, inside, inside], expected)


@pytest.mark.parametrize(
    "name",
    # Of the others a stronger severity has other constants, not larger ones.
    [
        n
        for n in MADE
        if n not in ("glass_blur", "motion_blur", "elastic_transform") and KINDS[n].group != "extra"
    ],
)
def test_more_severe_is_farther_away(smooth, name):
    far = [np.square(corrupt(smooth, name, s) - smooth.astype(float)).mean() for s in SEVERITIES]
    assert far == sorted(far) and far[0] > 0 and far[0] < far[-1]


@pytest.mark.parametrize("name", MADE)
def test_an_image_has_its_own_draws(name, monkeypatch):
    images = np.random.default_rng(4).integers(0, 256, (5, 10, 12, 3), np.uint8)
    before = images.copy()
    whole = corrupt(images, name, 4, seed=3)
    assert whole.dtype == np.uint8 and whole.shape == images.shape
    assert np.array_equal(images, before)
    assert np.array_equal(corrupt(images[:3], name, 4, seed=3), whole[:3])
    monkeypatch.setattr(corrupting, "BLOCK", 2)
    assert np.array_equal(corrupt(images, name, 4, seed=3), whole)
    drawn = name in ("glass_blur", "motion_blur", "elastic_transform", "fog", "snow", "spatter")
    if drawn or "noise" in name:
        assert not np.array_equal(corrupt(images, name, 4, seed=5), whole)
    same = corrupt(images[[0, 0]], name, 4)
    assert np.array_equal(same[0], same[1]) == (not drawn and "noise" not in name)


@pytest.mark.parametrize("name", MADE)
def test_grey_images_are_corrupted_or_refused(name):
    images = np.random.default_rng(4).integers(0, 256, (2, 8, 8, 1), np.uint8)
    if KINDS[name].coloured:
        with pytest.raises(InputError, match="in colour"):
            corrupt(images, name, 1)
    else:
        assert corrupt(images, name, 5).shape == images.shape


def test_what_cannot_be_corrupted_is_refused():
    with pytest.raises(InputError, match="CIFAR-10-C with --corrupted"):
        corrupt(flat(1), "frost", 1)
    with pytest.raises(InputError, match="Perhaps you meant snow"):
        corrupt(flat(1), "snows", 1)
    with pytest.raises(InputError, match="1 to 5"):
        corrupt(flat(1), "snow", 6)
    for wrong in (flat(1).astype(float), flat(1, size=3), flat(1)[0], flat(1, channels=2)):
        with pytest.raises(InputError, match="images: expected uint8"):
            corrupt(wrong, "snow", 1)
    assert corrupt(flat(1)[:0], "snow", 1).shape == (0, 32, 32, 3)
