"""FFCV files (.beton) that can be trusted: written aside, read back, renamed last, with a manifest.

FFCV's C code follows the pointers in a file. A half-written, cut or altered file gives garbage
without an error, a crash or a hang, so a file is opened only when its manifest matches the images
and its SHA-256 matches the manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from cure_fast.console import track
from cure_fast.errors import InputError

from .cached import writing
from .ffcv_reader import ffcv_problem, ffcv_version
from .image_set import ImageSet, check_images

FORMAT = "cure-fast beton 1"
# Start of Python, torch and FFCV, and a slow disk. CIFAR-10 takes 5 s in all.
TIMEOUT_S, TIMEOUT_BYTES_PER_S = 180.0, 2e6
POLL_S = 0.2


def ensure_beton(image_set: ImageSet, cache: Path) -> Path:
    """Return the .beton file of ``image_set`` below ``cache``, written if it is not there.

    The name holds the checksum of the images, so each split has a file of its own. Two processes
    that ask at the same time write one after the other, and the second finds the first's file.

    Raises:
        InputError: see :func:`write_beton` and :func:`check_beton`.
    """
    checksum = image_set.checksum()
    slug = re.sub(r"[^A-Za-z0-9]+", "-", image_set.name).strip("-")[-40:]
    path = cache.expanduser() / "ffcv" / f"{slug}-{checksum[:16]}.beton"
    with writing(path):
        if path.exists():
            _check(path, image_set, checksum)
        else:
            _write(image_set, path, checksum, timeout_s=None)
    return path


def write_beton(image_set: ImageSet, path: Path, *, timeout_s: float | None = None) -> None:
    """Write ``image_set`` as a raw .beton file with its manifest, replacing what is there.

    A child process writes a temporary file, reads every sample back through FFCV and compares it;
    then file and manifest are synced and renamed, the file last. A failure to write leaves ``path``
    as it was, an end between the two renames leaves no file.

    Args:
        image_set: images and labels; both are checked.
        path: file to write; the manifest is beside it with ``.json`` added to the name.
        timeout_s: seconds the child may take; None gives 180 s and 1 s more per 2 MB.

    Raises:
        InputError: where FFCV is absent, the child failed or took too long, or the disk did.
    """
    with writing(path):
        _write(image_set, path, image_set.checksum(), timeout_s=timeout_s)


def check_beton(path: Path, image_set: ImageSet) -> None:
    """Raise :class:`InputError` unless ``path`` is whole and holds exactly ``image_set``."""
    _check(path, image_set, image_set.checksum())


def manifest_path(path: Path) -> Path:
    """Return the name of the manifest of a .beton file."""
    return path.with_name(path.name + ".json")


def _check(path: Path, image_set: ImageSet, checksum: str) -> None:
    remedy = f"delete {path} and {manifest_path(path).name}, and it will be written again."
    if not path.is_file():
        raise InputError(f"{path}: there is no such file; {remedy}")
    try:
        manifest = json.loads(manifest_path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            f"{path}: refused, for it has no manifest: it was not finished, or another program "
            f"wrote it; {remedy}"
        ) from error
    except (OSError, ValueError) as error:
        raise InputError(
            f"{manifest_path(path)}: the manifest cannot be read ({error}); {remedy}"
        ) from error
    if not isinstance(manifest, dict):
        raise InputError(f"{manifest_path(path)}: the manifest is no table; {remedy}")
    for key, expected in _content(image_set, checksum).items():
        if manifest.get(key) != expected:
            raise InputError(
                f"{path}: refused, for its manifest does not match the images: {key} is "
                f"{manifest.get(key)!r}, expected {expected!r}; {remedy}"
            )
    if manifest.get("file_sha256") != _file_sha256(path):
        raise InputError(
            f"{path}: refused, for its SHA-256 is not the one in the manifest: it is cut or "
            f"altered; {remedy}"
        )


def _content(image_set: ImageSet, checksum: str) -> dict[str, Any]:
    """Return the part of the manifest that the images determine."""
    return {
        "format": FORMAT,
        "count": len(image_set),
        "classes": list(image_set.classes),
        "image_size": int(image_set.images.shape[1]),
        "content_sha256": checksum,
    }


def _write(image_set: ImageSet, path: Path, checksum: str, *, timeout_s: float | None) -> None:
    check_images(image_set)
    if problem := ffcv_problem():
        raise InputError(f"{path}: cannot be written: {problem}.")
    if timeout_s is None:
        timeout_s = TIMEOUT_S + image_set.images.nbytes / TIMEOUT_BYTES_PER_S
    work = path.with_name(path.name + ".writing")
    try:
        shutil.rmtree(work, ignore_errors=True)  # of a writer that was killed
        work.mkdir()
        np.save(work / "images.npy", image_set.images)
        np.save(work / "labels.npy", image_set.labels)
        temporary = work / "data.beton"
        read_back = _run_child(work, temporary, path, image_set, timeout_s)
        if read_back != checksum:
            raise InputError(
                f"{path}: what FFCV reads back (checksum {read_back!r}) is not what was given "
                f"({checksum!r}); the disk or memory is at fault, or use --loader resident."
            )
        manifest = {
            **_content(image_set, checksum),
            "name": image_set.name,
            "source": image_set.source,
            "file_sha256": _file_sha256(temporary),
            "ffcv": ffcv_version(),
        }
        manifest_file = work / "manifest.json"
        manifest_file.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        for file in (temporary, manifest_file):
            _sync(file)
        # The file comes last: whatever ends this in between leaves none, and it is written anew.
        path.unlink(missing_ok=True)
        os.replace(manifest_file, manifest_path(path))
        os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error}); give another folder with --cache, or "
            f"--loader resident, which needs no file."
        ) from error
    finally:
        try:
            shutil.rmtree(work, ignore_errors=True)
        except BaseException:  # a signal's handler raised in the midst of it
            shutil.rmtree(work, ignore_errors=True)
            raise


def _command(images: Path, labels: Path, out: Path) -> list[str]:
    """Return the command that writes ``out`` and prints the checksum of what it reads back."""
    module = "cure_fast.loaders.ffcv_writer"
    return [sys.executable, "-m", module, str(images), str(labels), str(out)]


def _run_child(
    work: Path, temporary: Path, path: Path, image_set: ImageSet, timeout_s: float
) -> str:
    """Run the writer in a child process; return the checksum that it printed."""
    command = _command(work / "images.npy", work / "labels.npy", temporary)
    deadline = time.monotonic() + timeout_s
    image_bytes, shown = image_set.images[0].nbytes, 0
    with (
        _lifeline() as stdin,
        _child(command, stdin) as child,
        track(f"writing {path.name}", len(image_set)) as advance,
    ):
        while True:
            try:
                output, errors = child.communicate(timeout=POLL_S)
                break
            except subprocess.TimeoutExpired as error:
                if time.monotonic() > deadline:
                    raise InputError(
                        f"{path}: writing took more than {timeout_s:.0f} s and was ended; the disk "
                        f"may be too slow: give another folder with --cache, or --loader resident."
                    ) from error
            written = temporary.stat().st_size // image_bytes if temporary.exists() else 0
            written = min(written, len(image_set))
            advance(written - shown)
            shown = written
    if child.returncode:
        last = errors.strip().rpartition("\n")[2] or "no message"
        how = f"signal {-child.returncode}" if child.returncode < 0 else f"exit {child.returncode}"
        raise InputError(
            f"{path}: the writer failed ({how}: {last}); try again, or use --loader resident."
        )
    return output.strip()


@contextmanager
def _lifeline() -> Iterator[BinaryIO]:
    """Yield a file that a child can read from, and that ends when this block or process does.

    It ends the writer however this process comes to its end: killed, or by an exception that a
    signal's handler raises at the very moment when the child has started and is not known yet.
    """
    read, write = os.pipe()
    with open(write, "wb"), open(read, "rb") as end:
        yield end


@contextmanager
def _child(command: list[str], stdin: BinaryIO) -> Iterator[subprocess.Popen[str]]:
    """Run a child process for the block, and end it there."""
    # A session of its own, so that Ctrl-C reaches this process alone, which then ends the child.
    child = subprocess.Popen(
        command,
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield child
    finally:
        child.kill()
        # Not communicate(), which cannot be called again where an exception left it half-way.
        for pipe in (child.stdout, child.stderr):
            if pipe is not None:
                pipe.close()
        child.wait()


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Force a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
