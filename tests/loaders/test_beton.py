"""Writing .beton files, and refusing those that are not what their manifest says."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cure_fast.errors import InputError
from cure_fast.loaders import beton, check_beton, ensure_beton, write_beton
from cure_fast.loaders.beton import manifest_path
from cure_fast.loaders.ffcv_writer import Samples, main, read_samples, write_samples

pytestmark = pytest.mark.usefixtures("ffcv_here")


def read_all(path):
    parts = [(images.copy(), labels.copy()) for images, labels in read_samples(path)]
    return tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))


@pytest.fixture
def copied(written, tmp_path):
    """A copy of a good file that the test may damage, with its images."""
    path, images = written
    for file in (path, manifest_path(path)):
        shutil.copy(file, tmp_path / file.name)
    return tmp_path / path.name, images


@pytest.fixture
def child(monkeypatch):
    """Puts a Python script in the writer's place: child(script); OUT is the file to write."""

    def replace_command(script: str) -> None:
        def command(images: Path, labels: Path, out: Path) -> list[str]:
            return [sys.executable, "-c", f"OUT = {str(out)!r}\n{script}"]

        monkeypatch.setattr(beton, "_command", command)

    return replace_command


def left_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.suffix != ".lock")


def test_written_file_and_manifest(make_images, tmp_path) -> None:
    """By the child itself; the other tests here find their file written in this process."""
    images = make_images()
    path = ensure_beton(images, tmp_path)
    manifest = json.loads(manifest_path(path).read_text())
    assert manifest["count"] == 67 and manifest["classes"] == ["ape", "bee", "cat"]
    assert manifest["image_size"] == 8 and manifest["source"] == "a generator"
    assert manifest["content_sha256"] == images.checksum()
    assert manifest["ffcv"] == "1.0.2"
    assert {path.name, f"{path.name}.json"} <= set(left_in(path.parent))
    assert not [name for name in left_in(path.parent) if name.endswith(".writing")]
    check_beton(path, images)
    pixels, labels = read_all(path)
    assert (pixels == images.images).all() and (labels == images.labels).all()


def test_ensure_writes_once(written, cache) -> None:
    path, images = written
    modified = path.stat().st_mtime_ns
    assert path.parent == cache / "ffcv" and images.checksum()[:16] in path.name
    assert ensure_beton(images, cache) == path
    assert path.stat().st_mtime_ns == modified


@pytest.mark.parametrize(("count", "size"), [(1, 1), (101, 33)])
def test_same_samples_same_bytes(make_images, tmp_path, count, size) -> None:
    """Odd sizes, FFCV's chunks of 100 samples, and no dependence on the run."""
    images = make_images(count, size)
    for name in ("a", "b"):
        write_samples(Samples(images.images, images.labels), tmp_path / name)
    pixels, labels = read_all(tmp_path / "a")
    assert (pixels == images.images).all() and (labels == images.labels).all()
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_several_pages(make_images, tmp_path) -> None:
    images = make_images(60, 256)  # 12 MB, in pages of 4 MB
    write_samples(Samples(images.images, images.labels), tmp_path / "a")
    pixels, labels = read_all(tmp_path / "a")
    assert (pixels == images.images).all() and (labels == images.labels).all()


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.999, -1])
def test_cut_file_is_refused(copied, kept) -> None:
    path, images = copied
    size = path.stat().st_size
    os.truncate(path, size - 1 if kept < 0 else int(size * kept))
    with pytest.raises(InputError, match="SHA-256 is not the one in the manifest"):
        check_beton(path, images)


@pytest.mark.parametrize("place", [0.0, 0.01, 0.5, 0.9999])
def test_flipped_bit_is_refused(copied, place) -> None:
    path, images = copied
    check_beton(path, images)
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 8
    path.write_bytes(data)
    with pytest.raises(InputError, match="SHA-256 is not the one in the manifest"):
        check_beton(path, images)


def test_file_without_manifest_is_refused(copied) -> None:
    path, images = copied
    manifest_path(path).unlink()
    with pytest.raises(InputError, match=r"no manifest.*delete .* written again"):
        check_beton(path, images)


@pytest.mark.parametrize(("text", "expected"), [("{", "cannot be read"), ("[1]", "no table")])
def test_broken_manifest_is_refused(copied, text, expected) -> None:
    path, images = copied
    manifest_path(path).write_text(text)
    with pytest.raises(InputError, match=expected):
        check_beton(path, images)


@pytest.mark.parametrize(
    "key", ["format", "count", "classes", "image_size", "content_sha256", "file_sha256"]
)
@pytest.mark.parametrize("change", ["other", "absent"])
def test_manifest_that_does_not_match_is_refused(copied, key, change) -> None:
    path, images = copied
    manifest = json.loads(manifest_path(path).read_text())
    if change == "absent":
        del manifest[key]
    else:
        manifest[key] = "other"
    manifest_path(path).write_text(json.dumps(manifest))
    expected = "SHA-256" if key == "file_sha256" else f"{key} is"
    with pytest.raises(InputError, match=expected):
        check_beton(path, images)


def test_other_images_are_refused(copied) -> None:
    path, images = copied
    pixels = images.images.copy()
    pixels[66, 7, 7, 2] ^= 1
    with pytest.raises(InputError, match="content_sha256"):
        check_beton(path, replace(images, images=pixels))
    with pytest.raises(InputError, match="classes"):
        check_beton(path, replace(images, classes=("ape", "bee", "cow")))


