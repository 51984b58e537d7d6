"""What a part has found: rows of figures, kept as JSON and as Markdown after each step of it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from bench.device_timing import spread
from bench.gpu.plan import Plan
from bench.gpu.sources import CODE, ROOT, digest_of
from bench.gpu_results import without_folders
from cure_fast.files import replacing, write_json
from cure_fast.runs.environment import environment

FORMAT = "cure-fast gpu benchmark 1"
# How the tests stand that come first.
TESTED = "tests.json"
# What titles of a rehearsal begin with.
MARK = "REHEARSAL: "
REHEARSAL = "A rehearsal on tiny shapes: its figures say nothing about speed."
Status = Literal["measured", "left out", "failed"]


@dataclass(frozen=True)
class Row:
    """One thing that was to be measured.

    Attributes:
        key: what it is, such as model, method, engine and batch; unique within a part.
        status: whether it was.
        note: why not, or what to know about the figures.
        rounds: median seconds of each round.
        figures: further numbers by name; None where it could not be had.
        together: rows of a part with the same number were measured in turns, round by round.
    """

    key: dict[str, str | int]
    status: Status = "measured"
    note: str = ""
    rounds: tuple[float, ...] = ()
    figures: dict[str, float | None] = field(default_factory=dict)
    together: int | None = None

    @property
    def seconds(self) -> tuple[float, float, float] | None:
        """20th percentile, median and 80th percentile of the rounds."""
        return spread(list(self.rounds)) if self.rounds else None

    @property
    def median(self) -> float:
        """Median of the rounds.

        Raises:
            statistics.StatisticsError: where none was measured.
        """
        return statistics.median(self.rounds)

    @property
    def name(self) -> str:
        """The key in words."""
        return " ".join(str(value) for value in self.key.values())


@dataclass
class Record:
    """The rows of one part, and what they were measured on.

    Attributes:
        part: name of the part.
        about: GPU, driver, versions, commit, hash of the sources, date, command.
        columns: figures that the Markdown table has, with their headings and factors.
        text: explains the table.
        rows: what was found so far.
        finished: whether the part has come to its end.
    """

    part: str
    about: dict[str, Any]
    columns: Sequence[tuple[str, str, float]] = ()
    text: str = ""
    rows: list[Row] = field(default_factory=list)
    finished: bool = False

    @property
    def failed(self) -> list[Row]:
        """Rows whose measurement raised an error."""
        return [row for row in self.rows if row.status == "failed"]

    def add(self, row: Row) -> None:
        """Keep a row and say so; its note names no folder of this machine."""
        row = replace(row, note=without_folders(row.note))
        self.rows.append(row)
        said = f"{1e3 * row.median:,.3f} ms" if row.rounds else f"{row.status}: {row.note}"
        print(f"{self.part}: {row.name}: {said}", flush=True)

    def write(self, folder: Path) -> None:
        """Write ``<part>.json`` and ``<part>.md``, each whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        record = {
            "format": FORMAT,
            "part": self.part,
            "about": self.about,
            "finished": self.finished,
            "rows": [{**asdict(row), "seconds": row.seconds} for row in self.rows],
        }
        write_json(folder / f"{self.part}.json", record)
        write_text(folder / f"{self.part}.md", self.markdown())

    def markdown(self) -> str:
        """Return the record as a page."""
        lines = [f"# {MARK if self.about['tiny'] else ''}{self.part}", ""]
        lines += [REHEARSAL, ""] if self.about["tiny"] else []
        lines += [f"- {name}: {value}" for name, value in self.about.items()]
        if not self.finished:
            lines += ["", "The part did not come to its end."]
        measured = [row for row in self.rows if row.status == "measured"]
        lines += ["", *([self.text, ""] if self.text else [])]
        # Rows of one part may have keys of several kinds, each with a table of its own.
        for names in dict.fromkeys(tuple(row.key) for row in measured):
            lines += [*self._table([row for row in measured if tuple(row.key) == names]), ""]
        for status in ("left out", "failed"):
            rows = [row for row in self.rows if row.status == status]
            if rows:
                lines += [f"## {status.capitalize()}", ""]
                lines += [f"- {row.name}: {row.note}" for row in rows] + [""]
        return "\n".join(lines)

    def _table(self, rows: Sequence[Row]) -> list[str]:
        columns = [
            column for column in self.columns if any(row.figures.get(column[0]) for row in rows)
        ]
        heads = [*rows[0].key, "ms", "20 % to 80 %", "rounds", *(head for _, head, _ in columns)]
        heads += ["turns", "note"]
        lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
        for row in rows:
            low, median, high = row.seconds or (float("nan"),) * 3
            cells = [str(value) for value in row.key.values()]
            cells += [f"{1e3 * median:,.3f}", f"{1e3 * low:,.3f} to {1e3 * high:,.3f}"]
            cells += [str(len(row.rounds))]
            cells += [shown(row.figures.get(name), factor) for name, _, factor in columns]
            cells += ["" if row.together is None else str(row.together), row.note]
            lines.append(f"| {' | '.join(cells)} |")
        return lines


def shown(value: float | None, factor: float) -> str:
    """Return a figure times ``factor`` with about four digits, empty for None."""
    if value is None:
        return ""
    value *= factor
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 100 else 2
    return f"{value:,.{digits}f}"


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def describe(plan: Plan) -> dict[str, Any]:
    """Return what the run runs on: device, versions, commit, hash of the sources, command."""
    found = environment()
    kept = ("cpu", "torch", "triton", "numpy", "python", "commit", "dirty")
    memory = None
    if plan.on_gpu:
        memory = round(torch.cuda.get_device_properties(plan.device).total_memory / 2**30, 1)
    return {
        "gpu": torch.cuda.get_device_name(plan.device) if plan.on_gpu else None,
        "gpu_gib": memory,
        "driver": found["driver"],
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        **{name: found[name] for name in kept},
        "sources": digest_of(ROOT, CODE),
        "date": found["started"],
        "command": " ".join(plan.command),
        "device": str(plan.device),
        "tiny": plan.tiny,
        "seconds_per_part": plan.seconds,
    }


def reason(error: BaseException) -> str:
    """Return the first line of an error, with its type."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
