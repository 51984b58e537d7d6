"""Strange environments, made in a process before its command runs (see `processes.start`)."""

from __future__ import annotations

import ctypes
import os
import runpy
import subprocess
import sys
import time
from contextlib import suppress
from importlib.machinery import ModuleSpec
from io import TextIOWrapper
from pathlib import Path


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


def block_with_many_images(*names: str) -> None:
    """Let the packages not load, and no number of images be too few for FFCV."""
    from cure_fast.loaders import choose

    choose.FEW_BYTES = 0
    block(*names)


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


def on_a_small_disk(folder: Path, size: str, script: str) -> None:
    """Run the program where ``folder`` is a file system of its own, then a shell's script there."""
    clone_new_mounts, clone_new_user = 0x00020000, 0x10000000
    user, group, libc = os.getuid(), os.getgid(), ctypes.CDLL(None, use_errno=True)
    if libc.unshare(clone_new_mounts | clone_new_user):
        raise OSError(ctypes.get_errno(), "unshare")
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"0 {user} 1"),
        ("gid_map", f"0 {group} 1"),
    ):
        Path("/proc/self", name).write_text(text)
    for words in (
        ["--make-rprivate", "/"],
        ["-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)],
    ):
        subprocess.run(["mount", *words], check=True)
    try:
        runpy.run_module("cure_fast.__main__", run_name="__main__")
    except SystemExit as end:
        print(f"exit {end.code}", flush=True)
    raise SystemExit(subprocess.run(["sh", "-c", script], cwd=folder).returncode)
