"""FFCV's faults that were reproduced in 1.0.2, each with the guard that answers it.

Files that are cut, altered, half-written or foreign, and writers that fail: test_beton.py.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from itertools import islice

import numpy as np
import pytest
import torch

from cure_fast.loaders import make_loader
from cure_fast.loaders.ffcv_reader import open_epoch, open_reader
from cure_fast.loaders.torch_loader import usable_cores

pytestmark = pytest.mark.usefixtures("ffcv_here")


@pytest.fixture(scope="module")
def shared_reader(written):
    path, _ = written
    return open_reader(path, batch_size=4, threads=1)


@pytest.fixture
def reader(shared_reader):
    """The file's reader; what a test does to its pipeline is undone."""
    code = shared_reader.code
    yield shared_reader
    shared_reader.code = code


@pytest.fixture
def in_order(written):
    _, images = written
    return np.arange(len(images))


def make_ffcv(images, cache, **options):
    defaults = {"batch_size": 4, "device": torch.device("cpu"), "seed": 0, "crop_padding": 2}
    settings = {**defaults, "flip": True, "workers": None, "cache": cache, **options}
    return make_loader("ffcv", images, **settings)


def fail_at(reader, batch: int) -> None:
    """Make the reader's pipeline raise at a batch."""
    (stage, outputs), *rest = reader.code[0]
    calls = iter(range(10**6))

    def failing(**arguments):
        if next(calls) == batch:
            raise ZeroDivisionError("in the pipeline")
        return stage(**arguments)

    reader.code = ([(failing, outputs), *rest], reader.code[1])


@pytest.mark.parametrize("batch", [0, 1, 7, 16])
def test_an_error_in_the_pipeline_is_raised(reader, in_order, batch) -> None:
    """FFCV prints it and waits for ever."""
    fail_at(reader, batch)
    threads = threading.active_count()
    seen = 0
    with (
        pytest.raises(RuntimeError, match="FFCV's pipeline failed: ZeroDivisionError") as caught,
        open_epoch(reader, in_order) as batches,
    ):
        for _ in batches:
            seen += 1
    assert seen == batch
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert threading.active_count() == threads


def test_an_error_nobody_waits_for(reader, in_order) -> None:
    fail_at(reader, 2)
    threads = threading.active_count()
    with open_epoch(reader, in_order) as batches:
        next(batches)
    assert threading.active_count() == threads


def test_leaving_early_leaks_no_thread(reader, in_order) -> None:
    """In FFCV each early break leaves a thread and its buffers behind."""
    threads = threading.active_count()
    for number in range(100):
        taken = number % 19
        with open_epoch(reader, in_order) as batches:
            assert len(list(islice(batches, taken))) == min(taken, 17)
        assert threading.active_count() == threads


def test_kept_batches_are_not_overwritten(make_images, cache) -> None:
    """FFCV's batches are views of five slots; seventeen are kept here."""
    images = make_images(67)
    loader = make_ffcv(images, cache)
    with loader.epoch(0) as batches:
        kept, copies = [], []
        for batch in batches:
            kept.append(batch)
            copies.append((batch.x.clone(), batch.y.clone()))
    assert len(kept) == 17
    for batch, (x_copy, y_copy) in zip(kept, copies, strict=True):
        assert torch.equal(batch.x, x_copy) and torch.equal(batch.y, y_copy)


def test_slots_hold_until_the_next_batch(reader, written, in_order) -> None:
    _, images = written
    number = -1
    with open_epoch(reader, in_order) as batches:
        for number, (pixels, labels) in enumerate(batches):
            threading.Event().wait(0.01)  # the producer fills every slot it may
            part = slice(4 * number, 4 * number + 4)
            assert (pixels == images.images[part]).all()
            assert (labels == images.labels[part]).all()
    assert number == 16


def test_two_epochs_at_a_time(reader, written, in_order) -> None:
    _, images = written
    with open_epoch(reader, in_order) as a, open_epoch(reader, in_order[::-1]) as b:
        pairs = [(x.copy(), y.copy()) for (x, _), (y, _) in zip(a, b, strict=True)]
    assert (np.concatenate([x for x, _ in pairs]) == images.images).all()
    assert (np.concatenate([y for _, y in pairs]) == images.images[::-1]).all()


def test_the_last_batch_is_not_dropped(reader, in_order) -> None:
    """FFCV leaves the last partial batch out unless told otherwise."""
    with open_epoch(reader, in_order) as batches:
        assert [len(labels) for _, labels in batches] == [4] * 16 + [3]


def test_any_order_and_part(reader, written) -> None:
    """FFCV 1.0.2 refuses a traversal order of one's own, and its own cannot start mid-epoch."""
    _, images = written
    order = np.array([66, 0, 0, 5, 3, 66, 1])
    with open_epoch(reader, order) as batches:
        parts = [(x.copy(), y.copy()) for x, y in batches]
    assert (np.concatenate([x for x, _ in parts]) == images.images[order]).all()
    assert (np.concatenate([y for _, y in parts]) == images.labels[order]).all()


@pytest.mark.parametrize("threads", [0, 10_000])
def test_threads_are_clamped_to_the_usable_cores(written, in_order, threads) -> None:
    """FFCV raises for more threads than the process may run on."""
    path, images = written
    reader = open_reader(path, batch_size=32, threads=threads)
    assert reader.num_workers == (usable_cores() if threads else 1)
    with open_epoch(reader, in_order) as batches:
        pixels = np.concatenate([x.copy() for x, _ in batches])
    assert (pixels == images.images).all()


def test_an_epoch_holds_every_image(make_images, cache) -> None:
    """Sixteen batches of four and one of three; nothing is dropped, nothing comes twice."""
    images = make_images(67)
    with make_ffcv(images, cache, workers=64).epoch(1) as batches:
        labels = torch.cat([batch.y for batch in batches])
    assert sorted(labels.tolist()) == sorted(images.labels.tolist())


def test_importing_ffcv_leaves_torch_and_numba_alone() -> None:
    """``import ffcv`` sets torch's number of threads to 1."""
    script = """
import torch
torch.set_num_threads(3)
from cure_fast.loaders.ffcv_reader import ffcv_problem
assert not ffcv_problem()
import sys, numba.typed
assert "ffcv.loader" in sys.modules
assert torch.get_num_threads() == 3, torch.get_num_threads()
assert numba.typed.Dict.__module__.startswith("numba"), numba.typed.Dict
numba.typed.Dict
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_epoch_leaves_torch_threads_alone(make_images, cache) -> None:
    """FFCV sets torch's number to its own in every loader, epoch and producer thread."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        loader = make_ffcv(make_images(67), cache, workers=1)
        assert torch.get_num_threads() == 3
        with loader.epoch(0) as batches:
            next(batches)
            assert torch.get_num_threads() == 3
            seen = []
            other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
            other.start()
            other.join()
        assert torch.get_num_threads() == 3 and seen == [3]
    finally:
        torch.set_num_threads(before)


def test_augmentation_is_seeded(make_images, cache) -> None:
    """FFCV's own gives other pixels in each run, whatever is seeded."""
    images = make_images(67)
    runs = []
    for state in (1, 2):
        np.random.seed(state)
        torch.manual_seed(state)
        with make_ffcv(images, cache).epoch(4) as batches:
            runs.append([batch.x.clone() for batch in batches])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
