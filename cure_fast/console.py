"""Printing that cannot stop the work: a reader that has gone, a disk that is full, no stream."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TextIO


def open_missing_streams() -> None:
    """Open the null device for each standard stream that the program was started without.

    Until then Python has None in its place, and the next file that is opened takes the free
    descriptor: what a library prints from C would end up in a checkpoint. To be called first.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # The lowest free descriptor, which is the stream's own unless it is in use again.
            null = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(null, True)
            setattr(sys, name, open(null, mode, encoding="utf-8", closefd=False))


def say(text: str) -> None:
    """Print a line to standard output at once, whatever has become of it.

    Where it can no longer be written (``| head`` has gone, a terminal was closed, the disk is
    full), one warning goes to standard error, and this and later output goes nowhere.
    """
    problem = _print(text, sys.stdout)
    if problem:
        warn(f"standard output failed ({problem}) and is off from here; the work goes on")


def warn(text: str) -> None:
    """Print a warning to standard error at once, whatever has become of it."""
    tell(f"warning: {text}")


def tell(text: str) -> None:
    """Print a line to standard error at once, whatever has become of it."""
    _print(text, sys.stderr)


def _print(text: str, stream: TextIO | None) -> str:
    """Print a line; return "" or why that failed, after which the stream leads nowhere."""
    # Absent where a program that is not ours was started with the descriptor closed (`>&-`).
    if stream is None:
        return ""
    try:
        print(text, file=stream, flush=True)
    except UnicodeEncodeError:
        encoding = stream.encoding or "ascii"
        return _print(text.encode(encoding, "backslashreplace").decode(encoding), stream)
    except OSError as error:
        discard(stream)
        return error.strerror or type(error).__name__
    return ""


def discard(stream: TextIO) -> None:
    """Send what the stream still holds, and all that follows, to the null device."""
    null = os.open(os.devnull, os.O_WRONLY)
    # A stream that is no file of the system (in a notebook, in a test) can only be left alone.
    with contextlib.suppress(OSError):
        os.dup2(null, stream.fileno())
        stream.flush()
    os.close(null)
