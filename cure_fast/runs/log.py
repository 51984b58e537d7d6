"""The record of a run: ``metrics.jsonl`` and ``.csv``, a line per epoch, and other receivers."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from cure_fast.config.attack_names import attack_name
from cure_fast.console import warn
from cure_fast.errors import InputError
from cure_fast.files import replacing
from cure_fast.progress import Progress
from cure_fast.progress import duration as duration
from cure_fast.runs.sinks import open_sinks
from cure_fast.step.method import Terms


class RunLog:
    """Writes the rows of one stage of a run; nothing that fails here ends training.

    Every row of ``metrics.jsonl`` is one JSON object with ``event`` (``step`` or ``epoch``) and
    ``stage``. A row is complete or absent for a reader, but for the last one of a killed run. Of
    the stage's rows those of steps below ``upto_step`` stay, and those of epochs up to
    ``upto_epoch``: a resumed run writes the others again. ``progress`` has a part of the stage's
    name, with a round for each epoch. Without ``writes`` rows go nowhere.

    Raises:
        InputError: if the rows that are there already are damaged.
        OSError: if rows must be dropped and cannot be.
    """

    def __init__(
        self,
        folder: Path,
        stage: str,
        *,
        epochs: int,
        tensorboard: bool,
        wandb: str | None = None,
        trackio: str | None = None,
        upto_step: int,
        upto_epoch: int,
        progress: Progress | None = None,
        writes: bool = True,
    ) -> None:
        self.stage, self.writes = stage, writes
        self.epochs = epochs
        self.progress = progress or Progress()
        path = folder / "metrics.jsonl"
        kept = drop_rows_from(path, stage, upto_step, upto_epoch) if writes else []
        self.finished = [row for row in kept if row["event"] == "epoch"]
        # A finished epoch has the number of the step that comes next, and is not written again.
        ended = [r for r in self.finished if (r["stage"], r["step"]) == (stage, upto_step)]
        self.rows = RowWriter(path)
        self.sinks = []
        if writes:
            self.sinks = open_sinks(
                folder,
                stage,
                tensorboard=tensorboard,
                wandb=wandb,
                trackio=trackio,
                start=upto_step,
                known=epoch_scalars(ended[-1]) if ended else {},
            )

    def step(
        self, step: int, epoch: float, lr: float, terms: Terms, *, skipped: int | None = None
    ) -> None:
        """Write the row of the 0-based step; reads the terms from the device.

        ``epoch`` has the fraction of the one under way; ``skipped`` counts its steps left out.
        """
        if not self.writes:
            return
        values = {name: float(value) for name, value in terms.items()}
        row: dict[str, Any] = {"epoch": epoch, "step": step, "lr": lr, "terms": values}
        if skipped is not None:
            row["skipped"] = skipped
        self._tell("step", row, {f"step/{name}": value for name, value in values.items()})

    def epoch(self, row: dict[str, Any]) -> None:
        """Write the row of a finished epoch and print its line."""
        if not self.writes:
            return
        self._tell("epoch", row, epoch_scalars(row))
        self.finished.append({"stage": self.stage, **row})
        # Written anew next time, and metrics.jsonl has its content and warns.
        with suppress(OSError):
            write_table(self.rows.path.with_suffix(".csv"), self.finished)
        self.progress.line(epoch_line(self.stage, self.epochs, row))

    def close(self) -> None:
        """Close the files and the other receivers."""
        self.rows.close()
        for sink in self.sinks:
            sink.close()

    def _tell(self, event: str, row: dict[str, Any], scalars: dict[str, float]) -> None:
        self.rows.add({"event": event, "stage": self.stage, **row}, durable=event == "epoch")
        for sink in self.sinks:
            sink.scalars(row["step"], scalars)


class RowWriter:
    """Appends rows to a file of JSON lines, and outlives a full disk.

    Rows that cannot be written wait in memory and are tried again with each later one; the start of
    a line that did not fit is cut off again. The first failure costs one warning.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.waiting: list[bytes] = []
        self.warned = False
        # Bytes of whole rows in the file, known once it was open.
        self.size: int | None = None

    def add(self, row: dict[str, Any], *, durable: bool) -> None:
        """Write the row behind those that wait; with ``durable`` it survives a power cut."""
        self.waiting.append(json.dumps(row).encode() + b"\n")
        self._write_waiting(durable)

    def close(self) -> None:
        """Try to write what waits for the last time, and say how many rows are lost."""
        if self.waiting:
            self._write_waiting(durable=True)
        if self.waiting:
            warn(f"{self.path}: {len(self.waiting)} rows could not be written and are lost")
            self.waiting = []

    def _write_waiting(self, durable: bool) -> None:
        data = b"".join(self.waiting)
        try:
            with self.path.open("ab", buffering=0) as file:
                found = file.tell()
                whole = self.size = found if self.size is None else min(self.size, found)
                if found > whole:
                    # What an attempt before this one could not cut off.
                    os.ftruncate(file.fileno(), whole)
                try:
                    write_all(file.fileno(), data)
                    if durable:
                        os.fsync(file.fileno())
                except OSError:
                    os.ftruncate(file.fileno(), whole)
                    raise
        except OSError as error:
            if not self.warned:
                self.warned = True
                warn(
                    f"{self.path}: {error.strerror}; training goes on, and the rows are kept and "
                    "written as soon as that is possible"
                )
            return
        self.size = whole + len(data)
        self.waiting = []


