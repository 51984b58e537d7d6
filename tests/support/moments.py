"""Faults placed exactly: what happens in a process when a function is called for the n-th time.

A place is ``module:name`` or ``module:Class.method``, where it is looked up when it is called. The
functions here are for ``prepare`` of `processes.start`, by ``functools.partial``.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any

import torch

# What Python tells its audit hooks of calls that change a folder.
CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.symlink", "shutil.rmtree")


def before_call(place: str, number: int, act: Callable[[], object]) -> None:
    """Have ``act`` run right before the ``number``-th call, from 1, of what is at ``place``."""
    owner, name = _find(place)
    real, calls = getattr(owner, name), count(1)

    def counting(*arguments: Any, **options: Any) -> Any:
        if next(calls) == number:
            act()
        return real(*arguments, **options)

    setattr(owner, name, counting)


def signal_at(place: str, number: int, signal_number: int) -> None:
    """Have the process send itself a signal at a call."""
    before_call(place, number, lambda: os.kill(os.getpid(), signal_number))


def raise_at(place: str, number: int, error: Exception) -> None:
    """Have a call raise an error."""

    def act() -> None:
        raise error

    before_call(place, number, act)


def signal_after(place: str, signal_number: int) -> None:
    """Have the process send itself a signal at the end of each call."""
    owner, name = _find(place)
    real = getattr(owner, name)

    def signalling(*arguments: Any, **options: Any) -> Any:
        result = real(*arguments, **options)
        os.kill(os.getpid(), signal_number)
        return result

    setattr(owner, name, signalling)


def signal_and_sleep_at(place: str, number: int, signal_number: int, seconds: float) -> None:
    """Have the process send itself a signal at a call, which then takes its time."""

    def act() -> None:
        os.kill(os.getpid(), signal_number)
        time.sleep(seconds)

    before_call(place, number, act)


def hold_at(place: str, number: int, until: Path) -> None:
    """Have a call wait until the file ``until`` exists."""

    def act() -> None:
        while not until.exists():
            time.sleep(0.01)

    before_call(place, number, act)


def signal_at_change(number: int, signal_number: int, *, half: bool = False) -> None:
    """Have the process send itself a signal at a call that changes files or flushes them to disk.

    Python announces each such call just before it, but for fsync. With ``half`` the file about to
    be flushed loses its second half first, as when the process dies in the middle of writing.
    """
    calls = count(1)

    def change(path: str | None = None) -> None:
        if next(calls) == number:
            if half and path is not None:
                os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal_number)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        written = (
            event == "open" and isinstance(arguments[1], str) and set("wax+") & {*arguments[1]}
        )
        if written or event in CHANGES:
            change()

    fsync = os.fsync

    def flushed(handle: int) -> None:
        path = os.readlink(f"/proc/self/fd/{handle}")
        change(path if os.path.isfile(path) else None)
        fsync(handle)

    os.fsync = flushed
    sys.addaudithook(hook)


def quick_autoattack(signal_number: int | None = None, number: int = 0) -> None:
    """Replace AutoAttack's parts by a few passes that break nothing, with a signal at one of them.

    The real ones take minutes; what is kept between them and taken up again is the real.
    """
    from cure_fast.evaluation import autoattack

    def unbroken(guard: Any, attack: str, x: Any, y: Any, settings: Any) -> tuple[Any, Any, list]:
        for _ in range(3):
            guard(x)
        return x, torch.zeros(len(x), dtype=torch.bool), []

    autoattack.attack_batch = unbroken
    if signal_number is not None:
        signal_at("cure_fast.evaluation.autoattack:attack_batch", number, signal_number)


def _find(place: str) -> tuple[Any, str]:
    """Return what holds the function at ``place``, and its name there."""
    module, _, path = place.partition(":")
    owner: Any = import_module(module)
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    return owner, name
