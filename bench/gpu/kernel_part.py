"""The kernel benchmark (bench_kernels.py) as a part of this one."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

from bench.gpu.plan import Plan
from bench.gpu.record import Record, Row, Status

ROOT = Path(__file__).resolve().parents[2]
BENCHMARK = "bench/bench_kernels.py"
# Enough of a rehearsal: the whole takes minutes under Triton's interpreter.
REHEARSED = "mask and (numpy or sort)"

# What pytest's report calls what did not pass.
OUTCOMES: dict[str, Status] = {"failure": "failed", "error": "failed", "skipped": "left out"}

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
    """Run the kernel benchmark and keep its figures."""
    record.columns, record.text = COLUMNS, TEXT
    report, figures = (plan.out / f"kernels-pytest.{ending}" for ending in ("xml", "json"))
    for path in (report, figures):
        path.unlink(missing_ok=True)
    command = [
        *(sys.executable, "-m", "pytest", BENCHMARK, "--benchmark-only", "-q"),
        *("-p", "no:cacheprovider", f"--junitxml={report}", f"--benchmark-json={figures}"),
        *(("-k", REHEARSED) if plan.tiny else ()),
    ]
    try:
        subprocess.run(command, cwd=ROOT, timeout=plan.left, check=False)
    except subprocess.TimeoutExpired:
        record.add(Row({"operation": "all"}, "failed", f"not done in {plan.seconds:.0f} s"))
        return
    add_rows(record, report, figures)


def add_rows(record: Record, report: Path, figures: Path) -> None:
    """Add a row per benchmark of pytest's report, with its figures where it passed."""
    if not report.exists():
        record.add(Row({"operation": "all"}, "failed", "pytest wrote no report"))
        return
    found = json.loads(figures.read_text(encoding="utf-8")) if figures.exists() else {}
    measured = {each["name"]: each for each in found.get("benchmarks", ())}
    cases = list(ET.parse(report).getroot().iter("testcase"))
    for case in cases:
        record.add(_row(case, measured.get(case.get("name", ""))))
    if not cases:
        record.add(Row({"operation": "all"}, "failed", "pytest found no benchmark"))


def _row(case: ET.Element, figures: dict[str, Any] | None) -> Row:
    name = case.get("name", "").removeprefix("bench_kernel[").removesuffix("]")
    for kind, status in OUTCOMES.items():
        problem = case.find(kind)
        if problem is not None:
            first = (problem.get("message") or kind).splitlines()[0]
            return Row({"kernel": name}, status, first)
    if figures is None:
        return Row({"kernel": name}, "failed", "passed, but pytest-benchmark has no figures of it")
    extra = figures["extra_info"]
    operation, shapes = figures["group"].split(", ", 1)
    return Row(
        {
            "operation": operation,
            "shapes": shapes,
            "provider": name.removeprefix(f"{operation}-{shapes}-"),
        },
        note=extra["note"],
        rounds=tuple(figures["stats"]["data"]),
        figures={
            "times_floor": extra["times_floor"],
            "bytes_per_second": extra["gigabytes_per_s"] * 1e9,
        },
    )
