from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cure_fast.loaders import augment
from cure_fast.loaders.augment import CropFlip, apply_crop_flip, crop_flip, draw_crop_flip, to_float
from cure_fast.loaders.seeds import derive_seed, epoch_order


def mirrored(place: int, size: int) -> int:
    """Return the pixel of a row that one beyond its ends shows: 2 1 | 0 1 2 | 1 0 for three."""
    if place < 0:
        return -place
    return place if place < size else 2 * (size - 1) - place


def reference(images: np.ndarray, draw: CropFlip) -> np.ndarray:
    """Return float32 [N, 3, H, W], one image and one row at a time."""
    out = []
    p = draw.padding
    for image, top, left, mirror in zip(images, draw.top, draw.left, draw.mirror, strict=True):
        height, width, _ = image.shape
        rows = []
        for i in range(height):
            row = []
            for j in range(width):
                y, x = i + int(top) - p, j + int(left) - p
                if draw.reflect:
                    y, x = mirrored(y, height), mirrored(x, width)
                inside = 0 <= y < height and 0 <= x < width
                row.append(image[y, x] if inside else np.zeros(3, np.uint8))
            rows.append(row[::-1] if mirror else row)
        out.append(np.array(rows).astype(np.float32) / np.float32(255))
    return np.stack(out).transpose(0, 3, 1, 2)


def through_torch(images: torch.Tensor, draw: CropFlip) -> torch.Tensor:
    """The path that GPUs take, on the CPU."""
    return augment._on_gpu(images, None, draw)


def scaled_through_torch(images: torch.Tensor) -> torch.Tensor:
    return augment._on_gpu(images, None, None)


@given(
    count=st.integers(1, 5),
    size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    padding=st.integers(0, 9),
    flip=st.booleans(),
    reflect=st.booleans(),
    seed=st.integers(0, 2**63 - 1),
)
def test_equals_the_plain_version(count, size, padding, flip, reflect, seed) -> None:
    padding = min(padding, *(side - 1 for side in size)) if reflect else padding
    images = np.random.default_rng(seed).integers(0, 256, (count, *size, 3), dtype=np.uint8)
    before = images.copy()
    where = {"seed": seed, "epoch": 2, "batch": 3}
    how = {"crop_padding": padding, "flip": flip}
    draw = draw_crop_flip(count, **where, **how, reflect=reflect)
    zero = draw_crop_flip(count, **where, **how)
    assert all(torch.equal(getattr(draw, k), getattr(zero, k)) for k in ("top", "left", "mirror"))
    expected = reference(images, draw)
    for function in (apply_crop_flip, through_torch):
        got = function(torch.from_numpy(images), draw)
        assert got.dtype == torch.float32
        assert got.is_contiguous(memory_format=torch.channels_last)
        assert got.numpy().tobytes() == expected.tobytes()
    assert (images == before).all()


def test_every_position_and_mirror() -> None:
    image = np.arange(1, 13, dtype=np.uint8).reshape(1, 2, 2, 3)
    cases = list(itertools.product(range(5), range(5), (False, True)))
    draw = CropFlip(
        2,
        torch.tensor([c[0] for c in cases]),
        torch.tensor([c[1] for c in cases]),
        torch.tensor([c[2] for c in cases]),
    )
    images = np.repeat(image, len(cases), axis=0)
    assert (
        apply_crop_flip(torch.from_numpy(images), draw).numpy() == reference(images, draw)
    ).all()


@pytest.mark.parametrize("scale", [to_float, scaled_through_torch])
def test_all_values_are_rounded_correctly(scale) -> None:
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).repeat(1, 1, 1, 3)
    expected = (np.arange(256, dtype=np.float64) / 255).astype(np.float32)
    x = scale(images)
    assert x.shape == (1, 3, 16, 16) and x.is_contiguous(memory_format=torch.channels_last)
    assert (x[0, 1].flatten().numpy() == expected).all()
    assert x.max() == 1


def test_images_chosen_from_a_set_are_those_of_a_batch_of_them() -> None:
    images = torch.randint(0, 256, (9, 5, 4, 3), dtype=torch.uint8)
    indices = torch.tensor([8, 0, 3, 3])
    draw = draw_crop_flip(4, seed=1, epoch=0, batch=0, crop_padding=2, flip=True)
    expected = apply_crop_flip(images[indices], draw)
    assert torch.equal(apply_crop_flip(images, draw, indices), expected)
    assert torch.equal(augment._on_gpu(images, indices, draw), expected)
    assert torch.equal(to_float(images, indices), to_float(images[indices]))
    options = {"seed": 1, "epoch": 0, "batch": 0, "crop_padding": 2, "flip": True}
    assert torch.equal(crop_flip(images, indices=indices, **options), expected)


