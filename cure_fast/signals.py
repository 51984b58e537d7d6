"""Stopping by a signal: after the step under way where there is a state to save, else at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
# Seconds after which a signal that came during an import is sent again.
AGAIN_S = 0.05
# What a second Ctrl-C exits with: the last checkpoint is whole, so the run can be continued.
RESUMABLE = 75


class Interrupted(BaseException):
    """A signal came in a phase that saves nothing.

    Like ``KeyboardInterrupt`` it is no ``Exception``: libraries that catch those must not keep it.
    """


class StopSignals:
    """Catches SIGINT, SIGTERM, SIGUSR1 and SIGHUP for a ``with`` block; called, tells if one came.

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
        self._watch: InterruptWatch | None = None
        self._again: threading.Timer | None = None

    def __call__(self) -> bool:
        """Return whether a signal has come."""
        return self._came != 0

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            outer = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
            if isinstance(outer, StopSignals):
                self._came = outer._came
            # `nohup` means that the end of the terminal shall not end the program.
            heeded = [n for n in SIGNALS if n != signal.SIGHUP or not is_ignored(n)]
            self._former = {number: signal.signal(number, self._handle) for number in heeded}
            self._watch = InterruptWatch()
        return self

    def __exit__(self, *_: object) -> None:
        if self._again is not None:
            self._again.cancel()
        if self._watch is not None:
            self._watch.close()
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
            if is_importing(frame):
                # Half a module is no state to end in: NumPy answers by an endless recursion.
                self._again = threading.Timer(AGAIN_S, os.kill, (self._process, signal.SIGTERM))
                self._again.start()
                return
            # Each time: Python drops what is raised inside a __del__.
            raise Interrupted(number)
        if not first:
            return
        name = signal.Signals(number).name
        more = " (Ctrl-C once more leaves at once)" if number == signal.SIGINT else ""
        say(f"{name}: stopping after this step{more}\n")


def ignore_signals() -> None:
    """Let no signal change the exit code of a program that is done."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def is_ignored(number: int) -> bool:
    """Return whether the program was started with the signal switched off."""
    return signal.getsignal(number) is signal.SIG_IGN


def is_importing(frame: FrameType | None) -> bool:
    """Return whether a module is being imported in ``frame`` or one that called it."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


class InterruptWatch:
    """Leaves at the second SIGINT even while the main thread is inside a long call of C.

    Python runs a handler only between two of its own instructions, and takes two signals that came
    meanwhile for one. But it notes each in a pipe at once, which a thread reads here.
    """

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._former = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._process = os.getpid()
        os.register_at_fork(after_in_child=self._forget)
        self._thread = threading.Thread(target=self._count, name="interrupts", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop watching."""
        signal.set_wakeup_fd(self._former, warn_on_full_buffer=False)
        os.close(self._write)
        self._thread.join()
        os.close(self._read)
        self._process = 0

    def _count(self) -> None:
        interrupts = 0
        while number := os.read(self._read, 1):
            interrupts += number[0] == signal.SIGINT
            if interrupts == 2:
                leave_at_once()

    def _forget(self) -> None:
        # A forked worker must not write its own signals into this pipe. The system keeps the call
        # for ever, so it does nothing once the watch is over.
        if self._process and threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(-1)


def leave_at_once() -> None:
    """End the process without any clean-up, which could hang; show the cursor a bar has hidden."""
    cursor = "\x1b[?25h\n" if os.isatty(2) else ""
    say(f"{cursor}cure-fast: left at once; --resume goes on from the last checkpoint\n")
    os._exit(RESUMABLE)


def say(text: str) -> None:
    """Write to standard error past Python's buffer, which a handler may have interrupted."""
    try:
        os.write(2, text.encode())
    except OSError:
        # Standard error is closed: there is nobody to tell.
        return
