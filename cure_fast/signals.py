"""Stopping by a signal: after the step under way where there is a state to save, else at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# What a second Ctrl-C exits with: the last checkpoint is whole, so the run can be continued.
RESUMABLE = 75


class Interrupted(BaseException):
    """A signal came in a phase that saves nothing.

    Like ``KeyboardInterrupt`` it is no ``Exception``: libraries that catch those must not keep it.
    """


class StopSignals:
    """Catches SIGINT, SIGTERM and SIGUSR1 for a ``with`` block; calling it tells if one has come.

    The first signal only sets a flag, which training polls after each step and evaluation before
    each pass. Inside :meth:`at_once` it raises :class:`Interrupted` where the program stands. A
    second SIGINT ends the process with exit code 75; files are whole or absent at any moment.

    Outside the main thread, where Python allows no handlers, nothing is caught.
    """

    def __init__(self) -> None:
        self._came = 0
        self._raises = False
        self._process = os.getpid()
        self._former: dict[int, object] = {}

    def __call__(self) -> bool:
        """Return whether a signal has come."""
        return self._came != 0

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Let a signal end the block where it stands: there is nothing in it to save.

        Raises:
            Interrupted: when a signal comes, or has come before.
        """
        with self._mode(raises=True):
            if self._came:
                raise Interrupted(self._came)
            yield

    @contextmanager
    def orderly(self) -> Iterator[None]:
        """Let the block poll for signals, inside one of :meth:`at_once`."""
        with self._mode(raises=False):
            yield

    @contextmanager
    def _mode(self, *, raises: bool) -> Iterator[None]:
        former, self._raises = self._raises, raises
        try:
            yield
        finally:
            self._raises = former

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            # A loader's worker, forked with this handler. Ctrl-C reaches it too, but the step under
            # way still needs its images; the parent ends it.
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        first, self._came = not self._came, number
        if number == signal.SIGINT and not first:
            leave_at_once()
        if self._raises:
            # Each time: Python drops what is raised inside a __del__.
            raise Interrupted(number)
        if not first:
            return
        name = signal.Signals(number).name
        say(f"{name}: stopping after this step (Ctrl-C once more leaves at once)\n")


def leave_at_once() -> None:
    """End the process without any clean-up, which could hang; show the cursor a bar has hidden."""
    if sys.stderr is not None and sys.stderr.isatty():
        say("\x1b[?25h\n")
    os._exit(RESUMABLE)


def say(text: str) -> None:
    """Write to standard error past Python's buffer, which a handler may have interrupted."""
    try:
        os.write(2, text.encode())
    except OSError:
        # Standard error is closed: there is nobody to tell.
        return
