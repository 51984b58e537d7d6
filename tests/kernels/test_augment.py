"""Crop and mirror image: kernel, reference, the loaders' augmentation and NumPy agree in bits."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cure_fast.kernels.augment import augment_crop_flip, augment_crop_flip_ref
from cure_fast.kernels.device import augment as device
from cure_fast.loaders.augment import CropFlip, apply_crop_flip, draw_crop_flip, to_float

BOTH = ["triton", "reference"]
# The fixtures only set an environment variable, which every example needs alike.
PER_TEST = settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])


def data_set(count=7, height=6, width=5, depth=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(
        0, 256, (count, height, width, depth), generator=generator, dtype=torch.uint8
    )


def corners(count, padding, seed=0):
    draw = draw_crop_flip(count, seed=seed, epoch=0, batch=0, crop_padding=padding, flip=True)
    return {"top": draw.top, "left": draw.left, "mirror": draw.mirror}


NOTHING = {"top": None, "left": None, "mirror": None}


def in_numpy(images, indices, *, top, left, mirror, padding, reflect, channels):
    """Pad, crop and mirror one image after the other; float64 in [0, 1]."""
    out = []
    for i, index in enumerate(indices.tolist()):
        image = images[min(max(index, 0), len(images) - 1)].numpy()
        height, width, depth = image.shape
        if top is not None:
            y, x = int(top[i]), int(left[i])
            wide = ((padding, padding), (padding, padding), (0, 0))
            padded = np.pad(image, wide, mode="reflect" if reflect else "constant")
            image = padded[y : y + height, x : x + width]
            image = image[:, ::-1] if mirror[i] else image
        out.append(np.pad(image, ((0, 0), (0, 0), (0, channels - depth))) / 255)
    return np.stack(out).transpose(0, 3, 1, 2)


@pytest.mark.parametrize("kernels", BOTH)
@PER_TEST
@given(
    size=st.tuples(*[st.integers(1, 9)] * 2, st.integers(1, 4)),
    padding=st.integers(0, 5),
    extra=st.integers(0, 5),
    indices=st.lists(st.integers(-3, 9), min_size=1, max_size=4),
    moved=st.booleans(),
    reflect=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_it_is_numpys(monkeypatch, kernels, size, padding, extra, indices, moved, reflect, seed):
    """Any size, also indices outside the data set, which are clamped."""
    monkeypatch.setenv("CURE_FAST_KERNELS", kernels)
    images, indices = data_set(5, *size, seed=seed), torch.tensor(indices)
    padding = min(padding, *(side - 1 for side in size[:2])) if reflect else padding
    options = corners(len(indices), padding, seed) if moved else NOTHING
    options = options | {"padding": padding, "reflect": reflect, "channels": size[2] + extra}
    found = augment_crop_flip(images, indices, **options)
    assert found.is_contiguous(memory_format=torch.channels_last)
    # p / 255 in float64, rounded to float32, is the nearest float32 for each of the 256 values.
    assert np.array_equal(found.numpy(), in_numpy(images, indices, **options).astype(np.float32))


@pytest.mark.parametrize("kernels", BOTH)
@pytest.mark.parametrize("padding", [0, 4])
def test_it_is_the_loaders_augmentation(monkeypatch, kernels, padding):
    monkeypatch.setenv("CURE_FAST_KERNELS", kernels)
    # 32 * 32 * 3 elements are three whole chunks, 20 * 20 * 3 one and a part.
    for side in (32, 20):
        images, indices = data_set(6, side, side), torch.tensor([5, 0, 3, 3])
        drawn = corners(4, padding, seed=side)
        expected = apply_crop_flip(images[indices], CropFlip(padding, **drawn))
        found = augment_crop_flip(images, indices, **drawn, padding=padding)
        assert found.dtype == expected.dtype == torch.float32
        assert found.stride() == expected.stride()
        assert torch.equal(found, expected)


@pytest.mark.parametrize("kernels", BOTH)
def test_without_augmentation_it_scales_every_value_as_the_loaders_do(monkeypatch, kernels):
    monkeypatch.setenv("CURE_FAST_KERNELS", kernels)
    images = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 16, 16, 3)
    found = augment_crop_flip(images, torch.tensor([0]), **NOTHING)
    assert torch.equal(found, to_float(images))
    assert found.max() == 1 and found.min() == 0


@pytest.mark.parametrize("kernels", BOTH)
@pytest.mark.parametrize("corner", [-(2**40), -9, 2**32 + 4, 2**62])
def test_a_crop_outside_the_padded_image_is_zero(monkeypatch, kernels, corner):
    """Nothing is read outside the data set, whatever the corners hold."""
    monkeypatch.setenv("CURE_FAST_KERNELS", kernels)
    images = data_set().clamp(min=1)
    good = {"top": torch.tensor([4]), "left": torch.tensor([4]), "mirror": torch.tensor([True])}
    for name in ("top", "left"):
        found = augment_crop_flip(
            images, torch.tensor([1]), **good | {name: torch.tensor([corner])}
        )
        assert not found.any()
        moved = good | {name: torch.tensor([corner])}
        found = augment_crop_flip(images, torch.tensor([1]), **moved, reflect=True)
        assert set(found.unique().tolist()) <= set(to_float(images[[1]]).unique().tolist())
    assert augment_crop_flip(images, torch.tensor([1]), **good).all()


@pytest.mark.parametrize("index", [-(2**63), -1, 7, 2**32, 2**63 - 1])
@pytest.mark.parametrize("kernels", BOTH)
def test_indices_outside_the_data_set_are_clamped(monkeypatch, kernels, index):
    monkeypatch.setenv("CURE_FAST_KERNELS", kernels)
    images = data_set(7)
    found = augment_crop_flip(images, torch.tensor([index]), **NOTHING)
    assert torch.equal(found, to_float(images[[0 if index < 0 else 6]]))


def test_half_precision_is_rounded_once(triton_kernels):
    images, indices = data_set(), torch.arange(7)
    drawn = corners(7, 4)
    exact = augment_crop_flip(images, indices, **drawn)
    half = augment_crop_flip(images, indices, **drawn, out_dtype=torch.float16)
    assert torch.equal(half, exact.half())
    brain = augment_crop_flip(images, indices, **drawn, out_dtype=torch.bfloat16)
    # Triton's interpreter cuts the lower half off; a GPU rounds to nearest.
    cut = (exact.view(torch.int32) & -65536).view(torch.float32)
    nearest = exact.bfloat16().float()
    assert torch.equal(brain.float(), nearest if torch.cuda.is_available() else cut)
    rounded = augment_crop_flip_ref(images, indices, **drawn, out_dtype=torch.bfloat16)
    assert torch.equal(rounded, exact.bfloat16())


@pytest.mark.parametrize("kernels", BOTH)
def test_tensors_with_gaps_and_empty_batches(monkeypatch, kernels):
    monkeypatch.setenv("CURE_FAST_KERNELS", kernels)
    images, indices = data_set(), torch.tensor([2, 6, 4])
    drawn = corners(3, 4)
    every_other = {name: tensor.repeat_interleave(2)[::2] for name, tensor in drawn.items()}
    found = augment_crop_flip(images, indices.repeat_interleave(2)[::2], **every_other)
    assert torch.equal(found, augment_crop_flip(images, indices, **drawn))
    empty = {name: tensor[:0] for name, tensor in drawn.items()}
    assert augment_crop_flip(images, indices[:0], **empty, channels=4).shape == (0, 4, 6, 5)


IMAGES = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
ZEROS = torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"images": IMAGES.float()}, TypeError, "images: expected uint8, got torch.float32"),
        ({"images": [1]}, TypeError, "images: expected a tensor"),
        ({"images": IMAGES[0]}, ValueError, r"images: expected shape \[M, H, W, C\]"),
        ({"images": IMAGES[:0]}, ValueError, "images: .*none of them 0"),
        ({"images": IMAGES.permute(0, 3, 1, 2)}, ValueError, "images: expected contiguous"),
        (
            {"images": torch.zeros(2, 3, 32, 32, dtype=torch.uint8)},
            ValueError,
            r"images: .* with 1 to 4 channels, got \[2, 3, 32, 32\].*permute\(0, 2, 3, 1\)",
        ),
        ({"indices": ZEROS.int()}, TypeError, "indices: expected torch.int64"),
        ({"indices": [0, 1]}, TypeError, "indices: expected a tensor"),
        ({"indices": ZEROS[None]}, ValueError, r"indices: expected shape \[N\]"),
        ({"indices": ZEROS.to("meta")}, ValueError, "indices: expected cpu.*got meta"),
        ({"indices": ZEROS[:1]}, ValueError, "top: expected 1 values, one per index, got 2"),
        ({"top": ZEROS.float()}, TypeError, "top: expected torch.int64"),
        ({"left": ZEROS.to("meta")}, ValueError, "left: expected cpu"),
        ({"left": ZEROS[0]}, ValueError, r"left: expected shape \[N\]"),
        ({"mirror": ZEROS}, TypeError, "mirror: expected torch.bool"),
        ({"mirror": None}, ValueError, "mirror: expected a tensor, or None for top, left"),
        ({"padding": -1}, ValueError, "padding"),
        ({"padding": 1.5}, TypeError, "padding: expected an int"),
        ({"padding": True}, TypeError, "padding: expected an int, got bool"),
        ({"padding": 2**20 + 1}, ValueError, r"padding: .*\[0, 1048576\], got 1048577"),
        ({"padding": 4, "reflect": True}, ValueError, "padding: .*sides with reflect, got 4"),
        ({"channels": 2}, ValueError, r"channels: .*\[3, "),
        ({"channels": 3.5}, TypeError, "channels: expected an int"),
        ({"out_dtype": torch.float64}, ValueError, "out_dtype: .*float64"),
    ],
)
def test_bad_arguments_are_refused(changes, error, message):
    good = {"top": ZEROS, "left": ZEROS, "mirror": ZEROS.bool()}
    arguments = {"images": IMAGES, "indices": ZEROS} | good | changes
    with pytest.raises(error, match=message):
        augment_crop_flip(**arguments)


def test_launcher_reference_and_operation_have_one_signature():
    signatures = {
        inspect.signature(function)
        for function in (augment_crop_flip, augment_crop_flip_ref, device.augment_crop_flip)
    }
    assert len(signatures) == 1
