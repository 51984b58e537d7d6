"""Files below the cache that are written once: under a lock and another name, then renamed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from cure_fast.errors import InputError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Hold the lock of a file that may have to be written; its folder is made.

    The system drops the lock when its holder dies.

    Raises:
        InputError: if the folder cannot be written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_name(path.name + ".lock").open("w")
    except OSError as error:
        raise InputError(
            f"{path.parent}: cannot be written ({error}); give another folder with --cache, or "
            f"--loader resident."
        ) from error
    import fcntl  # POSIX only, as FFCV is; the other loaders need neither

    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def written_once(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Have ``write`` write the file, unless it is there.

    What a killed process leaves is written over, and another process waits for the first.

    Raises:
        InputError: if the folder or the file cannot be written.
    """
    temporary = path.with_name(path.name + ".writing")
    with writing(path):
        if path.exists():
            return
        try:
            with temporary.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError as error:
            raise InputError(
                f"{path}: cannot be written ({error}); make room, or give another folder with "
                "--cache."
            ) from error
        finally:
            temporary.unlink(missing_ok=True)
