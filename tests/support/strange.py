"""Strange environments, made in a process before its command runs (see `processes.start`)."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import suppress
from importlib.machinery import ModuleSpec
from io import TextIOWrapper


class Blocker:
    """An import hook: a package cannot be imported, nor can anything inside it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name.split(".")[0] == self.name:
            raise ModuleNotFoundError(f"No module named {name!r} (blocked)", name=name)
        return None


def block(*names: str) -> None:
    """Let the packages not load in this process, also where they were imported already."""
    for module in [m for m in sys.modules if m.split(".")[0] in names]:
        del sys.modules[module]
    for name in names:
        sys.meta_path.insert(0, Blocker(name))


def jumping_clock() -> None:
    """Set the clock back by a day at every third look at it; the monotonic clocks go on."""
    real, looks = time.time, 0

    def jumping() -> float:
        nonlocal looks
        looks += 1
        return real() - 86_400 * (looks // 3)

    time.time = jumping


def no_account() -> None:
    """Let the user have no entry in the list of accounts, as in many containers."""
    import pwd

    def unknown(number: int) -> object:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    pwd.getpwuid = unknown


def broken_pipe() -> None:
    """Let standard output be a pipe whose reader has gone."""
    sys.stdout.close()
    reading, writing = os.pipe()
    # The pipe may have taken the descriptor that has just become free.
    if reading == 1:
        reading = os.dup(reading)
    os.dup2(writing, 1)
    os.close(reading)
    os.close(writing)
    sys.stdout = open(1, "w")


def broken_pipes() -> None:
    """Let both outputs be pipes without a reader, and be written to line by line."""
    broken_pipe()
    os.dup2(1, 2)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(line_buffering=True)


def read_by_head() -> None:
    """Let standard output be a pipe to `head -1`, written to line by line; it keeps its line."""
    with open("head", "wb") as kept:
        head = subprocess.Popen(["head", "-1"], stdin=subprocess.PIPE, stdout=kept)
    assert head.stdin is not None
    sys.stdout.close()
    os.dup2(head.stdin.fileno(), 1)
    head.stdin.close()
    sys.stdout = open(1, "w", buffering=1)


def close_streams() -> None:
    """Leave the program without its three streams, as Python does that is started without them."""
    for name in ("stdin", "stdout", "stderr"):
        stream: TextIOWrapper = getattr(sys, name)
        stream.close()
        setattr(sys, name, None)
        setattr(sys, f"__{name}__", None)
    for number in range(3):
        with suppress(OSError):
            os.close(number)
