"""Printing that cannot stop the work: a reader that has gone, a disk that is full, no stream."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import TextIO

# How a terminal is told of colours and bold letters.
STYLE = re.compile(r"\x1b\[[0-9;]*m")


class Transcript:
    """What a job prints, kept in a file: from memory as soon as there is one to be written.

    It has no control characters. A file that cannot be written costs one warning.
    """

    def __init__(self) -> None:
        self.waiting: list[str] = []
        self.path: Path | None = None
        self.failed = False

    def add(self, text: str) -> None:
        """Keep a line."""
        if self.failed:
            return
        plain = STYLE.sub("", text)
        plain = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in plain)
        self.waiting.append(plain + "\n")
        if self.path is not None:
            self.write_to(self.path)

    def write_to(self, path: Path) -> None:
        """Append what is kept, and from here on each line as it comes."""
        self.path = path
        try:
            with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.writelines(self.waiting)
        except OSError as error:
            self.failed = True
            warn(f"{path}: {error.strerror}; what is printed is kept no longer")
        self.waiting = []


def command(*words: str | os.PathLike[str]) -> str:
    """Return a command of cure-fast as a shell takes it."""
    return shlex.join(["cure-fast", *(os.fspath(word) for word in words)])


# That of the job that runs in this context, where one does.
_transcript: ContextVar[Transcript | None] = ContextVar("transcript", default=None)


@contextlib.contextmanager
def transcript() -> Iterator[Transcript]:
    """Keep what is printed in the block."""
    kept = Transcript()
    token = _transcript.set(kept)
    try:
        yield kept
    finally:
        _transcript.reset(token)


def keep(text: str) -> None:
    """Add a line to the transcript of the job that runs, without printing it."""
    kept = _transcript.get()
    if kept is not None:
        kept.add(text)


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
    keep(text)
    problem = _print(text, sys.stdout)
    if problem:
        warn(f"standard output failed ({problem}) and is off from here; the work goes on")


def warn(text: str) -> None:
    """Print a warning to standard error at once, whatever has become of it."""
    tell(f"warning: {text}")


def tell(text: str) -> None:
    """Print a line to standard error at once, whatever has become of it."""
    keep(text)
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


@contextlib.contextmanager
def track(title: str, images: int) -> Iterator[Callable[[float], None]]:
    """Show a bar on a terminal; yields ``advance(n)``, to be called with finished images."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield lambda images: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=images)
        yield lambda images: bar.advance(task, images)
