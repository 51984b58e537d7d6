"""Times of the kernels beside other ways to do the same, on real gradient shapes.

    python -m pytest bench/bench_kernels.py --benchmark-only

On a CUDA GPU it takes some minutes and writes bench/results/<gpu>-kernels.json and .md, after each
row, so that what was measured stays; CURE_FAST_BENCH_OUT names another folder. Run the tests marked
``gpu`` before. Without a GPU it rehearses: tiny shapes, Triton's interpreter, no CUDA graphs, and
neither file is written.

Every result is compared with the reference before it is timed; a provider that differs fails and
gets no figure. How the times are taken: device_timing.py. Who competes: kernel_providers.py.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.device_timing import DeviceTimer, copy_bandwidth, rounds_within, spread
from bench.gpu_results import (
    FAILED,
    KERNELS,
    OUT,
    SECONDS,
    Row,
    keep_row,
    without_folders,
    write_results,
)
from bench.kernel_cases import Case, differing
from bench.kernel_operations import all_cases
from bench.kernel_providers import Step
from cure_fast.kernels.dispatch import VARIABLE
from cure_fast.runs.environment import environment

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
if not GPU:
    # Read when a kernel is defined, so it is set before any is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def in_turn(cases: Iterable[Case]) -> list[tuple[Case, str]]:
    """Return cases with their providers: the kernels of all, then rivals, what compiles last.

    Where time runs out it is the slow rivals that are missing, and no kernel.
    """

    def turn(item: tuple[Case, str]) -> int:
        return 0 if item[1].startswith(KERNELS) else 2 if item[1].startswith("compile") else 1

    return sorted(((case, name) for case in cases for name in case.providers), key=turn)


TIMER = DeviceTimer(DEVICE)
ITEMS = in_turn(all_cases(rehearsal=not GPU))
# Seconds that the timed rounds of one row may take, cold and warm each, and how many rounds.
BUDGET, MOST, LEAST = 0.4, 200, 3
REHEARSED = 2
# A step longer than this is timed cold alone: it does not fit into the cache anyway.
LONG = 0.05
# What has not begun after so many seconds is reported as not measured.
DEADLINE = float(os.environ.get(SECONDS) or 400)
# These round the threshold or the scores otherwise (interpolation or a rank in float32, fused
# multiplication and addition), so that weights whose score is next to the threshold may fall on
# the other side: this share of a tensor's elements, and at least one, may differ.
ROUNDED = ("numpy", "torch-quantile", "compile-")
STRAY = 1e-5


@dataclass
class Results:
    """What the run has found so far.

    Attributes:
        bandwidth: of a copy, bytes per second.
        rows: one per provider of each case.
        expected: results of the reference of the case at hand, by operation and shapes.
    """

    bandwidth: float
    rows: list[Row] = field(default_factory=list)
    expected: dict[tuple[str, str], list[Tensor]] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    def add(self, row: Row, about: dict[str, Any], times: Sequence[float] = ()) -> None:
        """Keep a row, with its cold times for a caller who asks for them; write the files anew."""
        self.rows.append(row)
        if os.environ.get(OUT):
            keep_row(row, times)
        if GPU:
            write_results(self.rows, about, planned=len(ITEMS))

    def of_reference(self, case: Case, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
        """Return what the reference makes of the case's inputs."""
        key = case.operation, case.shapes
        if key not in self.expected:
            self.expected.clear()
            monkeypatch.setenv(VARIABLE, "reference")
            inputs = case.make(DEVICE)
            self.expected[key] = [t.clone() for t in case.reference(inputs)()]
        return self.expected[key]


@pytest.fixture(scope="module")
def about() -> dict[str, Any]:
    """What the run ran on."""
    found = environment()
    kept = ("gpu", "driver", "torch", "triton", "numpy", "python", "cpu", "commit", "dirty")
    return {name: found[name] for name in kept} | {"date": found["started"]}


@pytest.fixture(scope="module")
def results() -> Iterator[Results]:
    bandwidth = copy_bandwidth(TIMER)
    kind = "GPU" if GPU else "CPU: a rehearsal on tiny shapes, no result is written"
    print(f"\n{kind}; a copy moves {bandwidth / 1e9:,.1f} GB/s")
    yield Results(bandwidth)


