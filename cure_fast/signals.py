"""Stopping by a signal: after the step under way where there is a state to save, else at once."""

from __future__ import annotations

import os
import signal
import threading
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
# What the command line documents for a run that was stopped and can be resumed.
RESUMABLE = 75
# Seconds after which a signal that came during an import is sent again.
AGAIN_S = 0.05


class Interrupted(BaseException):
    """A signal came in a phase that saves nothing; no ``Exception``, which libraries would keep."""


class StopSignals:
    """Catches SIGINT, SIGTERM, SIGUSR1 and SIGHUP for a ``with`` block; called, tells if one came.

    The first signal only sets a flag, which training polls after each step and evaluation before
    each pass. Inside :meth:`at_once` it raises :class:`Interrupted` where the program stands. A
    second SIGINT ends the process with exit code 75; files are whole or absent at any moment.
    Without ``leaves`` it raises KeyboardInterrupt: the process, such as a notebook's, is not ours.

    Outside the main thread, where Python allows no handlers, nothing is caught.
    """

    def __init__(self, *, leaves: bool = True) -> None:
        self._leaves = leaves
        self._came = 0
        self._raises = False
        self._process = os.getpid()
        self._undo = ExitStack()

    def __call__(self) -> bool:
        """Return whether a signal has come."""
        return self._came != 0

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            outer = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
            if isinstance(outer, StopSignals):
                self._came = outer._came
            for number in SIGNALS:
                former = signal.getsignal(number)
                # `nohup` means that the end of the terminal shall not end the program.
                if number != signal.SIGHUP or former is not signal.SIG_IGN:
                    signal.signal(number, self._handle)
                    self._undo.callback(signal.signal, number, former)
            if self._leaves:
                self._undo.enter_context(interrupts_watched())
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Let a signal end the block where it stands: there is nothing in it to save.

        The block raises :class:`Interrupted` when a signal comes, or has come before.
        """
        self._raises = True
        try:
            if self._came:
                raise Interrupted(self._came)
            yield
        finally:
            self._raises = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            # A loader's worker, forked with this handler. Ctrl-C reaches it too, but the step under
            # way still needs its images; the parent ends it.
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        first, self._came = not self._came, number
        if number == signal.SIGINT and not first:
            if not self._leaves:
                raise KeyboardInterrupt
            leave_at_once()
        if self._raises:
            frames = traceback.walk_stack(frame)
            if any(f.f_code.co_filename.startswith("<frozen importlib") for f, _ in frames):
                # Half a module is no state to end in: NumPy answers by an endless recursion.
                again = threading.Timer(AGAIN_S, os.kill, (self._process, signal.SIGTERM))
                again.start()
                self._undo.callback(again.cancel)
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


@contextmanager
def interrupts_watched() -> Iterator[None]:
    """Leave at the second SIGINT even while the main thread is inside a long call of C.

    Python runs a handler only between two of its own instructions, and takes two signals that came
    meanwhile for one. But it notes each in a pipe at once, which a thread reads here.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    former = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    watching = True

    def count() -> None:
        interrupts = 0
        while number := os.read(reading, 1):
            interrupts += number[0] == signal.SIGINT
            if interrupts == 2:
                leave_at_once()

    def forget() -> None:
        # A forked worker must not write its own signals into this pipe. The system keeps the call
        # for ever, so it does nothing once the watch is over.
        if watching and threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(-1)

    os.register_at_fork(after_in_child=forget)
    thread = threading.Thread(target=count, name="interrupts", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(former, warn_on_full_buffer=False)
        os.close(writing)
        thread.join()
        os.close(reading)
        watching = False


def leave_at_once() -> None:
    """End the process without any clean-up, which could hang; show the cursor a bar has hidden."""
    cursor = "\x1b[?25h\n" if os.isatty(2) else ""
    say(f"{cursor}cure-fast: left at once; train goes on with --resume, others when called again\n")
    os._exit(RESUMABLE)


def say(text: str) -> None:
    """Write to standard error past Python's buffer, which a handler may have interrupted."""
    with suppress(OSError):  # it is closed: there is nobody to tell
        os.write(2, text.encode())
