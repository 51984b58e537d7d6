from __future__ import annotations

import copy
import itertools
import multiprocessing
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from cure_fast.batch import Batch
from cure_fast.errors import InputError
from cure_fast.loaders import choose, make_loader
from cure_fast.loaders.base import AUGMENTATIONS
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
        return list(batches)


def same(a, b) -> bool:
    return len(a) == len(b) and all(
        one.x.numpy().tobytes() == other.x.numpy().tobytes()
        and one.x.shape == other.x.shape
        and torch.equal(one.y, other.y)
        and torch.equal(one.index, other.index)
        for one, other in zip(a, b, strict=True)
    )


SIZES = [(16, [16] * 4 + [3]), (11, [11] * 6), (13, [13] * 5 + [2]), (100, [67])]


@pytest.mark.parametrize(
    ("kind", "batch_size", "sizes"),
    [("resident", *each) for each in SIZES]
    + [(k, *s) for k in ("ffcv", "torch") for s in SIZES[:2]],
)
def test_every_loader_gives_the_batches_of_the_plain_one(
    make, make_images, kind, batch_size, sizes
) -> None:
    images = make_images(67)
    loader = make(kind, images, batch_size=batch_size)
    plain = make("torch", images, batch_size=batch_size, workers=0)
    assert (loader.num_images, loader.batches_per_epoch) == (sum(sizes), len(sizes))
    for epoch in (0, 7):
        batches = read(loader, epoch)
        assert [len(batch) for batch in batches] == sizes
        assert same(batches, read(plain, epoch))
        for start in {1, len(sizes) - 1, len(sizes)}:
            assert same(read(loader, epoch, start_batch=start), batches[start:])


@pytest.mark.parametrize("kind", KINDS)
def test_every_loader_mirrors_the_border_alike(make, make_images, kind) -> None:
    images = make_images(67)
    batches = read(make(kind, images, reflect=True))
    assert same(batches, read(make("torch", images, workers=0, reflect=True)))
    assert not same(batches, read(make(kind, images)))


@pytest.mark.parametrize("kind", KINDS)
def test_every_loader_augments_alike(make, make_images, kind) -> None:
    images = make_images(67)
    loader = make(kind, images, augment="idbh-strong")
    for epoch in (0, 7):
        batches = read(loader, epoch)
        assert same(batches, read(make("torch", images, workers=0, augment="idbh-strong"), epoch))
        assert same(read(loader, epoch, start_batch=2), batches[2:])


def test_each_augmentation_is_its_own(make, make_images) -> None:
    images = make_images(67)
    options = [{"augment": augment} for augment in AUGMENTATIONS]
    options += [{"augment": "idbh-strong", "flip": False}]
    batches = [read(make("resident", images, **each)) for each in options]
    for one, other in itertools.combinations(batches, 2):
        assert not same(one, other)
    bare = read(make("resident", images, augment="idbh-strong", crop_padding=0))
    assert same(bare, batches[AUGMENTATIONS.index("idbh-strong")])


def test_a_border_wider_than_the_image_cannot_be_mirrored(make, make_images) -> None:
    images = make_images(20)
    side = images.images.shape[1]
    assert make("resident", images, reflect=True, crop_padding=side - 1).num_images == 20
    with pytest.raises(InputError, match=r"--crop-padding.*--crop-mode reflect"):
        make("resident", images, reflect=True, crop_padding=side)
    # What has a crop of its own has no border.
    make("resident", images, reflect=True, crop_padding=side, augment="idbh-weak")


@pytest.mark.parametrize("kind", KINDS)
def test_batches_hold_the_images_of_the_order(make, make_images, kind) -> None:
    """Without augmentation, against plain indexing; the batches are kept to the end."""
    images = make_images(67)
    loader = make(kind, images, crop_padding=0, flip=False, batch_size=4)
    order = epoch_order(67, seed=3, epoch=5).numpy()
    batches = read(loader, 5)
    x, y, index = (torch.cat([getattr(b, name) for b in batches]) for name in ("x", "y", "index"))
    expected = images.images[order].astype(np.float32) / np.float32(255)
    assert (x.permute(0, 2, 3, 1).numpy() == expected).all()
    assert (y.numpy() == images.labels[order]).all()
    assert (index.numpy() == order).all() and loader.set_size == 67
    assert loader.image_shape == batches[0].x.shape[1:]
    for batch in batches:
        assert batch.x.dtype == torch.float32 and batch.y.dtype == batch.index.dtype == torch.int64
        assert batch.x.is_contiguous(memory_format=torch.channels_last)
        assert batch.x_adv is batch.x and not batch.notes


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
    copies = copy.deepcopy(first)
    for batch in first:
        for tensor in (batch.x, batch.y, batch.index):
            tensor.zero_()
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
    loader = make(kind, make_images(65))
    assert [len(batch) for batch in read(loader)] == [16] * 4
    # The one left over has a place all the same: it is another one in each epoch.
    assert (loader.set_size, loader.num_images) == (65, 64)