def test_ensure_refuses_what_it_did_not_write(make_images, tmp_path) -> None:
    images = make_images(5)
    path = tmp_path / "ffcv" / f"random-{images.checksum()[:16]}.beton"
    path.parent.mkdir()
    path.write_bytes(b"foreign")
    with pytest.raises(InputError, match="no manifest"):
        ensure_beton(images, tmp_path)
    assert path.read_bytes() == b"foreign"
    path.unlink()
    with pytest.raises(InputError, match="there is no such file"):
        check_beton(path, images)


def test_a_manifest_alone_is_written_again(written, tmp_path, child) -> None:
    """What is left by a run that ends between the two renames."""
    good, images = written
    child(f"import shutil\nshutil.copy({str(good)!r}, OUT)\nprint({images.checksum()!r})")
    path = tmp_path / "ffcv" / good.name
    path.parent.mkdir()
    manifest_path(path).write_text("{}")
    assert ensure_beton(images, tmp_path) == path
    check_beton(path, images)


KILLED = "import os\nopen(OUT, 'wb').write(b'half')\nos.kill(os.getpid(), 9)"


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (KILLED, "signal 9"),
        ("open(OUT, 'wb').write(b'half')\nraise ValueError('no such sample')", "no such sample"),
        ("raise SystemExit(3)", "exit 3: no message"),
        ("open(OUT, 'wb').write(b'whole')\nprint('f' * 64)", "is not what was given"),
        ("open(OUT, 'wb').write(b'whole')", "is not what was given"),
    ],
)
def test_failing_writer_leaves_nothing(make_images, tmp_path, child, script, expected) -> None:
    child(script)
    path = tmp_path / "a.beton"
    with pytest.raises(InputError, match=expected):
        write_beton(make_images(), path)
    assert left_in(tmp_path) == []


def test_failing_writer_leaves_the_old_file(copied, child) -> None:
    path, images = copied
    child(KILLED)
    with pytest.raises(InputError, match="signal 9"):
        write_beton(images, path)
    check_beton(path, images)


def test_hanging_writer_is_ended(make_images, tmp_path, child) -> None:
    pid_file = tmp_path / "pid"
    child(f"import os, time\nopen({str(pid_file)!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)")
    started = time.monotonic()
    with pytest.raises(InputError, match="more than 2 s"):
        write_beton(make_images(), tmp_path / "a.beton", timeout_s=2)
    assert time.monotonic() - started < 120
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)
    assert left_in(tmp_path) == ["pid"]


def test_leavings_of_a_killed_parent_are_removed(written, tmp_path, child) -> None:
    good, images = written
    child(f"import shutil\nshutil.copy({str(good)!r}, OUT)\nprint({images.checksum()!r})")
    leavings = tmp_path / "a.beton.writing"
    leavings.mkdir()
    (leavings / "data.beton").write_bytes(b"half")
    write_beton(images, tmp_path / "a.beton")
    assert left_in(tmp_path) == ["a.beton", "a.beton.json"]
    check_beton(tmp_path / "a.beton", images)


def test_unwritable_place(make_images, tmp_path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(InputError, match="--cache"):
        ensure_beton(make_images(5), tmp_path / "file")


def test_full_disk(make_images, tmp_path, monkeypatch) -> None:
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(InputError, match=r"No space left on device.*--cache"):
        write_beton(make_images(5), tmp_path / "a.beton")
    assert left_in(tmp_path) == []


def test_bad_images_are_not_written(make_images, tmp_path) -> None:
    images = make_images(5)
    with pytest.raises(InputError, match="for image 0"):
        write_beton(replace(images, labels=images.labels + 3), tmp_path / "a.beton")


def test_without_ffcv(make_images, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(beton, "ffcv_problem", lambda: "FFCV is not installed")
    with pytest.raises(InputError, match="cannot be written: FFCV is not installed"):
        write_beton(make_images(5), tmp_path / "a.beton")


@pytest.mark.parametrize("wrong", ["pixels", "label", "count"])
def test_the_child_compares_every_sample(make_images, tmp_path, monkeypatch, wrong) -> None:
    from cure_fast.loaders import ffcv_writer

    images = make_images(20)
    np.save(tmp_path / "images.npy", images.images)
    np.save(tmp_path / "labels.npy", images.labels)

    def read_wrongly(path):
        pixels, labels = images.images.copy(), images.labels.copy()
        if wrong == "pixels":
            pixels[17, 3, 2, 1] ^= 1
        if wrong == "label":
            labels[17] += 1
        yield (pixels[:-1], labels[:-1]) if wrong == "count" else (pixels, labels)

    monkeypatch.setattr(ffcv_writer, "read_samples", read_wrongly)
    expected = "wrote 20 images, read 19 back" if wrong == "count" else "sample 17 was read back"
    with pytest.raises(SystemExit, match=expected):
        main([str(tmp_path / name) for name in ("images.npy", "labels.npy", "a.beton")])


def test_a_sample_that_raises_ends_the_writer(make_images, tmp_path) -> None:
    class Failing(Samples):
        def __getitem__(self, index):
            if index == 150:
                raise OSError("sample 150 is gone")
            return super().__getitem__(index)

    def shared_memory() -> set[str]:
        return {name for name in os.listdir("/dev/shm") if name.startswith("psm_")}

    images, before = make_images(200), shared_memory()
    with pytest.raises(OSError, match="sample 150 is gone"):
        write_samples(Failing(images.images, images.labels), tmp_path / "a")
    assert shared_memory() <= before
