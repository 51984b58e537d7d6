"""IDBH against Pillow and torchvision with the same parameters, byte for byte."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomErasing
from torchvision.transforms import functional as F

from cure_fast.loaders import to_float
from cure_fast.loaders.idbh import OPERATIONS, VARIANTS, apply_idbh, draw_idbh, idbh
from gpu_cases import no_waiting

SIDES = [(32, 32), (8, 8), (17, 33), (64, 48)]
WHERE = {"seed": 3, "epoch": 1, "batch": 2}


def some_images(count, sides, *, seed=0):
    """Return noise, images of few colours near one another, and smooth ones, in turn."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, (count, *sides, 3))
    few = rng.integers(0, 200, (count, 1, 1, 3)) + noise // 64
    smooth = np.cumsum(rng.integers(-20, 21, noise.shape), axis=1) + 128
    kind = np.arange(count)[:, None, None, None] % 3
    images = np.where(kind == 0, noise, np.where(kind == 1, few, smooth)).clip(0, 255)
    images[0] = 7
    return images.astype(np.uint8)


def through_pillow(pixels, draw, place):
    """Return one image as the official code augments it, step by step in its own functions."""
    image, (height, width) = Image.fromarray(pixels), pixels.shape[:2]
    if draw.mirror[place]:
        image = F.hflip(image)
    (rows, columns), (top, left), (down, right), corner, size = (
        getattr(draw, name)[:, place].tolist()
        for name in ("lost", "source", "target", "corner", "size")
    )
    image = F.crop(image, top, left, height - rows, width - columns)
    image = F.pad(image, [columns, rows], fill=0)
    image = F.crop(image, rows - down, columns - right, height, width)
    image = one_operation(image, draw, place)
    out = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return F.erase(out, *corner, *size, torch.zeros(1, dtype=torch.uint8)).permute(1, 2, 0).numpy()


def one_operation(image, draw, place):
    name, amount = OPERATIONS[draw.operation[place]], float(draw.amount[place])
    nearest = {"interpolation": InterpolationMode.NEAREST, "fill": 0}
    if name == "rotation":
        return F.rotate(image, amount, **nearest)
    if name == "shear":
        angle = math.degrees(amount)
        shear = [angle, 0.0] if draw.sideways[place] else [0.0, angle]
        return F.affine(image, angle=0, translate=[0, 0], scale=1, shear=shear, **nearest)
    if name in ("autocontrast", "equalize"):
        return getattr(F, name)(image)
    return getattr(F, f"adjust_{name}")(image, amount)


def assert_equals_pillow(images, draw):
    before = images.copy()
    out = apply_idbh(torch.from_numpy(images), draw).numpy()
    expected = np.stack([through_pillow(image, draw, k) for k, image in enumerate(images)])
    assert out.dtype == np.uint8 and (out == expected).all()
    assert (images == before).all()


