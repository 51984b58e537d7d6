"""TensorBoard, Weights & Biases and trackio as receivers that cannot stop training."""

from __future__ import annotations

import importlib
import io
import json
import os
import re
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from cure_fast.config.attack_names import attack_name
from cure_fast.console import warn
from cure_fast.errors import CureFastError

# Where a run folder keeps the name under which Weights & Biases and trackio know it.
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

    def __init__(self, title: str, opens: Callable[[], TensorBoard | Tracker]) -> None:
        self.title = title
        self.sink: TensorBoard | Tracker | None = self._guarded(opens)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Pass the values of a step on, where the sink still works."""
        if self.sink is not None:
            self._guarded(self.sink.scalars, step, values)

    def results(self, found: FinalResults) -> None:
        """Pass the results of the test on, where the sink still works."""
        if self.sink is not None:
            self._guarded(self.sink.results, found)

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


@dataclass(frozen=True)
class FinalResults:
    """What a finished run sends: percentages by name, pictures uint8 [H, W, 3], and its report."""

    accuracies: dict[str, float]
    pictures: dict[str, np.ndarray]
    report: Path


def final_results(
    record: Mapping[str, Any], examples: Mapping[str, np.ndarray], report: Path
) -> FinalResults:
    """Return what is sent of a record and its pictures.

    Accuracies of the run's result go without its name, as validation's do, so that runs of several
    methods are compared by the same names.
    """
    accuracies = {
        f"test/{'' if key == 'trained' else f'{key}/'}{attack_name(attack)}": result["accuracy"]
        for key, entry in record["models"].items()
        for attack, result in entry["attacks"].items()
    }
    # A row of images side by side each.
    pictures = {
        f"pictures/{name}": (255 * np.concatenate(list(images), axis=1)).round().astype(np.uint8)
        for name, images in examples.items()
        if name == "natural" or name.endswith("_adversarial")
    }
    return FinalResults(accuracies, pictures, report)


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
        self.step = start
        if known:
            self.scalars(start, known)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add the values of a step as one event."""
        self.step = step
        shown = [self.summary.Value(tag=k, simple_value=float(v)) for k, v in values.items()]
        self._write(step=step, summary=self.summary(value=shown))

    def results(self, found: FinalResults) -> None:
        """Add the accuracies as numbers, and the pictures; a report has no place there."""
        from PIL import Image

        self.scalars(self.step, found.accuracies)
        for name, pixels in found.pictures.items():
            data = io.BytesIO()
            Image.fromarray(pixels).save(data, "png")
            height, width, depth = pixels.shape
            picture = self.summary.Image(height=height, width=width, colorspace=depth)
            picture.encoded_image_string = data.getvalue()
            value = self.summary.Value(tag=name, image=picture)
            self._write(step=self.step, summary=self.summary(value=[value]))

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


class Tracker:
    """A run of a tracking package; a resumed run folder goes on in the same one.

    The folder gives its name and, where it holds one, the configuration.

    Raises:
        ImportError: if the package is not installed.
        Exception: whatever its ``init`` throws, such as for a missing login.
    """

    package: ClassVar[str]

    def __init__(self, folder: Path, project: str) -> None:
        try:
            self.module: Any = importlib.import_module(self.package)
        except ImportError as error:
            raise ImportError(
                f"{error}; `pip install {self.package}` installs it, leaving out --{self.package} "
                "goes without"
            ) from error
        settings = folder / "config.json"
        config = json.loads(settings.read_text(encoding="utf-8")) if settings.exists() else None
        self.run: Any = self.module.init(
            project=project, config=config, resume="allow", **self.identity(folder)
        )

    def identity(self, folder: Path) -> dict[str, Any]:
        """Return by what the package knows the folder's run."""
        return {"name": wandb_id(folder)}

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log the values of a step; the service ignores steps it has had already."""
        self.run.log(dict(values), step=step)

    def results(self, found: FinalResults) -> None:
        """Log the accuracies, which become the run's summary, the pictures and the report."""
        shown = {name: self.module.Image(pixels) for name, pixels in found.pictures.items()}
        page = self.module.Html(found.report.read_text(encoding="utf-8"))
        self.run.log({**found.accuracies, **shown, "report": page})

    def close(self) -> None:
        """Send what is held back and end the run."""
        self.run.finish()


class WandB(Tracker):
    """A run of Weights & Biases."""

    package = "wandb"

    def identity(self, folder: Path) -> dict[str, Any]:
        """Return the folder's name and identifier, and what else this service takes."""
        return {
            "name": folder.resolve().name,
            "id": wandb_id(folder),
            "dir": str(folder),
            "settings": bounded_waits(self.module),
        }


class Trackio(Tracker):
    """A run of trackio, which knows it by its name alone, and takes steps as often as they come."""

    package = "trackio"


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
    trackio: str | None = None,
    start: int,
    known: Mapping[str, float],
) -> list[GuardedSink]:
    """Return the sinks that are wanted, each guarded.

    TensorBoard gets a folder for each stage; see :class:`TensorBoard` for ``start`` and ``known``.
    ``wandb`` is a project of Weights & Biases, ``trackio`` one of that.
    """
    sinks = []
    if tensorboard:
        events = folder / "tensorboard" / stage
        sinks.append(GuardedSink("TensorBoard", lambda: TensorBoard(events, start, known)))
    if wandb is not None:
        sinks.append(GuardedSink("Weights & Biases", lambda: WandB(folder, wandb)))
    if trackio is not None:
        sinks.append(GuardedSink("trackio", lambda: Trackio(folder, trackio)))
    return sinks
