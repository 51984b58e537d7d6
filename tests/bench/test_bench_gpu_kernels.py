"""The kernel benchmark as a part of the GPU benchmark: its rows, however it ends."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import gpu_results
from bench.gpu import kernel_part
from bench.gpu.plan import Plan
from bench.gpu.record import Record

GRAPH = gpu_results.Row(
    "update+ema", "resnet18", "triton-graph",
    cold=(1e-4, 2e-4, 3e-4), rounds=3, floor_bytes=400_000, bandwidth=1e12,
)  # fmt: skip
TIMES = (1e-4, 2e-4, 3e-4)
KILLED = """
import os, signal
from bench.gpu_results import Row, keep_row

def test_mask_numpy(benchmark):
    figures = {"cold": (1e-4,) * 3, "floor_bytes": 8, "bandwidth": 1e9}
    keep_row(Row("mask", "resnet18", "triton", **figures), [1e-4])
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def tiny(tmp_path) -> Plan:
    return Plan(torch.device("cpu"), True, 60.0, tmp_path)


def keep(folder: Path, row: gpu_results.Row, times: tuple[float, ...] = ()) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_results, "FOLDER", folder)
        gpu_results.keep_row(row, times)


def test_kernel_rows_are_those_of_the_kernel_benchmark(tiny, monkeypatch) -> None:
    def run_benchmark(plan) -> int:
        assert not (plan.out / gpu_results.ROWS).exists(), "rows of a run before"
        keep(plan.out, GRAPH, TIMES)
        for note in ("FAILED: 3 wrong", "refused: too large", "not measured: 300 s had passed"):
            keep(plan.out, replace(GRAPH, cold=None, note=note))
        return kernel_part.RED

    keep(tiny.out, GRAPH)
    monkeypatch.setattr(kernel_part, "run_benchmark", run_benchmark)
    record = Record("kernels", {"tiny": True})
    kernel_part.measure_kernels(tiny, record)
    first, failed, refused, late = record.rows
    assert list(first.key.values()) == ["update+ema", "resnet18", "triton-graph"]
    assert first.rounds == TIMES and first.seconds == pytest.approx((1.4e-4, 2e-4, 2.6e-4))
    assert first.figures == pytest.approx({"times_floor": 500, "bytes_per_second": 2e9})
    assert (failed.status, failed.note) == ("failed", "FAILED: 3 wrong")
    assert [row.status for row in (refused, late)] == ["left out"] * 2
    assert not list(tiny.out.iterdir())


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (0, None),
        (1, "pytest ended with 1"),
        (-11, "pytest ended with -11"),
        (None, "not done in 60 s, with 1 rows at their end"),
    ],
)
def test_a_kernel_benchmark_that_does_not_come_to_its_end_keeps_its_rows(
    tiny, monkeypatch, code, said
) -> None:
    monkeypatch.setattr(
        kernel_part, "run_benchmark", lambda plan: keep(plan.out, GRAPH, TIMES) or code
    )
    record = Record("kernels", {"tiny": True})
    kernel_part.measure_kernels(tiny, record)
    assert record.rows[0].rounds == TIMES
    assert [row.note for row in record.rows[1:]] == ([said] if said else [])
    assert len(record.failed) == bool(said)


def test_an_interrupted_kernel_benchmark_keeps_its_rows(tiny, monkeypatch) -> None:
    def run_benchmark(plan) -> int:
        keep(plan.out, GRAPH, TIMES)
        raise KeyboardInterrupt

    monkeypatch.setattr(kernel_part, "run_benchmark", run_benchmark)
    record = Record("kernels", {"tiny": True})
    with pytest.raises(KeyboardInterrupt):
        kernel_part.measure_kernels(tiny, record)
    assert [row.rounds for row in record.rows] == [TIMES]


def test_a_killed_kernel_benchmark_keeps_its_rows(tiny, tmp_path, monkeypatch) -> None:
    benchmark = tmp_path / "bench_killed.py"
    benchmark.write_text(KILLED)
    monkeypatch.setattr(kernel_part, "BENCHMARK", str(benchmark))
    # By it pytest-benchmark would take the child for one of several workers, and refuse to time.
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    record = Record("kernels", {"tiny": True})
    kernel_part.measure_kernels(replace(tiny, out=tmp_path), record)
    assert [row.name for row in record.rows] == ["mask resnet18 triton", "all"]
    assert record.rows[0].rounds == (1e-4,)
    assert record.rows[1].note == "pytest ended with -9"


def test_a_slow_kernel_benchmark_is_ended_and_has_to_begin_its_last_row_before(
    tiny, monkeypatch
) -> None:
    asked = {}

    def run(command, *, env, timeout, **_):
        asked.update(env, timeout=timeout)
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(kernel_part.subprocess, "run", run)
    assert kernel_part.run_benchmark(replace(tiny, seconds=450)) is None
    assert 440 < asked["timeout"] <= 450 and 300 < float(asked[gpu_results.SECONDS]) <= 315
    assert asked[gpu_results.OUT] == str(tiny.out)