@pytest.mark.parametrize("sides", SIDES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_whole_batches_equal_pillow(variant, sides):
    draw = draw_idbh(VARIANTS[variant], 128, sides, **WHERE, flip=True)
    assert_equals_pillow(some_images(128, sides), draw)


@pytest.mark.parametrize("sides", SIDES, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_each_operation_alone_equals_pillow(operation, sides):
    """With every angle of a rotation, and both ends of the other amounts."""
    number, count = OPERATIONS.index(operation), 60
    low, high = VARIANTS["idbh-svhn"].amounts[number]
    amount = np.linspace(low, high, count // 2)
    if operation == "rotation":
        amount = np.arange(1, 31)
    signed = np.stack((amount, -amount)) if operation in ("shear", "rotation") else [amount] * 2
    draw = draw_idbh(VARIANTS["idbh-strong"], count, sides, **WHERE, flip=False)
    nothing = np.zeros((2, count), np.int64)
    alone = {name: nothing for name in ("lost", "source", "target", "size")}
    draw = replace(draw, **alone, operation=np.full(count, number))
    draw = replace(draw, amount=np.concatenate(signed).astype(np.float32))
    assert_equals_pillow(some_images(count, sides), draw)


def test_equalize_of_what_a_wrong_histogram_would_miss():
    """One colour; two; too few pixels for a step; and a table that goes beyond 255."""
    images = np.zeros((4, 16, 17, 3), np.uint8)
    images[0] = 200
    images[1, :8] = 9
    images[2, 0, :3] = 255
    images[3] = (np.arange(272) // 2).reshape(16, 17, 1)
    draw = draw_idbh(VARIANTS["idbh-weak"], 4, (16, 17), **WHERE, flip=False)
    draw = replace(draw, operation=np.full(4, OPERATIONS.index("equalize")))
    for name in ("lost", "source", "target", "size"):
        draw = replace(draw, **{name: np.zeros((2, 4), np.int64)})
    assert_equals_pillow(images, draw)


def many(variant="idbh-strong", sides=(32, 32), count=60_000):
    return draw_idbh(VARIANTS[variant], count, sides, **WHERE, flip=True)


def assert_share(hits, share):
    """Within five standard deviations."""
    assert abs(np.mean(hits) - share) < 5 * (share * (1 - share) / len(hits)) ** 0.5


def assert_uniform(values, low, high):
    """Whole numbers from ``low`` to ``high``, each as often as the others."""
    assert (values.min(), values.max()) == (low, high)
    for value in range(low, high + 1):
        assert_share(values == value, 1 / (high - low + 1))


@pytest.mark.parametrize(("variant", "most"), [("idbh-weak", 10), ("idbh-svhn", 8)])
def test_crop_shift_has_the_law_of_the_official_code(variant, most):
    draw = many(variant)
    together = draw.lost.sum(axis=0)
    assert_uniform(together, 0, most)
    assert_uniform(draw.lost[1, together == 5], 0, 5)
    for place in (draw.source, draw.target):
        assert (place >= 0).all() and (place <= draw.lost).all()
        assert_uniform(place[0, draw.lost[0] == 3], 0, 3)
        assert_uniform(place[1, draw.lost[1] == 2], 0, 2)
    assert_share((draw.source == draw.target)[0, draw.lost[0] == 3], 1 / 4)
    assert_share(draw.mirror, 1 / 2)


@pytest.mark.parametrize(("sides", "most"), [((8, 8), 2), ((64, 96), 20), ((3, 5), 0)])
def test_crop_shift_is_in_proportion_to_the_smaller_side(sides, most):
    assert many(sides=sides).lost.sum(axis=0).max() == most


@pytest.mark.parametrize(
    ("variant", "shares", "shear", "turn"),
    [
        ("idbh-weak", (1 / 8,) * 8, 0.15, 10),
        ("idbh-strong", (1 / 8,) * 8, 0.15, 10),
        ("idbh-svhn", (0.08, 0.08, 0.04, 0.08, 0.04, 0.08, 0.3, 0.3), 0.35, 30),
    ],
)
def test_operations_have_their_shares_and_bounds(variant, shares, shear, turn):
    draw = many(variant)
    for number, share in enumerate(shares):
        assert_share(draw.operation == number, share)
    amounts = {name: draw.amount[draw.operation == k] for k, name in enumerate(OPERATIONS)}
    bounds = {"saturation": (0.1, 1.9), "sharpness": (0.1, 1.9)}
    bounds |= {"brightness": (0.5, 1.9), "contrast": (0.5, 1.9), "shear": (0.05, shear)}
    for name, (low, high) in bounds.items():
        size = np.abs(amounts[name])
        assert low <= size.min() < low + 0.01 and high - 0.01 < size.max() <= high
        assert_share(size < (low + high) / 2, 1 / 2)
    assert_uniform(np.abs(amounts["rotation"]).astype(int), 1, turn)
    assert (amounts["rotation"] % 1 == 0).all()
    for name in ("shear", "rotation"):
        assert_share(amounts[name] < 0, 1 / 2)
    assert_share(draw.sideways[draw.operation == OPERATIONS.index("shear")], 1 / 2)


@pytest.mark.parametrize(
    ("variant", "share", "largest"),
    [("idbh-weak", 0.5, 0.33), ("idbh-strong", 1, 0.33), ("idbh-svhn", 1, 0.5)],
)
def test_rectangles_have_the_law_of_torchvision(variant, share, largest):
    draw, sides = many(variant), np.array([[32], [32]])
    erased = draw.size.all(axis=0)
    assert (draw.size[:, ~erased] == 0).all()
    assert erased.all() if share == 1 else abs(erased.mean() - share) < 0.01
    assert (draw.corner >= 0).all() and (draw.corner + draw.size <= sides).all()
    assert (draw.size < sides).all()
    torch.manual_seed(0)
    law = {"img": torch.zeros(3, 32, 32), "scale": (0.02, largest), "ratio": (0.3, 3.3)}
    theirs = np.array([RandomErasing.get_params(**law, value=[0.0])[:4] for _ in range(3000)]).T
    ours = np.vstack((draw.corner, draw.size))[:, erased]
    # Five standard errors of the difference, of the first two moments.
    for moment in (1, 2):
        for a, b in zip(ours**moment, theirs**moment, strict=True):
            assert abs(a.mean() - b.mean()) < 5 * (a.var() / len(a) + b.var() / len(b)) ** 0.5


def test_draws_are_a_function_of_seed_epoch_and_batch():
    def drawn(flip=True, **other):
        draw = draw_idbh(VARIANTS["idbh-weak"], 64, (32, 32), **{**WHERE, **other}, flip=flip)
        return {name: value.tolist() for name, value in vars(draw).items()}

    first = drawn()
    torch.manual_seed(99)
    assert drawn() == first
    for other in ({"seed": 4}, {"epoch": 2}, {"batch": 3}):
        assert all(value != first[name] for name, value in drawn(**other).items())
    still = drawn(flip=False)
    assert not any(still.pop("mirror")) and still == {name: first[name] for name in still}


def test_images_chosen_from_a_set_are_those_of_a_batch_of_them():
    images = torch.from_numpy(some_images(9, (8, 6)))
    indices = torch.tensor([8, 0, 3, 3])
    variant = VARIANTS["idbh-strong"]
    draw = draw_idbh(variant, 4, (8, 6), **WHERE, flip=True)
    expected = apply_idbh(images[indices], draw)
    assert torch.equal(apply_idbh(images, draw, indices), expected)
    threads = torch.get_num_threads()
    x = idbh(images, variant, **WHERE, flip=True, indices=indices)
    assert torch.equal(x, to_float(expected))
    assert x.dtype == torch.float32 and x.is_contiguous(memory_format=torch.channels_last)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("sides", [(1, 1), (1, 9), (2, 3)], ids=str)
def test_the_smallest_images(sides):
    assert_equals_pillow(
        some_images(64, sides), draw_idbh(VARIANTS["idbh-svhn"], 64, sides, **WHERE, flip=True)
    )


def test_other_inputs_are_refused():
    with pytest.raises(ValueError, match=r"expected uint8 \[N, H, W, 3\]"):
        idbh(torch.zeros(1, 4, 4, 3), VARIANTS["idbh-weak"], **WHERE, flip=True)


@pytest.mark.gpu
@pytest.mark.parametrize("sides", SIDES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gpu_gives_the_bytes_of_the_cpu(variant, sides):
    images = torch.from_numpy(some_images(128, sides))
    draw = draw_idbh(VARIANTS[variant], 128, sides, **WHERE, flip=True)
    assert torch.equal(apply_idbh(images.cuda(), draw).cpu(), apply_idbh(images, draw))


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu():
    images = torch.from_numpy(some_images(128, (32, 32)))
    variant, on_gpu = VARIANTS["idbh-strong"], images.cuda()
    idbh(on_gpu, variant, **WHERE, flip=True)
    with no_waiting():
        x = idbh(on_gpu, variant, **WHERE, flip=True)
    assert torch.equal(x.cpu(), idbh(images, variant, **WHERE, flip=True))
