"""FFCV's writer dies, and handlers of signals raise while data is prepared."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import FrameType

import numpy as np
import pytest

from cure_fast.errors import InputError
from cure_fast.loaders import (
    ImageSet,
    beton,
    check_beton,
    ensure_beton,
    ffcv_writer,
    read_dataset,
    write_beton,
)
from cure_fast.loaders.beton import manifest_path
from cure_fast.loaders.ffcv_reader import ffcv_problem
from cure_fast.loaders.folder import list_folder
from processes import start
from signalled_group import signal_all

needs_ffcv = pytest.mark.usefixtures("ffcv_here")


@pytest.fixture(scope="module")
def ffcv_here() -> None:
    """Skips the tests that need FFCV where it is absent."""
    if problem := ffcv_problem():
        pytest.skip(problem)


def images_of(count: int, *, seed: int = 0) -> ImageSet:
    rng = np.random.default_rng(seed)
    return ImageSet(
        name="random",
        images=rng.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8),
        labels=(np.arange(count) % 3).astype(np.int64),
        classes=("ape", "bee", "cat"),
        source="a generator",
    )


def files_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.suffix != ".lock")


# A writer that keeps what its file is at each point where it might be killed. It reads nothing
# back, for which FFCV compiles for seconds: that leaves the file as it is.
WRITER = """
import os, shutil
from cure_fast.loaders import ffcv_writer
ffcv_writer.import_ffcv()
from ffcv.writer import DatasetWriter

def keep(point, then):
    def kept(*arguments, **settings):
        if point != "a sample" or arguments[1] == 150:
            shutil.copyfile(OUT, os.path.join(KEPT, point))
        return then(*arguments, **settings)
    return kept

samples = ffcv_writer.Samples
samples.__getitem__ = keep("a sample", samples.__getitem__)
DatasetWriter.finalize = keep("the table", DatasetWriter.finalize)
ffcv_writer.compared = keep("reading back", lambda out, images, labels: [images])
ffcv_writer.print = keep("the answer", print)
ffcv_writer.main([IMAGES, LABELS, OUT])
"""
# One that gets so far, and no further.
KILLED = """
import os, shutil, signal
if POINT != "the start":
    shutil.copyfile(os.path.join(KEPT, POINT), OUT)
os.kill(os.getpid(), signal.SIGKILL)
"""
POINTS = ("the start", "a sample", "the table", "reading back", "the answer")


def command_of(
    text: str, kept: Path, images_file: Path, labels_file: Path, out: Path, point: str = ""
) -> list[str]:
    """Return the command of a writer of this text."""
    names = {"IMAGES": images_file, "LABELS": labels_file, "OUT": out, "KEPT": kept, "POINT": point}
    return [sys.executable, "-c", "".join(f"{k} = {str(v)!r}\n" for k, v in names.items()) + text]


@pytest.fixture(scope="module")
def written(ffcv_here, tmp_path_factory) -> tuple[ImageSet, Path, Path]:
    """Images, the folder of what their file was at each point, and the file that came of it."""
    images, kept = images_of(200), tmp_path_factory.mktemp("kept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(beton, "_command", partial(command_of, WRITER, kept))
        return images, kept, ensure_beton(images, tmp_path_factory.mktemp("good"))


@needs_ffcv
def test_a_writer_killed_at_any_point_leaves_nothing(written, tmp_path, monkeypatch):
    """FFCV's file looks finished from the table on: its readers take 60,000 samples of garbage."""
    images, kept, good = written
    finished = [(kept / point).read_bytes() == good.read_bytes() for point in POINTS[1:]]
    assert finished == [False, False, True, True]
    for point in POINTS:
        monkeypatch.setattr(beton, "_command", partial(command_of, KILLED, kept, point=point))
        path = tmp_path / point / "a.beton"
        with pytest.raises(InputError, match=r"the writer failed \(signal 9"):
            write_beton(images, path)
        assert files_in(path.parent) == [], point


def test_the_writer_ends_with_its_parent():
    """Its standard input ends when the parent lets go of it, in whatever way that happens."""
    held, (told, tell) = os.pipe(), os.pipe()

    def write_for_ever() -> None:
        os.dup2(held[0], 0)
        os.close(held[1])
        ffcv_writer.end_with_the_parent()
        os.write(tell, b"here")
        # Nothing of it is slow enough to be ended.
        time.sleep(600)

    child = multiprocessing.get_context("fork").Process(target=write_for_ever)
    child.start()
    try:
        assert os.read(told, 4) == b"here"
        assert child.exitcode is None
        os.close(held[1])
        child.join(120)
        assert child.exitcode == 1
    finally:
        child.kill()
        child.join()
        for number in (held[0], told, tell):
            os.close(number)


