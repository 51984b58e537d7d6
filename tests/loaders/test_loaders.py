from __future__ import annotations

import multiprocessing
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from cure_fast.errors import InputError
from cure_fast.loaders import choose, eval_batches, make_loader
from cure_fast.loaders.seeds import epoch_order

CPU = torch.device("cpu")
KINDS = ("ffcv", "resident", "torch")


@pytest.fixture
def make(request, tmp_path):
    """Makes a loader: make(kind, image_set, batch_size=16, ...); FFCV's files are shared."""

    def make_one(kind, image_set, **options):
        cache = request.getfixturevalue("cache") if kind == "ffcv" else tmp_path / "unused"
        defaults = {
            **{"batch_size": 16, "device": CPU, "seed": 3, "crop_padding": 2, "flip": True},
            **{"workers": 2 if kind == "torch" else None, "cache": cache},
        }
        return make_loader(kind, image_set, **{**defaults, **options})

    return make_one


def read(loader, epoch=0, **options):
    with loader.epoch(epoch, **options) as batches:
        return [(x, y) for x, y in batches]


def same(a, b) -> bool:
    return len(a) == len(b) and all(
        x.numpy().tobytes() == v.numpy().tobytes() and x.shape == v.shape and torch.equal(y, w)
        for (x, y), (v, w) in zip(a, b, strict=True)
    )


@pytest.mark.parametrize(
    ("batch_size", "sizes"),
    [(16, [16] * 4 + [3]), (11, [11] * 6), (13, [13] * 5 + [2]), (100, [67])],
)
@pytest.mark.parametrize("kind", KINDS)
def test_every_loader_gives_the_batches_of_the_plain_one(
    make, make_images, kind, batch_size, sizes
) -> None:
    images = make_images(67)
    loader = make(kind, images, batch_size=batch_size)
    plain = make("torch", images, batch_size=batch_size, workers=0)
    assert (loader.num_images, loader.batches_per_epoch) == (sum(sizes), len(sizes))
    for epoch in (0, 7):
        batches = read(loader, epoch)
        assert [len(y) for _, y in batches] == sizes
        assert same(batches, read(plain, epoch))
        for start in {1, len(sizes) - 1, len(sizes)}:
            assert same(read(loader, epoch, start_batch=start), batches[start:])


@pytest.mark.parametrize("kind", KINDS)
def test_batches_hold_the_images_of_the_order(make, make_images, kind) -> None:
    """Without augmentation, against plain indexing; the batches are kept to the end."""
    images = make_images(67)
    loader = make(kind, images, crop_padding=0, flip=False, batch_size=4)
    order = epoch_order(67, seed=3, epoch=5).numpy()
    batches = read(loader, 5)
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    expected = images.images[order].astype(np.float32) / np.float32(255)
    assert (x.permute(0, 2, 3, 1).numpy() == expected).all()
    assert (y.numpy() == images.labels[order]).all()
    for x, y in batches:
        assert x.dtype == torch.float32 and y.dtype == torch.int64
        assert x.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", KINDS)
def test_epochs_and_seeds_differ(make, make_images, kind) -> None:
    images = make_images(67)
    loader = make(kind, images)
    first = read(loader, 0)
    assert same(read(loader, 0), first)
    assert not same(read(loader, 1), first)
    assert not same(read(make(kind, images, seed=4), 0), first)


@pytest.mark.parametrize("kind", KINDS)
def test_batches_may_be_changed(make, make_images, kind) -> None:
    images = make_images(67)
    before = images.checksum()
    loader = make(kind, images)
    first = read(loader)
    copies = [(x.clone(), y.clone()) for x, y in first]
    for x, y in first:
        x.zero_()
        y.zero_()
    assert same(read(loader), copies)
    assert images.checksum() == before


def assert_settled(threads: int) -> None:
    """Processes are gone; the threads that fed them may need a moment more to end."""
    assert not multiprocessing.active_children()
    deadline = time.monotonic() + 60
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == threads


@pytest.mark.parametrize("kind", KINDS)
def test_leaving_early_leaves_nothing_behind(make, make_images, kind) -> None:
    loader = make(kind, make_images(67), batch_size=4)
    threads = threading.active_count()
    for taken in (0, 1, 3):
        kept = []
        with loader.epoch(0) as batches:
            kept += [next(batches) for _ in range(taken)]
        assert_settled(threads)
        with pytest.raises(StopIteration):
            next(batches)
        assert same(kept, read(loader)[:taken])
    with pytest.raises(KeyboardInterrupt), loader.epoch(0) as batches:
        next(batches)
        raise KeyboardInterrupt
    assert_settled(threads)


@pytest.mark.parametrize("kind", ["resident", "torch"])
def test_one_image_left_over_is_said(make, make_images, kind) -> None:
    assert "65 images in batches of 16 leave one over" in make(kind, make_images(65)).reason
    assert "leave one over" not in make(kind, make_images(67)).reason
    assert [len(y) for _, y in read(make(kind, make_images(65)))] == [16] * 4


def test_every_image_comes_once(make, make_images) -> None:
    loader = make("resident", make_images(65))
    order = epoch_order(65, seed=3, epoch=2)
    labels = torch.cat([y for _, y in read(loader, 2)])
    assert labels.tolist() == make_images(65).labels[order[:64]].tolist()
    assert epoch_order(65, seed=3, epoch=2)[64] != epoch_order(65, seed=3, epoch=3)[64]


