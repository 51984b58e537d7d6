"""The record of a kernel benchmark on a GPU: rows of figures, the targets, JSON and Markdown."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Variables of the environment by which a caller says where results go, and how many seconds after
# the beginning rows may begin. There is a file of rows then, for a caller who ends this process.
OUT, SECONDS = "CURE_FAST_BENCH_OUT", "CURE_FAST_BENCH_SECONDS"
FOLDER = Path(os.environ.get(OUT) or Path(__file__).parent / "results")
ROWS = "kernels-rows.jsonl"
KERNELS = "triton"
# What the note of a row begins with whose provider failed.
FAILED = "FAILED"
# The folders of an absolute path, which name a machine or a person; not those of an address.
FOLDERS = re.compile(r"(?<![\w.:/~-])/(?:[^\s/'\":,]+/)+")

# Times of the 28 byte floor that the update may take, with the floor at a copy's bandwidth.
FLOOR_TARGETS = {("update", "resnet18"): 1.6, ("update", "wrn34-10"): 1.5}
# How many times faster than a rival the kernels are to be, for mask and update of these shapes.
SPEED_TARGETS = {"numpy": 100.0, "torch-kthvalue": 20.0, "compile-": 3.0}
SPEED_OPERATIONS = ("mask", "update")
SPEED_SHAPES = ("resnet18", "wrn34-10")


@dataclass(frozen=True)
class Row:
    """One provider of one operation on one set of shapes.

    Attributes:
        operation: what is timed.
        shapes: on which shapes.
        provider: who does it.
        note: why there are no figures, or how the result differs from the reference's.
        cold: seconds with the second-level cache overwritten before: 20th percentile, median, 80th
            percentile; None where nothing was timed.
        warm: the same without overwriting it, with the device idle at the launch.
        rounds: number of cold times.
        floor_bytes: bytes that any provider must move.
        bandwidth: bytes per second of a copy on this device in this run.
    """

    operation: str
    shapes: str
    provider: str
    note: str = ""
    cold: tuple[float, float, float] | None = None
    warm: tuple[float, float, float] | None = None
    rounds: int = 0
    floor_bytes: int = 0
    bandwidth: float = 0.0

    @property
    def key(self) -> tuple[str, str]:
        """Operation and shapes."""
        return self.operation, self.shapes

    @property
    def is_kernel(self) -> bool:
        """Whether the provider is one of this project's kernels."""
        return self.provider.startswith(KERNELS)

    @property
    def seconds(self) -> float | None:
        """Median of the cold times."""
        return None if self.cold is None else self.cold[1]

    @property
    def of_floor(self) -> float | None:
        """Median time over the time of copying as many bytes as the floor has."""
        if self.seconds is None:
            return None
        return self.seconds / (self.floor_bytes / self.bandwidth)


@dataclass(frozen=True)
class Verdict:
    """A target of one row beside its figure.

    Attributes:
        target: what is asked for.
        wanted: the number asked for.
        found: the number measured; None where a figure it needs is missing.
        met: whether the target is met; None where it cannot be said.
    """

    target: str
    wanted: float
    found: float | None
    met: bool | None

    def text(self) -> str:
        """Return one line: the target, the figure, and by how much it is met or missed."""
        if self.found is None or self.met is None:
            return f"{self.target} {self.wanted:g}x: not measured"
        factor = max(self.found / self.wanted, self.wanted / self.found)
        word = "met" if self.met else "missed"
        return f"{self.target} {self.wanted:g}x: {self.found:.2f}x, {word} by {factor:.2f}x"


def without_folders(text: str) -> str:
    """Return ``text`` with each absolute path cut to its last name."""
    return FOLDERS.sub("", text)


def verdicts(row: Row, rows: Sequence[Row]) -> list[Verdict]:
    """Return the targets of ``row`` with what was measured; none for rivals.

    Args:
        row: whose targets.
        rows: all rows of the run, the rivals' among them.
    """
    if not row.is_kernel:
        return []
    found = []
    if wanted := FLOOR_TARGETS.get(row.key):
        ratio = row.of_floor
        met = None if ratio is None else ratio <= wanted
        found.append(Verdict("floor, at most", wanted, ratio, met))
    if row.operation in SPEED_OPERATIONS and row.shapes in SPEED_SHAPES:
        for rival, wanted in SPEED_TARGETS.items():
            gain = speedup(row, rival, rows)
            met = None if gain is None else gain >= wanted
            name = "best torch.compile" if rival == "compile-" else rival
            found.append(Verdict(f"over {name}, at least", wanted, gain, met))
    return found


