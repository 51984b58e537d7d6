"""FFCV's writer dies, and handlers of signals raise while data is prepared."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import FrameType

import numpy as np
import pytest

from cure_fast.errors import InputError
from cure_fast.loaders import ImageSet, beton, check_beton, ensure_beton, read_dataset, write_beton
from cure_fast.loaders.beton import manifest_path
from cure_fast.loaders.ffcv_reader import ffcv_problem
from cure_fast.loaders.folder import list_folder

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


WRITER = """
import os, signal
if POINT == "the start":
    os.kill(os.getpid(), signal.SIGKILL)
from cure_fast.loaders import ffcv_writer

class Killing(ffcv_writer.Samples):
    def __getitem__(self, index):
        if POINT == "a sample" and index == 150:
            die()
        return super().__getitem__(index)

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

ffcv_writer.Samples = Killing
if POINT == "the table":
    from ffcv.writer import DatasetWriter
    DatasetWriter.finalize = die
if POINT == "reading back":
    ffcv_writer.open_reader = die
if POINT == "the answer":
    ffcv_writer.print = die
ffcv_writer.main([IMAGES, LABELS, OUT])
"""
POINTS = ("the start", "a sample", "the table", "reading back", "the answer")


@needs_ffcv
def test_a_writer_killed_at_any_point_leaves_nothing(tmp_path, monkeypatch):
    """FFCV's file looks finished from the table on: its readers take 60,000 samples of garbage."""
    images = images_of(200)
    seen: dict[str, bool] = {}

    def command(images_file: Path, labels_file: Path, out: Path) -> list[str]:
        point = out.parent.parent.name
        names = {"POINT": point, "IMAGES": images_file, "LABELS": labels_file, "OUT": out}
        text = "".join(f"{name} = {str(value)!r}\n" for name, value in names.items())
        return [sys.executable, "-c", text + WRITER]

    def write(point: str) -> str:
        path = tmp_path / point / "a.beton"
        with pytest.raises(InputError) as caught:
            write_beton(images, path)
        seen[point] = not files_in(path.parent)
        return str(caught.value)

    monkeypatch.setattr(beton, "_command", command)
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(write, POINTS))
    assert all("the writer failed (signal 9" in answer for answer in answers), answers
    assert seen == dict.fromkeys(POINTS, True)


@needs_ffcv
def test_the_writer_ends_with_its_parent(tmp_path):
    """Its standard input ends when the parent lets go of it, in whatever way that happens."""
    np.save(tmp_path / "images.npy", images_of(20).images)
    np.save(tmp_path / "labels.npy", images_of(20).labels)
    command = beton._command(*(tmp_path / n for n in ("images.npy", "labels.npy", "a.beton")))
    assert command[1] == "-m"
    # Nothing of it is slow enough to be ended: its start waits.
    script = f"import time\nfrom {command[2]} import end_with_the_parent\nend_with_the_parent()\n"
    child = subprocess.Popen(
        [sys.executable, "-c", script + "print('here', flush=True)\ntime.sleep(600)"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert child.stdin and child.stdout
    try:
        assert child.stdout.readline() == b"here\n"
        assert child.poll() is None
        child.stdin.close()
        assert child.wait(120) == 1
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


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
def test_an_interrupt_while_the_file_is_put_in_place_is_mended(tmp_path, monkeypatch):
    images = images_of(20)
    good = ensure_beton(images, tmp_path / "good")

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


GROUP = """
import os, signal, sys, time
sys.path[:0] = {path!r}
import numpy as np, torch
from cure_fast.loaders import ImageSet, make_loader, torch_loader
from cure_fast.signals import SIGNALS

take_signals = torch_loader._leave_signals_to_the_parent

def take_signals_late(worker):
    time.sleep({late} * worker)
    take_signals(worker)

torch_loader._leave_signals_to_the_parent = take_signals_late
came = []
for number in SIGNALS:
    signal.signal(number, lambda number, frame: came.append(number))
rng = np.random.default_rng(0)
images = rng.integers(0, 256, (900, 8, 8, 3), dtype=np.uint8)
labels = np.arange(900) % 3
images = ImageSet("random", images, labels.astype(np.int64), ("a", "b", "c"), "a generator")
loader = make_loader(
    "torch", images, batch_size=10, device=torch.device("cpu"), seed=0, crop_padding=0,
    flip=False, workers=2, cache=None,
)
os.setpgid(0, 0)
count = 0
with loader.epoch(0) as batches:
    for batch in batches:
        count += len(batch)
        if count == 10:
            for number in SIGNALS:
                os.killpg(0, number)
print(count, sorted(set(came)) == sorted(SIGNALS))
"""


@pytest.mark.parametrize("late", [0, 1])
def test_signals_to_all_processes_of_a_run_leave_the_loaders_workers(late):
    """Terminals and schedulers signal all of them; the step under way still needs its images."""
    script = GROUP.format(path=sys.path, late=late)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["900", "True"]
    assert done.stderr == ""