# --- A signal's handler raises while data is prepared.


class Interrupted(BaseException):
    """What a handler of signals raises."""


class Interrupt:
    """Raises at the n-th entry of a Python function, where Python runs handlers of signals.

    Entries of finalisers do not count: Python prints and drops what is raised there.
    """

    def __init__(self, at: int | None) -> None:
        self.at = at
        self.calls = 0

    def __enter__(self) -> Interrupt:
        self.former = sys.gettrace()
        sys.settrace(self.trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.former)

    def trace(self, frame: FrameType, event: str, argument: object) -> None:
        if frame.f_code.co_name == "__del__":
            return
        self.calls += 1
        if self.calls == self.at:
            sys.settrace(None)
            raise Interrupted


def gone(pid: int, within_s: float = 60) -> bool:
    """Return whether a process ends in time; a zombie has ended."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            status = Path(f"/proc/{pid}/stat").read_text()
        except FileNotFoundError:
            return True
        if status.rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.02)
    return False


@needs_ffcv
def test_an_interrupt_while_the_writer_runs_leaves_no_child(tmp_path, monkeypatch):
    pids = tmp_path / "pids"
    pids.mkdir()
    # Like the writer it ends with its standard input.
    script = (
        f"import os, sys\nopen({str(pids)!r} + f'/{{os.getpid()}}', 'w').close()\n"
        "open(OUT, 'wb').write(b'half')\nsys.stdin.buffer.read()"
    )
    monkeypatch.setattr(
        beton,
        "_command",
        lambda a, b, out: [sys.executable, "-S", "-c", f"OUT={str(out)!r}\n{script}"],
    )
    # Where the child is waited for, few functions are entered in each turn.
    monkeypatch.setattr(beton, "POLL_S", 0.01)
    images, path = images_of(20), tmp_path / "cache" / "a.beton"
    reached = 0
    for at in range(1, 2000, 37):
        before = threading.active_count()
        started = time.monotonic()
        with pytest.raises(Interrupted), Interrupt(at):
            write_beton(images, path)
        assert time.monotonic() - started < 60
        if path.parent.exists():
            assert files_in(path.parent) == [], at
        assert threading.active_count() == before
        assert all(gone(int(p.name)) for p in pids.iterdir()), at
        reached = len(list(pids.iterdir()))
        if reached > 8:
            break
    assert reached > 8


@needs_ffcv
def test_an_interrupt_while_the_file_is_put_in_place_is_mended(written, tmp_path, monkeypatch):
    images, _, good = written

    def copy(work: Path, temporary: Path, *_: object) -> str:
        temporary.write_bytes(good.read_bytes())
        return images.checksum()

    monkeypatch.setattr(beton, "_run_child", copy)
    with Interrupt(None) as counted:
        path = ensure_beton(images, tmp_path / "counted")
    assert files_in(path.parent) == [path.name, manifest_path(path).name]
    assert counted.calls > 50
    # The last part, from the checksum of the images on, is the one that leaves something.
    for at in [*range(1, counted.calls, 60), *range(counted.calls - 60, counted.calls + 1, 3)]:
        cache = tmp_path / str(at)
        with suppress(Interrupted), Interrupt(at) as interrupt:
            ensure_beton(images, cache)
        assert interrupt.calls == at or at > counted.calls - 60
        if (cache / "ffcv").exists():
            assert not [n for n in files_in(cache / "ffcv") if n.endswith(".writing")], at
        # Whatever was left is used or written again, without a word.
        check_beton(ensure_beton(images, cache), images)
        assert len(files_in(cache / "ffcv")) == 2


def test_an_interrupt_while_images_are_read_comes_through(photos):
    whole = list_folder(f"folder:{photos}", "train").read()
    # Again, as the first time imports what it needs.
    with Interrupt(None) as counted:
        list_folder(f"folder:{photos}", "train").read()
    open_files = len(os.listdir("/proc/self/fd"))
    for at in range(1, counted.calls, max(1, counted.calls // 60)):
        with pytest.raises(Interrupted), Interrupt(at):
            list_folder(f"folder:{photos}", "train").read()
    assert len(os.listdir("/proc/self/fd")) <= open_files + 1
    again = read_dataset(f"folder:{photos}", photos, "train")
    assert again.checksum() == whole.checksum()


@pytest.mark.parametrize("late", [0, 1])
def test_signals_to_all_processes_of_a_run_leave_the_loaders_workers(tmp_path, late):
    """Terminals and schedulers signal all of them; the step under way still needs its images."""
    running = start([], tmp_path, prepare=partial(signal_all, late))
    assert running.wait() == 0, running.output()
    assert running.stdout().split() == ["900", "True"]
    assert running.stderr() == ""