def test_bad_sets_and_settings(make, make_images) -> None:
    images = make_images(67)
    for size in (0, 1):
        with pytest.raises(InputError, match=f"--batch-size: expected at least 2, got {size}"):
            make("resident", images, batch_size=size)
    with pytest.raises(InputError, match="got none of cat"):
        make("resident", images.subset(np.flatnonzero(images.labels < 2)))
    for start in (-1, 6):
        with pytest.raises(InputError, match=f"start_batch: expected 0 to 5, got {start}"):
            read(make("resident", images), start_batch=start)


def test_one_image_is_not_enough(make) -> None:
    from cure_fast.loaders import ImageSet

    one = ImageSet("one", np.zeros((1, 4, 4, 3), np.uint8), np.zeros(1, np.int64), ("a",), "a test")
    with pytest.raises(InputError, match="at least 2 training images, got 1"):
        make("resident", one)


def test_read_only_images(make, make_images) -> None:
    images, frozen = make_images(67), make_images(67)
    frozen.images.flags.writeable = False
    frozen.labels.flags.writeable = False
    assert same(read(make("resident", frozen)), read(make("resident", images)))


def test_a_worker_that_fails_is_an_error(make, make_images) -> None:
    loader = make("torch", make_images(67), workers=1)
    loader._batches.labels = loader._batches.labels[:10]
    with pytest.raises(IndexError):
        read(loader)
    assert not multiprocessing.active_children()


def absent() -> str:
    return "FFCV is not installed (pip install 'cure-fast[ffcv]')"


def test_auto_takes_ffcv_first(make, make_images, cache) -> None:
    images = make_images(67)
    loader = make("auto", images, cache=cache)
    assert loader.kind == "ffcv" and loader.reason.startswith("ffcv: FFCV 1")
    assert "\n" not in loader.reason


def test_auto_without_ffcv(make, make_images, monkeypatch) -> None:
    monkeypatch.setattr(choose, "ffcv_problem", absent)
    loader = make("auto", make_images(67))
    assert loader.kind == "resident"
    assert loader.reason == (
        "resident: FFCV is not installed (pip install 'cure-fast[ffcv]'); 0 MB on cpu"
    )
    monkeypatch.setattr(choose, "fits_device", lambda image_set, device: False)
    loader = make("auto", make_images(67), workers=0)
    assert loader.kind == "torch" and "more than a quarter of the free memory" in loader.reason
    with pytest.raises(InputError, match="--loader ffcv: FFCV is not installed"):
        make("ffcv", make_images(67), cache=Path("unused"))


def test_unknown_kind(make, make_images) -> None:
    with pytest.raises(InputError, match="--loader: expected one of auto, ffcv, resident, torch"):
        make("gpu", make_images(67))


@pytest.mark.parametrize(("free", "fits"), [(4 * 67 * 192, False), (4 * 67 * 192 + 4, True)])
def test_a_quarter_of_the_free_memory(make_images, monkeypatch, free, fits) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10 * free))
    assert choose.fits_device(make_images(67), torch.device("cuda")) is fits
    assert choose.fits_device(make_images(67), CPU)


@pytest.mark.parametrize("limit", [None, 1, 30, 1000])
def test_eval_batches_are_all_images_in_order(make_images, limit) -> None:
    images = make_images(67)
    batches = list(eval_batches(images, batch_size=16, device=CPU, limit=limit))
    count = min(limit or 67, 67)
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    expected = images.images[:count].astype(np.float32) / np.float32(255)
    assert (x.permute(0, 2, 3, 1).numpy() == expected).all()
    assert (y.numpy() == images.labels[:count]).all()
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x, _ in batches)
    y.zero_()
    assert images.labels.any()


def test_eval_batches_refuse_nothing(make_images) -> None:
    with pytest.raises(InputError, match="--limit: expected at least 1, got 0"):
        next(eval_batches(make_images(), batch_size=4, device=CPU, limit=0))
    with pytest.raises(InputError, match="--eval-batch-size: expected at least 1, got 0"):
        next(eval_batches(make_images(), batch_size=0, device=CPU))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_gpu_batches_are_those_of_the_cpu(make, make_images, kind) -> None:
    images = make_images(67)
    plain = make("torch", images, workers=0, batch_size=4)
    loader = make(kind, images, device=torch.device("cuda"), batch_size=4)
    batches = []
    with loader.epoch(1) as on_gpu:
        for x, y in on_gpu:
            torch.cuda._sleep(10_000_000)  # the GPU falls behind, and slots are written meanwhile
            batches.append((x, y))
    assert all(x.device.type == y.device.type == "cuda" for x, y in batches)
    assert same([(x.cpu(), y.cpu()) for x, y in batches], read(plain, 1))


@pytest.mark.real_data
def test_real_images_through_ffcv(make, cifar10_root) -> None:
    from cure_fast.loaders import read_dataset

    images = read_dataset("cifar10", cifar10_root, "test", download=False).subset(np.arange(2000))
    options = {"batch_size": 128, "crop_padding": 4}
    assert same(read(make("ffcv", images, **options)), read(make("resident", images, **options)))
