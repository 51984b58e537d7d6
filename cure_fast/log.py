"""The record of a run: ``metrics.jsonl``, TensorBoard where wanted, one plain line per epoch."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import IO, Any

from cure_fast.files import replacing
from cure_fast.method import Terms


class RunLog:
    """Writes the rows of one stage of a run.

    Every row of ``metrics.jsonl`` is one JSON object with ``event`` (``step`` or ``epoch``) and
    ``stage``. A row is complete or absent for a reader, but for the last one of a killed run.

    Args:
        folder: run folder.
        stage: ``pretrain`` or ``train``.
        epochs: number of epochs of the stage, for the epoch lines.
        tensorboard: write TensorBoard events below ``folder/tensorboard`` too.
        upto_step: drop rows of this stage from this step on, which a resumed run writes again.
    """

    def __init__(
        self, folder: Path, stage: str, *, epochs: int, tensorboard: bool, upto_step: int | None
    ) -> None:
        self.stage = stage
        self.epochs = epochs
        self.path = folder / "metrics.jsonl"
        if upto_step is not None:
            drop_rows_from(self.path, stage, upto_step)
        self.file: IO[str] = self.path.open("a", encoding="utf-8")
        self.tensorboard: Any = None
        if tensorboard:
            self.tensorboard = open_tensorboard(folder / "tensorboard" / stage)

    def step(self, step: int, epoch: float, lr: float, terms: Terms) -> None:
        """Write the row of a logging step; reads the terms from the device."""
        values = {name: float(value) for name, value in terms.items()}
        self._write("step", {"epoch": epoch, "step": step, "lr": lr, "terms": values})
        self._scalars(step, {f"step/{name}": value for name, value in values.items()})

    def epoch(self, row: dict[str, Any]) -> None:
        """Write the row of a finished epoch and print its line."""
        self._write("epoch", row)
        scalars = {f"epoch/{name}": value for name, value in row["terms"].items()}
        scalars |= {"epoch/lr": row["lr"], "epoch/images_per_s": row["images_per_s"]}
        if row["validation"]:
            scalars |= {
                f"validation/{name}": row["validation"][name]
                for name in ("natural", "robust")
                if row["validation"][name] is not None
            }
        self._scalars(row["step"], scalars)
        print(epoch_line(self.stage, self.epochs, row), flush=True)

    def close(self) -> None:
        """Close the files."""
        self.file.close()
        if self.tensorboard is not None:
            self.tensorboard.close()

    def _write(self, event: str, row: dict[str, Any]) -> None:
        self.file.write(json.dumps({"event": event, "stage": self.stage, **row}) + "\n")
        self.file.flush()

    def _scalars(self, step: int, scalars: dict[str, float]) -> None:
        """Pass numbers on to TensorBoard; a failure costs one warning, never the run."""
        if self.tensorboard is None:
            return
        try:
            for name, value in scalars.items():
                self.tensorboard.add_scalar(name, value, step)
        except Exception as error:  # whatever a logging service throws must not end training
            print(f"warning: TensorBoard failed and is off from here: {error}", file=sys.stderr)
            self.tensorboard = None


def open_tensorboard(folder: Path) -> Any:
    """Return a TensorBoard writer for ``folder``, or ``None`` with one warning where it fails."""
    try:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(folder))
    except (ImportError, OSError) as error:
        print(f"warning: no TensorBoard events: {error}", file=sys.stderr)
        return None


def epoch_line(stage: str, epochs: int, row: dict[str, Any]) -> str:
    """Return the plain line of a finished epoch."""
    parts = [f"{stage} epoch {row['epoch']:>3}/{epochs}", f"loss {row['terms']['total']:.3f}"]
    validation = row["validation"]
    if validation:
        parts.append(f"val natural {validation['natural']:.1f} %")
        if validation["robust"] is not None:
            parts.append(f"val {validation['attack']} {validation['robust']:.1f} %")
    parts += [f"lr {row['lr']:.4f}", f"{row['images_per_s']:,.0f} images/s"]
    left = (epochs - row["epoch"]) * row["seconds"]
    if left:
        parts.append(f"{duration(left)} left")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """Return a time as ``45 s``, ``12 min`` or ``3.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the complete rows of a ``metrics.jsonl``; a last line that was cut off is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def drop_rows_from(path: Path, stage: str, step: int) -> None:
    """Rewrite the file without the rows of ``stage`` that a resumed run will write again."""
    rows = read_rows(path)
    kept = [
        row
        for row in rows
        if row["stage"] != stage
        or (row["step"] < step if row["event"] == "step" else row["step"] <= step)
    ]
    with replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