def test_no_augmentation_is_to_float() -> None:
    images = torch.randint(0, 256, (5, 4, 4, 3), dtype=torch.uint8)
    x = crop_flip(images, seed=0, epoch=0, batch=0, crop_padding=0, flip=False)
    assert (x == to_float(images)).all()


def test_result_is_a_copy() -> None:
    images = torch.full((2, 4, 4, 3), 255, dtype=torch.uint8)
    x = to_float(images)
    images.zero_()
    assert (x == 1).all()


def test_draws_are_a_function_of_seed_epoch_and_batch() -> None:
    def drawn(seed=1, epoch=2, batch=3, flip=True):
        draw = draw_crop_flip(64, seed=seed, epoch=epoch, batch=batch, crop_padding=4, flip=flip)
        return [t.tolist() for t in (draw.top, draw.left, draw.mirror)]

    first = drawn()
    torch.manual_seed(99)
    assert drawn() == first
    others = [drawn(seed=2), drawn(epoch=3), drawn(batch=4), drawn(epoch=3, batch=2)]
    assert all(other[0] != first[0] and other[2] != first[2] for other in others)
    assert drawn(flip=False)[:2] == first[:2] and not any(drawn(flip=False)[2])


def test_draws_are_uniform() -> None:
    draws = [
        draw_crop_flip(128, seed=0, epoch=e, batch=b, crop_padding=4, flip=True)
        for e in range(20)
        for b in range(20)
    ]
    count = 128 * 400
    for name in ("top", "left"):
        values = torch.cat([getattr(draw, name) for draw in draws])
        frequencies = torch.bincount(values, minlength=9) / count
        assert len(frequencies) == 9
        # Six standard deviations of a share of 1/9.
        assert (frequencies - 1 / 9).abs().max() < 6 * (8 / 81 / count) ** 0.5
    mirrored = torch.cat([draw.mirror for draw in draws]).float().mean()
    assert abs(mirrored - 0.5) < 6 * 0.5 / count**0.5


@pytest.mark.parametrize(
    "images",
    [torch.zeros(1, 4, 4, 3), torch.zeros(1, 3, 4, 4, dtype=torch.uint8)],
)
def test_other_inputs_are_refused(images) -> None:
    with pytest.raises(ValueError, match=r"expected uint8 \[N, H, W, 3\]"):
        to_float(images)
    with pytest.raises(ValueError, match=r"expected uint8 \[N, H, W, 3\]"):
        crop_flip(images, seed=0, epoch=0, batch=0, crop_padding=4, flip=True)


def test_seed_mixing_is_splitmix64() -> None:
    # First output of SplitMix64 with state 0, as published with xoshiro's reference code.
    assert derive_seed(0) == 0xE220A8397B1DCDAF >> 1


@given(st.lists(st.integers(0, 2**64 - 1), min_size=2, max_size=4))
def test_seeds_are_in_range_and_depend_on_the_order(parts) -> None:
    seed = derive_seed(*parts)
    assert 0 <= seed < 2**63
    if parts != parts[::-1]:
        assert derive_seed(*parts[::-1]) != seed


def test_seeds_do_not_collide() -> None:
    seeds = {derive_seed(s, e, b) for s in range(10) for e in range(50) for b in range(100)}
    assert len(seeds) == 50_000


def test_order_is_a_permutation_of_seed_and_epoch() -> None:
    orders = [epoch_order(101, seed=s, epoch=e).tolist() for s in range(3) for e in range(3)]
    assert all(sorted(order) == list(range(101)) for order in orders)
    assert len(set(map(tuple, orders))) == 9
    assert epoch_order(101, seed=1, epoch=2).tolist() == orders[5]


@pytest.mark.gpu
def test_gpu_gives_the_bytes_of_the_cpu() -> None:
    images = torch.randint(0, 256, (37, 32, 32, 3), dtype=torch.uint8)
    options = {"seed": 5, "epoch": 6, "batch": 7}
    for padding, flip in ((4, True), (0, True), (4, False), (0, False)):
        x = crop_flip(images, **options, crop_padding=padding, flip=flip)
        on_gpu = crop_flip(images.cuda(), **options, crop_padding=padding, flip=flip)
        assert on_gpu.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(on_gpu.cpu(), x)