def write_table(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write a row for each finished epoch as CSV, whole or not at all.

    It follows from the rows alone, so that a resumed run's is that of one that was never stopped.
    """
    told = ("stage", "epoch", "step", "seconds")
    flat = [{name: row.get(name) for name in told} | epoch_scalars(row) for row in rows]
    columns = dict.fromkeys(name for row in flat for name in row)
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, columns, lineterminator="\n")
        table.writeheader()
        table.writerows(flat)


def write_all(handle: int, data: bytes) -> None:
    """Write all bytes to a file descriptor, in as many pieces as the system takes."""
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]


def epoch_scalars(row: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a finished epoch, by the names that other receivers show."""
    scalars = {f"epoch/{name}": value for name, value in row["terms"].items()}
    scalars |= {"epoch/lr": row["lr"], "epoch/images_per_s": row["images_per_s"]}
    if row.get("skipped"):
        scalars["epoch/skipped"] = row["skipped"]
    for index, (network, found) in enumerate(validations(row).items()):
        # The run's result goes without its name, as there is one in every run.
        place = f"validation/{network}" if index else "validation"
        accuracies = {name: found.get(name) for name in ("natural", "robust", "fgsm")}
        scalars |= {f"{place}/{k}": value for k, value in accuracies.items() if value is not None}
    return scalars


def validations(row: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what an epoch's networks reached on the validation images, the run's result first.

    The result is called by its name where it is not the trained network, ``val`` else. Empty for
    an epoch without validation.
    """
    found = row["validation"]
    return {found.get("network", "val"): found, **beside(found)} if found else {}


def beside(validation: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what networks beside the run's result reached, by name."""
    # Earlier versions measured the trained one alone.
    former = {"raw": validation["raw"]} if "raw" in validation else {}
    return validation.get("networks", former)


def epoch_line(stage: str, epochs: int, row: dict[str, Any]) -> str:
    """Return the plain line of a finished epoch."""
    parts = [f"{stage} epoch {row['epoch']:>3}/{epochs}"]
    if "total" in row["terms"]:
        parts.append(f"loss {row['terms']['total']:.3f}")
    if row.get("skipped"):
        parts.append(f"skipped {row['skipped']}")
    for network, found in validations(row).items():
        parts.append(f"{network} natural {found['natural']:.1f} %")
        if found["robust"] is not None:
            parts.append(f"{network} {attack_name(found['attack'])} {found['robust']:.1f} %")
        if "fgsm" in found:
            parts.append(f"{network} FGSM {found['fgsm']:.1f} %")
    parts += [f"lr {row['lr']:.4f}", f"{row['images_per_s']:,.0f} images/s"]
    return "  ".join(parts)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the complete rows of a ``metrics.jsonl``; nothing where there is no such file.

    Raises:
        InputError: for a complete line that is not a row, with its number.
    """
    content = path.read_bytes() if path.exists() else b""
    return [row for _, row in rows_of(path, content)]


def rows_of(path: Path, content: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield number and row of each line in the content of ``path``, but for a last one cut off.

    Raises:
        InputError: for a complete line that is not a row, with its number.
    """
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        if not line:
            continue
        try:
            row = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError):
            row = None
        if not (
            isinstance(row, dict)
            and isinstance(row.get("stage"), str)
            and isinstance(row.get("event"), str)
            and isinstance(row.get("step"), int)
            and (row["event"] == "step" or isinstance(row.get("epoch"), int))
        ):
            shown = line[:40].decode("utf-8", errors="replace")
            raise InputError(
                f"{path}, line {number}: expected a JSON object with event, stage, epoch and step, "
                f"got {shown!r}; the file is damaged, delete this line to go on without it."
            )
        yield number, row


def drop_rows_from(path: Path, stage: str, step: int, epoch: int) -> list[dict[str, Any]]:
    """Rewrite the file without the rows of ``stage`` that a resumed run will write again.

    Returns the rows that stay. The others are of steps from the 0-based ``step`` on, and of epochs
    after the 1-based ``epoch``. A last line that was cut off goes too. Nothing is written where
    there is nothing to drop.

    Raises:
        InputError: if the file is damaged.
        OSError: if it cannot be written.
    """
    rows = read_rows(path)
    kept = [
        row
        for row in rows
        if row["stage"] != stage
        or (row["step"] < step if row["event"] == "step" else row["epoch"] <= epoch)
    ]
    if path.exists() and (len(kept) < len(rows) or path.read_bytes()[-1:] not in (b"", b"\n")):
        with replacing(path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    return kept
