"""Files that are whole or absent: written under another name, flushed to disk, renamed."""

from __future__ import annotations

import csv
import fcntl
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cure_fast.errors import InputError


def user_path(text: str, flag: str) -> Path:
    """Return the path given to ``flag``; ``~`` is home, without which it is an ``InputError``."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise InputError(
            f"{flag} {text}: this account has no home folder; give a full path, as in {flag} "
            "/tmp/cure-fast."
        ) from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; what the block writes there becomes ``path``.

    A reader finds the old file or the whole new one, also after a power cut. If the block raises,
    the temporary file goes and the old one stays.
    """
    temporary = path.with_name(f".{os.getpid()}.tmp-{path.name}")  # as clear_unfinished has it
    try:
        yield temporary
        flush(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    flush(path.parent)


def clear_unfinished(*folders: Path) -> None:
    """Delete what killed processes left of :func:`replacing` there; the caller holds the lock."""
    for folder in folders:
        for path in folder.glob(".[0-9]*.tmp-*"):
            path.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, *, wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the lock file ``path`` for the block; the system lets go of it when the process ends.

    Where another process holds it, ``wait`` is called once before waiting for it; without ``wait``
    ``BlockingIOError`` is raised.
    """
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if wait is None:
                raise
            wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def flush(path: Path) -> None:
    """Have the operating system write the file, or the entries of the folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as CSV, with a column for each name that a row has, in the order they come."""
    text = io.StringIO()
    names = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_json(path: Path, values: Any) -> None:
    """Write ``values`` as indented JSON, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