def difference(
    outputs: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float, stray: float
) -> str:
    """Return how many elements differ, as a note; empty for none.

    Raises:
        AssertionError: if more than the share ``stray`` of a tensor's elements differ.
    """
    assert len(outputs) == len(expected), f"{len(outputs)} results, not {len(expected)}"
    total = 0
    for i, (found, wanted) in enumerate(zip(outputs, expected, strict=True)):
        assert found.shape == wanted.shape and found.dtype == wanted.dtype
        wrong = int(differing(found, wanted, tolerance).sum())
        allowed = max(1, int(stray * found.numel())) if stray else 0
        assert wrong <= allowed, f"result {i}: {wrong} of {found.numel()} elements are wrong"
        total += wrong
    return f"{total} elements differ: its rounding" if total else ""


def ready_step(case: Case, name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Step]:
    """Return the inputs, at their first values, and the provider's step, prepared."""
    monkeypatch.setenv(VARIABLE, "triton" if name.startswith("triton") else "reference")
    # What was compiled for other shapes would count against the limit of recompilations.
    torch.compiler.reset()
    inputs = case.make(DEVICE)
    step = case.providers[name](inputs)
    if case.restore is not None:
        # A captured step has run already.
        case.restore(inputs)
    return inputs, step


def measure(step: Step, benchmark: Any) -> tuple[list[float], list[float]]:
    """Return the cold times, through pytest-benchmark, and the warm ones."""
    TIMER.abandon()
    TIMER.cold = True
    if not GPU:
        benchmark.pedantic(step, rounds=REHEARSED)
        return benchmark.stats.stats.data, []
    one = min(TIMER.seconds(step, 2))
    rounds = rounds_within(BUDGET, one, most=MOST, least=LEAST)
    benchmark.pedantic(step, rounds=rounds, warmup_rounds=1 if one > LONG else 3)
    if one > LONG:
        return benchmark.stats.stats.data, []
    TIMER.cold = False
    return benchmark.stats.stats.data, TIMER.seconds(step, rounds + 1)[1:]


@pytest.mark.benchmark(timer=TIMER)
@pytest.mark.parametrize(
    ("case", "name"),
    [pytest.param(*item, id=f"{item[0].operation}-{item[0].shapes}-{item[1]}") for item in ITEMS],
)
def bench_kernel(benchmark, monkeypatch, results: Results, about, case: Case, name: str):
    benchmark.group = f"{case.operation}, {case.shapes}"
    row = partial(Row, case.operation, case.shapes, name)
    if time.monotonic() - results.began > DEADLINE:
        results.add(row(note=f"not measured: {DEADLINE:.0f} s had passed"), about)
        pytest.skip(f"{DEADLINE:.0f} s have passed")
    try:
        expected = results.of_reference(case, monkeypatch)
        inputs, step = ready_step(case, name, monkeypatch)
        stray = STRAY if name.startswith(ROUNDED) else 0
        note = difference(step(), expected, case.tolerance, stray)
        cold, warm = measure(step, benchmark)
    except Exception as error:
        refused = "too large" in str(error)
        lines = without_folders(str(error)).strip().splitlines()
        first_line = (lines or [type(error).__name__])[0]
        results.add(row(note=f"{'refused' if refused else FAILED}: {first_line}"), about)
        if refused:
            pytest.skip(f"{name} refuses these shapes: {first_line}")
        raise
    found = row(
        note=note,
        cold=spread(cold),
        warm=spread(warm) if warm else None,
        rounds=len(cold),
        floor_bytes=case.floor_bytes(inputs),
        bandwidth=results.bandwidth,
    )
    results.add(found, about, cold)
    benchmark.extra_info |= {
        "device": str(DEVICE),
        "floor_bytes": found.floor_bytes,
        "gigabytes_per_s": found.floor_bytes / spread(cold)[1] / 1e9,
        "times_floor": found.of_floor,
        "cold_20_50_80": found.cold,
        "warm_20_50_80": found.warm,
        "note": note,
    }
