"""Stopping a run: the first signal asks for an orderly end, the second interrupts at once."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Catch SIGINT, SIGTERM and SIGUSR1 for the block; yields ``stop()``, true once one has come.

    A second SIGINT raises ``KeyboardInterrupt`` where the program stands. Outside the main thread,
    where Python allows no handlers, ``stop()`` stays false.
    """
    came: list[int] = []

    def handle(number: int, frame: object) -> None:
        if came and number == signal.SIGINT:
            raise KeyboardInterrupt
        came.append(number)
        name = signal.Signals(number).name
        print(f"{name}: stopping after this step (once more to leave at once)", file=sys.stderr)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    former = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
