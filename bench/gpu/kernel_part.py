"""The kernel benchmark (bench_kernels.py) as a part of this one."""

from __future__ import annotations

import os
import subprocess
import sys

from bench import gpu_results
from bench.gpu.plan import Plan
from bench.gpu.record import Record, Row
from bench.gpu.sources import ROOT
from bench.gpu_results import FAILED, OUT, ROWS, SECONDS, kept_rows

BENCHMARK = "bench/bench_kernels.py"
# Enough of a rehearsal: the whole takes minutes under Triton's interpreter.
REHEARSED = "mask and (numpy or sort)"
# Of the part's time, in which rows may begin: pytest's start comes before, and the last row, which
# may compile for a minute, ends after.
BEGINNING = 0.7
# What pytest returns where a test failed.
RED = 1

COLUMNS = (
    ("bytes_per_second", "GB/s", 1e-9),
    ("times_floor", "x floor", 1.0),
)
TEXT = """\
Times of the kernels and of other ways to do the same, with the second-level cache overwritten
before each round: median, and 20th and 80th percentile, as ``bench/bench_kernels.py`` takes them,
each provider by itself. GB/s counts the bytes that any implementation has to move.\
"""


def measure_kernels(plan: Plan, record: Record) -> None:
    """Run the kernel benchmark and keep its figures, also those of one that has to be ended."""
    record.columns, record.text = COLUMNS, TEXT
    kept = plan.out / ROWS
    kept.unlink(missing_ok=True)
    code: int | None = None
    try:
        code = run_benchmark(plan)
    finally:
        # Also after Ctrl-C: what was measured is worth keeping.
        for row, times in kept_rows(plan.out):
            record.add(row_of(row, times))
        kept.unlink(missing_ok=True)
    if code is None:
        problem = f"not done in {plan.seconds:.0f} s, with {len(record.rows)} rows at their end"
    elif code and not (code == RED and record.failed):
        problem = f"pytest ended with {code}"
    else:
        return
    record.add(Row({"operation": "all"}, "failed", problem))


def run_benchmark(plan: Plan) -> int | None:
    """Return the exit code of the kernel benchmark; None where it had to be ended."""
    command = [
        *(sys.executable, "-m", "pytest", BENCHMARK, "--benchmark-only", "-q"),
        *("-p", "no:cacheprovider"),
        *(("-k", REHEARSED) if plan.tiny else ()),
    ]
    asked = {OUT: str(plan.out), SECONDS: f"{BEGINNING * plan.left:.0f}"}
    try:
        return subprocess.run(
            command, cwd=ROOT, env={**os.environ, **asked}, timeout=plan.left, check=False
        ).returncode
    except subprocess.TimeoutExpired:
        return None


def row_of(row: gpu_results.Row, times: tuple[float, ...]) -> Row:
    """Return the row of this benchmark for one of the kernel benchmark.

    Args:
        row: from there.
        times: all of its cold times in seconds; none where it was not measured.
    """
    key: dict[str, str | int] = {
        "operation": row.operation, "shapes": row.shapes, "provider": row.provider,
    }  # fmt: skip
    if row.seconds is None:
        return Row(key, "failed" if row.note.startswith(FAILED) else "left out", row.note)
    return Row(
        key,
        note=row.note,
        rounds=times,
        figures={
            "times_floor": row.of_floor,
            "bytes_per_second": row.floor_bytes / row.seconds,
        },
    )
