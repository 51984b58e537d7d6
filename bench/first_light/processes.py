"""Parts as processes: each with a time of its own, so that none can cost the others theirs."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# Seconds between the request to end and the end.
GRACE = 5.0
How = Literal["finished", "failed", "out of time", "killed", "not begun"]


@dataclass(frozen=True)
class Planned:
    """A part of a call.

    Attributes:
        name: of the part and of its files.
        seconds: that its process may take, start included.
        command: that measures it.
    """

    name: str
    seconds: float
    command: tuple[str, ...]


@dataclass(frozen=True)
class Ended:
    """How a part ended.

    Attributes:
        name: of the part.
        how: in a word.
        seconds: that it took.
        planned: seconds that it was to take at most.
        note: exit code or signal, where it did not finish.
    """

    name: str
    how: How
    seconds: float
    planned: float
    note: str = ""


def run_all(
    parts: Sequence[Planned], folder: Path, seconds: float, tell: Callable[[list[Ended]], None]
) -> list[Ended]:
    """Run the parts one after the other and return how each ended.

    Args:
        parts: in their order.
        folder: where each part's output is kept, as ``NAME.log``.
        seconds: of all; a part that no time is left for is not begun.
        tell: called after each part with all so far, so that what is known is on disk.
    """
    deadline, ended = time.monotonic() + seconds, []
    for part in parts:
        left = deadline - time.monotonic()
        if left < 2 * GRACE:
            note = f"{max(0.0, left):.0f} s were left"
            ended.append(Ended(part.name, "not begun", 0.0, part.seconds, note))
        else:
            # What an earlier try has found is not of this one.
            for ending in ("json", "md"):
                (folder / f"{part.name}.{ending}").unlink(missing_ok=True)
            ended.append(run_one(part, folder / f"{part.name}.log", min(part.seconds, left)))
        last = ended[-1]
        print(f"{last.name}: {last.how} after {last.seconds:.0f} s {last.note}", flush=True)
        tell(ended)
    return ended


def run_one(part: Planned, log: Path, seconds: float) -> Ended:
    """Run a part in a session of its own, so that all that it started ends with it."""
    began = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            part.command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        over = False
        try:
            process.wait(max(0.0, seconds - GRACE))
        except subprocess.TimeoutExpired:
            over = True
            process.send_signal(signal.SIGINT)
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                print(f"{part.name}: does not end by itself", flush=True)
        finally:
            kill_group(process)
    took, code = time.monotonic() - began, process.returncode
    if over:
        return Ended(part.name, "out of time", took, part.seconds)
    if code < 0:
        return Ended(part.name, "killed", took, part.seconds, signal.Signals(-code).name)
    how: How = "failed" if code else "finished"
    return Ended(part.name, how, took, part.seconds, f"exit code {code}" if code else "")


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """End a process and whatever is left of its session."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        # Its session has ended with it.
        return
    finally:
        process.wait()
