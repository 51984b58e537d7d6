"""TensorBoard and Weights & Biases as receivers of numbers that cannot stop training."""

from __future__ import annotations

import json
import os
import re
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cure_fast.console import warn
from cure_fast.errors import CureFastError

# Where a run folder keeps the name under which Weights & Biases knows it.
WANDB_ID = "wandb-run-id"
# Longest part of a folder's name in it; the service allows 64 characters in all.
NAME_PART = 48
# Seconds that training waits for Weights & Biases, and for somebody at a terminal to log in. What
# the user's environment says goes before.
WANDB_WAITS = {"init_timeout": 60, "login_timeout": 60}


class GuardedSink:
    """A sink whose failures cost one warning and switch it off.

    Whatever it throws when it is opened, called or closed goes no further, but for what asks the
    whole program to stop: ``KeyboardInterrupt`` and this project's own errors.
    """

    def __init__(self, title: str, opens: Callable[[], TensorBoard | WandB]) -> None:
        self.title = title
        self.sink: TensorBoard | WandB | None = self._guarded(opens)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Pass the values of a step on, where the sink still works."""
        if self.sink is not None:
            self._guarded(self.sink.scalars, step, values)

    def close(self) -> None:
        """Close the sink, where it still works."""
        if self.sink is not None:
            self._guarded(self.sink.close)

    def _guarded(self, call: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except CureFastError:
            raise
        except (Exception, SystemExit) as error:  # wandb has left the program by sys.exit
            self.sink = None
            told = " ".join(str(error).split())
            warn(
                f"{self.title} failed and is off from here, training goes on: "
                f"{type(error).__name__}{': ' if told else ''}{told}"
            )


class TensorBoard:
    """A file of events, which holds every value as soon as it was given.

    Not torch's ``SummaryWriter``: that one writes from a thread, which prints a traceback where the
    disk is full, and holds events back for two minutes, which a killed run loses.

    Readers drop what earlier files hold from step ``start`` on, which a resumed run gives again,
    but for those values of that step that are ``known``.

    Raises:
        ImportError: if the package tensorboard is not installed.
        OSError: if the folder cannot be written.
    """

    def __init__(self, folder: Path, start: int, known: Mapping[str, float]) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.event: Any = event_pb2.Event  # pyright: ignore[reportAttributeAccessIssue]
        self.summary: Any = summary_pb2.Summary  # pyright: ignore[reportAttributeAccessIssue]
        log: Any = event_pb2.SessionLog  # pyright: ignore[reportAttributeAccessIssue]
        folder.mkdir(parents=True, exist_ok=True)
        self.writer = RecordWriter(new_events(folder).open("xb"))
        self._write(file_version="brain.Event:2")
        self._write(step=start, session_log=log(status=log.START))
        if known:
            self.scalars(start, known)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add the values of a step as one event."""
        shown = [self.summary.Value(tag=k, simple_value=float(v)) for k, v in values.items()]
        self._write(step=step, summary=self.summary(value=shown))

    def close(self) -> None:
        """Close the file."""
        self.writer.close()

    def _write(self, **content: Any) -> None:
        self.writer.write(self.event(wall_time=time.time(), **content).SerializeToString())
        self.writer.flush()


def new_events(folder: Path) -> Path:
    """Return the name of a new file of events, one that sorts behind those of the folder.

    TensorBoard reads them in the order of their names, which a clock set back must not change.
    """
    start = "events.out.tfevents."
    numbers = [path.name.removeprefix(start).split(".")[0] for path in folder.glob(f"{start}*")]
    behind = [int(number) + 1 for number in numbers if number.isdecimal()]
    return folder / f"{start}{max(int(time.time()), *behind, 0):010d}.cure-fast"


class WandB:
    """A run of Weights & Biases; a resumed run folder goes on in the same one.

    The folder gives its name and, where it holds one, the configuration.

    Raises:
        ImportError: if the package wandb is not installed.
        Exception: whatever ``wandb.init`` throws, such as for a missing login.
    """

    def __init__(self, folder: Path, project: str) -> None:
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ImportError(
                f"{error}; `pip install wandb` installs it, leaving out --wandb goes without"
            ) from error
        settings = folder / "config.json"
        config = json.loads(settings.read_text(encoding="utf-8")) if settings.exists() else None
        self.run = wandb.init(
            project=project,
            name=folder.resolve().name,
            id=wandb_id(folder),
            config=config,
            dir=str(folder),
            resume="allow",
            settings=bounded_waits(wandb),
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log the values of a step; the service ignores steps it has had already."""
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        """Send what is held back and end the run."""
        self.run.finish()


def bounded_waits(wandb: Any) -> Any:
    """Return settings by which the package waits a minute at most; None where it has no such."""
    unset = {k: v for k, v in WANDB_WAITS.items() if f"WANDB_{k.upper()}" not in os.environ}
    settings = getattr(wandb, "Settings", None)
    if settings is None or not unset:
        return None
    try:
        return settings(**unset)
    except (TypeError, ValueError, KeyError):
        # A version with other names: it waits as long as it does by itself.
        return None


def wandb_id(folder: Path) -> str:
    """Return the identifier of the folder's run at the service, kept in the folder.

    It is the folder's name with a random end: a new run in a folder of an old name is another run.
    """
    kept = folder / WANDB_ID
    known = kept.read_text(encoding="ascii").strip() if kept.exists() else ""
    if not known:
        name = re.sub(r"[^A-Za-z0-9_-]+", "-", folder.resolve().name)[:NAME_PART].strip("-")
        # Not from Python's or NumPy's generator, whose states belong to training.
        known = f"{name or 'run'}-{secrets.token_hex(4)}"
        kept.write_text(known + "\n", encoding="ascii")
    return known


def open_sinks(
    folder: Path,
    stage: str,
    *,
    tensorboard: bool,
    wandb: str | None,
    start: int,
    known: Mapping[str, float],
) -> list[GuardedSink]:
    """Return the sinks that are wanted, each guarded.

    TensorBoard gets a folder for each stage; see :class:`TensorBoard` for ``start`` and ``known``.
    ``wandb`` is a project of Weights & Biases.
    """
    sinks = []
    if tensorboard:
        events = folder / "tensorboard" / stage
        sinks.append(GuardedSink("TensorBoard", lambda: TensorBoard(events, start, known)))
    if wandb is not None:
        sinks.append(GuardedSink("Weights & Biases", lambda: WandB(folder, wandb)))
    return sinks