def test_every_image_comes_once(make, make_images) -> None:
    loader = make("resident", make_images(65))
    order = epoch_order(65, seed=3, epoch=2)
    labels = torch.cat([batch.y for batch in read(loader, 2)])
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


@pytest.mark.parametrize("count", [1, -1])
def test_images_without_a_place_are_an_error(make, make_images, monkeypatch, count) -> None:
    """A feed that gives other batches than those asked for would give images wrong places."""
    loader = make("resident", make_images(67))
    real = loader._read

    def other(batches):
        return real(batches * 2 if count > 0 else batches[:count])

    monkeypatch.setattr(loader, "_read", other)
    with pytest.raises(ValueError, match=r"is (longer|shorter) than"):
        read(loader)


def test_a_worker_that_fails_is_an_error(make, make_images) -> None:
    loader = make("torch", make_images(67), workers=1)
    loader._batches.labels = loader._batches.labels[:10]
    with pytest.raises(IndexError):
        read(loader)
    assert not multiprocessing.active_children()


def absent() -> str:
    return "FFCV is not installed (pip install 'cure-fast[ffcv]')"


def test_auto_takes_ffcv_where_there_are_many_images(make, make_images, cache, monkeypatch) -> None:
    images = make_images(67)
    few = make("auto", images)
    assert few.kind == "resident" and few.reason.startswith("resident: so few images")
    monkeypatch.setattr(choose, "FEW_BYTES", images.images.nbytes)
    loader = make("auto", images, cache=cache)
    assert loader.kind == "ffcv" and loader.reason.startswith("ffcv: FFCV 1")
    assert "\n" not in loader.reason


def test_auto_without_ffcv(make, make_images, monkeypatch) -> None:
    monkeypatch.setattr(choose, "ffcv_problem", absent)
    monkeypatch.setattr(choose, "FEW_BYTES", 0)
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
    with pytest.raises(InputError, match="--augment: expected one of crop-flip, idbh-weak"):
        make("resident", make_images(67), augment="idbh")


@pytest.mark.parametrize(("free", "fits"), [(4 * 67 * 192, False), (4 * 67 * 192 + 4, True)])
def test_a_quarter_of_the_free_memory(make_images, monkeypatch, free, fits) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10 * free))
    assert choose.fits_device(make_images(67), torch.device("cuda")) is fits
    assert choose.fits_device(make_images(67), CPU)


@pytest.mark.gpu
@pytest.mark.parametrize("augment", ["crop-flip", "idbh-strong"])
@pytest.mark.parametrize("kind", KINDS)
def test_gpu_batches_are_those_of_the_cpu(make, make_images, kind, augment) -> None:
    images = make_images(67)
    plain = make("torch", images, workers=0, batch_size=4, augment=augment)
    loader = make(kind, images, device=torch.device("cuda"), batch_size=4, augment=augment)
    batches = []
    with loader.epoch(1) as on_gpu:
        for batch in on_gpu:
            torch.cuda._sleep(10_000_000)  # the GPU falls behind, and slots are written meanwhile
            batches.append(batch)
    assert {t.device.type for b in batches for t in (b.x, b.y, b.index)} == {"cuda"}
    copies = [Batch(b.x.cpu(), b.y.cpu(), b.index.cpu()) for b in batches]
    assert same(copies, read(plain, 1))


@pytest.mark.real_data
def test_real_images_through_ffcv(make, cifar10_root) -> None:
    from cure_fast.loaders import read_dataset

    images = read_dataset("cifar10", cifar10_root, "test", download=False).subset(np.arange(150))
    options = {"batch_size": 64, "crop_padding": 4}
    assert same(read(make("ffcv", images, **options)), read(make("resident", images, **options)))