def speedup(row: Row, rival: str, rows: Sequence[Row]) -> float | None:
    """Return how many times faster ``row`` is than the fastest rival whose name so begins."""
    times = [
        other.seconds
        for other in rows
        if other.key == row.key and other.provider.startswith(rival) and other.seconds is not None
    ]
    return min(times) / row.seconds if times and row.seconds else None


def result_path(gpu: str) -> Path:
    """Return where the results of a GPU of this name lie, without the ending."""
    return FOLDER / f"{re.sub(r'[^a-z0-9]+', '-', gpu.lower()).strip('-')}-kernels"


def write_results(rows: Sequence[Row], about: dict[str, Any], *, planned: int) -> Path:
    """Write the rows as JSON and as Markdown; return the path of the latter.

    Args:
        rows: what was measured.
        about: GPU, driver, versions, commit and date; ``gpu`` names the files.
        planned: number of rows of a whole run.

    Raises:
        ValueError: if there was no GPU: times of a CPU are no result.
    """
    gpu = about.get("gpu")
    if not gpu:
        raise ValueError(
            "gpu: expected the name of the CUDA GPU that was measured, got none. Results are "
            "written on a GPU only; run the benchmark there."
        )
    path = result_path(gpu)
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "about": about,
        "planned": planned,
        "rows": [
            {
                **asdict(row),
                "of_floor": row.of_floor,
                "targets": [asdict(verdict) for verdict in verdicts(row, rows)],
            }
            for row in rows
        ],
    }
    _replace(path.with_suffix(".json"), json.dumps(record, indent=1) + "\n")
    _replace(path.with_suffix(".md"), markdown(rows, about, planned=planned))
    return path.with_suffix(".md")


def keep_row(row: Row, times: Sequence[float]) -> None:
    """Append a row with all of its cold times to :data:`ROWS`."""
    with (FOLDER / ROWS).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"row": asdict(row), "times": list(times)}) + "\n")


def kept_rows(folder: Path) -> list[tuple[Row, tuple[float, ...]]]:
    """Return the rows that :func:`keep_row` left in a folder, with their cold times.

    A last one that was cut off, as its process was ended, is not among them.
    """
    path = folder / ROWS
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [(Row(**each["row"]), tuple(each["times"])) for each in found]


def _replace(path: Path, text: str) -> None:
    """Write a file as a whole, so that a run that is killed leaves the last whole one."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


EXPLANATION = """\
Times are medians in microseconds between CUDA events, with the 20th and 80th percentile. *Cold*:
the second-level cache was overwritten before each round, and up to 0.1 ms of launching is hidden
behind that. *Warm*: it was not, and the device was idle when the work was launched. GB/s counts the
bytes that any implementation must move (the floor), not those that a provider moves; *of copy* is
that over a copy's bandwidth, and *x floor* its inverse. Every result was compared with the
reference before it was timed.
"""


def markdown(rows: Sequence[Row], about: dict[str, Any], *, planned: int) -> str:
    """Return the results as a page: what ran, the targets, and a table per operation."""
    copy = next((f"{row.bandwidth / 1e9:,.0f} GB/s" for row in rows if row.bandwidth), "none")
    lines = [f"# Kernels on {about.get('gpu')}", ""]
    lines += [f"- {name}: {value}" for name, value in about.items()]
    lines += [f"- copy on the device, read and written: {copy}"]
    lines += [f"- rows: {len(rows)} of {planned}", "", EXPLANATION, "## Targets", ""]
    for row in rows:
        for verdict in verdicts(row, rows):
            lines.append(f"- {row.operation} {row.shapes}, {row.provider}: {verdict.text()}")
    for key in dict.fromkeys(row.key for row in rows):
        chosen = [row for row in rows if row.key == key]
        lines += ["", f"## {key[0]}, {key[1]}", "", *_table(chosen)]
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[Row]) -> list[str]:
    """Return the table of one operation on one set of shapes."""
    lines = [
        "| provider | cold us | warm us | rounds | GB/s | of copy | x floor | note |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row.seconds is None or row.of_floor is None:
            lines.append(f"| {row.provider} | | | | | | | {row.note} |")
            continue
        speed = row.floor_bytes / row.seconds / 1e9
        lines.append(
            f"| {row.provider} | {_micros(row.cold)} | {_micros(row.warm)} | {row.rounds} "
            f"| {speed:,.0f} | {100 / row.of_floor:.1f} % | {row.of_floor:.2f} | {row.note} |"
        )
    return lines


def _micros(times: tuple[float, float, float] | None) -> str:
    if times is None:
        return ""
    low, median, high = (f"{1e6 * t:,.1f}" for t in times)
    return f"{median} ({low} to {high})"
