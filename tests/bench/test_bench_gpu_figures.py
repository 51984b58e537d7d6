"""The GPU benchmark's figures: operations, targets, and what is written of them."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from bench import compare
from bench.gpu import ceilings, estimates, plan, steps
from bench.gpu import chart as charts
from bench.gpu.ablation import add_gains
from bench.gpu.plan import Plan, passes
from bench.gpu.record import Record, Row
from bench.gpu.sources import CODE, ROOT, TESTS, digest_of
from bench.gpu.summary import write_summary
from bench.gpu.targets import TARGETS, verdicts

CPU = torch.device("cpu")
ABOUT = {"gpu": None, "cpu": "x", "torch": "2", "tiny": True, "date": "2026-11-21", "commit": "a"}
ABOUT["dirty"] = False


@pytest.fixture
def tiny(tmp_path) -> Plan:
    return Plan(CPU, True, 60.0, tmp_path)


def new_record(part: str = "resnet18-128", **about: object) -> Record:
    return Record(part, {**ABOUT, **about})


# Operations.


def test_passes_are_those_of_the_performance_notes() -> None:
    wanted = {"natural": 3, "pgd_at": 23, "trades": 27, "cure": 33}
    assert {method: passes(method, 10) for method in plan.METHODS} == wanted


@pytest.mark.parametrize(
    ("model", "giga"), [("resnet18", 1.1108), ("preactresnet18", 1.1108), ("wrn34-10", 13.3178)]
)
def test_forward_operations_are_those_of_the_performance_notes(tmp_path, model, giga) -> None:
    assert round(steps.forward_flops(model, Plan(CPU, False, 1, tmp_path)) / 1e9, 4) == giga


def test_share_of_the_ceiling_of_a_step(tmp_path) -> None:
    figures = steps.step_figures(Plan(CPU, False, 1, tmp_path), 790e12, "resnet18")
    # The notes give a floor of 5.94 ms for CURE at batch 128 and 790 TFLOP/s.
    found = figures(Row({"method": "cure", "batch": 128}, rounds=(0.01, 0.01188, 0.02)))
    assert found["share"] == pytest.approx(0.5, abs=5e-4)
    assert found["epoch_seconds"] == pytest.approx(50_000 / 128 * 0.01188)
    assert found["images_per_second"] == pytest.approx(128 / 0.01188)


def test_convolutions_are_the_networks_distinct_ones(tmp_path) -> None:
    full = Plan(CPU, False, 1, tmp_path)
    shapes = [shape.name for shape in ceilings.convolutions("resnet18", full)]
    assert len(shapes) == len(set(shapes)) == 11
    assert shapes[:3] == ["3>64 3x3 at 32", "64>64 3x3 at 32", "64>128 3x3/2 at 32"]
    assert shapes[-1] == "256>512 1x1/2 at 8"


@pytest.mark.parametrize("part", ["forward", "to inputs", "to weights"])
def test_a_timed_convolution_is_that_pass_and_has_its_operations(tiny, part) -> None:
    shape = ceilings.Convolution(inputs=3, outputs=5, filter=3, stride=2, padding=1, side=8)
    call = ceilings.convolution(tiny, shape, 2, part)
    with FlopCounterMode(display=False) as counter:
        made = call()
    assert counter.get_total_flops() == shape.flops(2)
    if part == "forward":
        assert made.shape == (2, 5, 4, 4) and made.dtype == torch.bfloat16
    else:
        sizes = [None if grad is None else tuple(grad.shape) for grad in made]
        assert sizes == [(2, 3, 8, 8) if part == "to inputs" else None,
                         (5, 3, 3, 3) if part == "to weights" else None, None]  # fmt: skip


# What is written.


def step_row(method: str, engine: str, batch: int, ms: float, **changes: object) -> Row:
    seconds = ms / 1e3
    figures = {"epoch_seconds": 50_000 / batch * seconds, "share": 6 / ms}
    key = {"model": "resnet18", "method": method, "engine": engine, "batch": batch}
    row = Row(key, rounds=(seconds,) * 5, figures=figures, together=1)
    return replace(row, **changes)


def results(*rows: Row, tiny: bool = False, **others: Record) -> dict:
    whole = new_record(tiny=tiny)
    whole.rows = list(rows)
    records = {"resnet18-128": whole, **others}
    return {
        part: {"about": r.about, "rows": [{**vars(row), "seconds": row.seconds} for row in r.rows]}
        for part, r in records.items()
    }


def test_targets_are_the_ones_asked_for() -> None:
    assert [target.wanted for target in TARGETS] == [1.2, 5, 2.5, 16, 6.3, 37, 150, 1.5, 14, 4.5]


def test_targets_reached_missed_and_not_measured() -> None:
    rows = [
        step_row("cure", "fast", 128, 15.0),
        step_row("trades", "fast", 128, 12.0),
        step_row("cure", "authors", 128, 60.0),
        step_row("cure", "eager+compile", 128, 45.0, together=2),
    ]
    lines = verdicts(results(*rows))
    assert lines[0].startswith("missed by 4.2 %: CURE's step over TRADES'")
    assert lines[1].startswith("missed by 20.0 %") and lines[1].endswith("measured 4x")
    assert lines[2].startswith("reached") and "3x (not taken in turns)" in lines[2]
    assert lines[3] == ("reached: CURE's step, ResNet-18, batch 128, at most 16 ms; measured 15 ms")
    assert lines[4].startswith("reached") and lines[5].endswith("measured 40 %")
    assert all(lines[i].startswith("not measured") for i in (6, 7, 9))
    assert lines[8].startswith("missed by 7.1 %: beyond")


def test_the_update_is_compared_with_the_step() -> None:
    kernels = new_record("kernels", tiny=False)
    key = {"operation": "update+ema", "shapes": "resnet18"}
    # Launched by Python it takes as long as Python does; the engine replays it from a graph.
    for provider, seconds in (("triton-prepared", 0.0009), ("triton-graph", 0.0003)):
        kernels.rows.append(Row({**key, "provider": provider}, rounds=(seconds,) * 3))
    lines = verdicts(results(step_row("cure", "fast", 128, 15.0), kernels=kernels))
    assert lines[7].startswith("missed by 33.3 %")
    assert lines[7].endswith("measured 2 % (two parts' figures, the kernels' from a CUDA graph)")


def test_targets_of_other_batches_and_models_are_found_in_their_parts() -> None:
    parts = {
        "resnet18-512": ("cure", "fast", 512, 40.0),
        "wrn34-10-128": ("cure", "fast", 128, 165),
    }
    records = {part: new_record(part, tiny=False) for part in parts}
    for part, row in parts.items():
        records[part].rows = [step_row(*row)]
    lines = verdicts(results(**records))
    assert lines[6].startswith("missed by 10.0 %: CURE's step, WRN-34-10")
    assert lines[9].startswith("reached: beyond: CURE's epoch, ResNet-18, batch 512")
    assert all(lines[i].startswith("not measured") for i in (0, 1, 2, 3, 4, 5, 7, 8))


# What fits into a part's time by estimate.

FLOPS = {"resnet18": 1.1108e9, "preactresnet18": 1.1108e9, "wrn34-10": 13.3178e9}


@pytest.mark.parametrize(
    ("model", "engine", "milliseconds"),
    [
        # The notes' models and counts of an H200, which the estimates may be slower than.
        ("resnet18", "fast", (14, 21)),
        ("resnet18", "authors", (75, 125)),
        ("wrn34-10", "fast", (122, 183)),
        ("wrn34-10", "authors", (600, 700)),
    ],
)
def test_estimated_steps_are_near_those_of_the_performance_notes(
    model, engine, milliseconds
) -> None:
    found = 1e3 * estimates.step_seconds(model, "cure", engine, 128, FLOPS[model])
    assert milliseconds[0] <= found <= milliseconds[1]


def test_engines_are_estimated_in_the_order_of_their_work() -> None:
    def cure(engine: str, method: str = "cure", batch: int = 128) -> float:
        return estimates.step_seconds("resnet18", method, engine, batch, FLOPS["resnet18"])

    assert cure("fast") < cure("eager+compile") < cure("eager") < cure("authors")
    assert cure("fast", "natural") < cure("fast", "pgd_at") < cure("fast", "trades") < cure("fast")
    # A small batch's launches take longer than its operations.
    assert cure("eager", batch=8) == cure("eager", batch=16) < cure("eager", batch=256)


@pytest.mark.parametrize("part", plan.STEP_PARTS)
def test_each_part_fits_by_estimate_with_what_is_most_important(tmp_path, part) -> None:
    full = Plan(CPU, False, 450, tmp_path)
    flops = FLOPS[plan.STEP_PARTS[part][0]]
    chosen, seconds = estimates.fitting(part, full, flops)
    assert seconds <= 450 and chosen[:5] == list(plan.ORDER[:5])
    assert chosen == [each for each in plan.ORDER if each in chosen]
    if not part.startswith("wrn34-10"):
        assert len(chosen) >= len(plan.ORDER) - 1
    # Half of the time holds less, and still the first of all.
    fewer, needed = estimates.fitting(part, replace(full, seconds=225), flops)
    assert needed <= 225 and fewer[0] == ("cure", "fast") and len(fewer) < len(chosen)


def test_all_methods_and_engines_have_a_turn() -> None:
    assert len(set(plan.ORDER)) == len(plan.ORDER)
    pairs = {(m, e) for m in plan.METHODS for e in plan.ENGINES if e != "eager+reduce-overhead"}
    assert set(plan.ORDER) == pairs | {("cure", "eager+reduce-overhead")}
    assert set(estimates.RATES) == set(estimates.BUILDS) == set(plan.ENGINES)
    assert set(estimates.PARAMETERS) == set(estimates.CONVOLUTIONS) == set(plan.MODELS)


def test_a_rehearsal_and_rows_without_figures_reach_nothing() -> None:
    row = step_row("cure", "fast", 128, 1.0)
    assert all(line.startswith("not measured") for line in verdicts(results(row, tiny=True)))
    failed = replace(row, rounds=(), status="failed")
    assert all(line.startswith("not measured") for line in verdicts(results(failed)))


def test_gain_is_the_time_without_over_the_time_with_all() -> None:
    record = new_record("ablation")
    for name, ms, together in (("all features", 10, 1), ("without fold", 13, 1), ("x", 9, 2)):
        record.rows.append(step_row("cure", name, 128, ms, together=together))
    add_gains(record)
    assert [row.figures.get("gain") for row in record.rows] == [1, pytest.approx(1.3), None]


def test_record_has_every_row_with_its_reason(tmp_path) -> None:
    record = new_record()
    record.columns = (("epoch_seconds", "s/epoch", 1.0), ("peak_bytes", "peak GB", 1e-9))
    record.rows = [
        step_row("cure", "fast", 128, 16.0),
        step_row("cure", "eager", 128, 1, rounds=(), status="left out", note="no memory"),
        step_row("cure", "authors", 128, 1, rounds=(), status="failed", note="ValueError: x"),
    ]
    record.write(tmp_path)
    page = (tmp_path / "resnet18-128.md").read_text()
    assert "| resnet18 | cure | fast | 128 | 16.000 | 16.000 to 16.000 | 5 | 6.25 | 1 |  |" in page
    assert "## Left out\n\n- resnet18 cure eager 128: no memory" in page
    assert "## Failed\n\n- resnet18 cure authors 128: ValueError: x" in page
    assert "peak GB" not in page and "did not come to its end" in page and "rehearsal" in page
    kept = json.loads((tmp_path / "resnet18-128.json").read_text())["rows"]
    assert kept[0]["rounds"] == [0.016] * 5 and kept[0]["seconds"] == [0.016] * 3
    assert [row["status"] for row in kept] == ["measured", "left out", "failed"]
    assert compare.read(tmp_path).rows["resnet18-128 resnet18 cure fast 128"] == (0.016,) * 3


def test_summary_names_another_gpu_and_draws_what_was_measured(tmp_path) -> None:
    for part, batch in (("resnet18-512", 512), ("resnet18-128", 128), ("feeds", 128)):
        record = new_record(part, gpu="NVIDIA H100", tiny=False)
        record.rows = [step_row("cure", "fast", batch, 16.0)]
        record.finished = True
        record.write(tmp_path)
    nothing = new_record("wrn34-10-128", gpu="NVIDIA H100", tiny=False)
    nothing.rows = [step_row("cure", "fast", 128, 1, rounds=(), status="left out")]
    nothing.write(tmp_path)
    sources = digest_of(ROOT, (*CODE, *TESTS))
    state = {"tests": ["-m gpu tests/engine", "tests/a.py"], "sources": sources}
    passed = {"state": state, "passed": 7}
    (tmp_path / "tests.json").write_text(json.dumps(passed))
    page = write_summary(tmp_path).read_text()
    assert "7 tests passed on the present sources: `pytest -m gpu tests/engine` and" in page
    assert "REHEARSAL" not in page
    assert "![Seconds per epoch, resnet18-512](resnet18-512.svg)" in page
    assert "They are of an H200; this is another GPU (NVIDIA H100)." in page
    assert "- reached: CURE's step, ResNet-18, batch 128" in page
    assert "| [resnet18-128](resnet18-128.md) | 1 | 0 | 0 | 2026-11-21 | a |" in page
    assert "| [wrn34-10-128](wrn34-10-128.md), unfinished | 0 | 1 | 0 |" in page
    charts = list(tmp_path.glob("*.svg"))
    assert not any("REHEARSAL" in path.read_text() for path in charts)
    drawn = {path.name for path in charts}
    assert drawn == {"resnet18-128.svg", "resnet18-512.svg"}


def test_summary_marks_parts_and_tests_of_other_sources(tmp_path) -> None:
    root, out = tmp_path / "root", tmp_path / "out"
    (root / "cure_fast").mkdir(parents=True)
    (root / "tests").mkdir()
    new_record("kernels").write(out)
    new_record("feeds", sources=digest_of(root, CODE)).write(out)
    assert "**Nothing is known of the tests**" in write_summary(out, root=root).read_text()
    state = {"tests": ["tests/a.py"], "sources": digest_of(root, (*CODE, *TESTS))}
    (out / "tests.json").write_text(json.dumps({"state": state, "passed": 7}))
    # A test that changes leaves the figures as they are.
    (root / "tests" / "test_it.py").write_text("1")
    page = write_summary(out, root=root).read_text()
    assert "**The tests have not run on the present sources**: 7 passed before" in page
    parts = {line.split("|")[1].split("]")[0]: line for line in page.splitlines() if ".md)" in line}
    assert parts[" [feeds"].endswith("| present |")
    assert parts[" [kernels"].endswith("| **not recorded** |")
    assert "**Not all parts are of the present sources**" in page
    (out / "kernels.json").unlink()
    assert "Not all parts" not in write_summary(out, root=root).read_text()
    (root / "cure_fast" / "new.py").write_text("1")
    page = write_summary(out, root=root).read_text()
    assert "| **changed since** |" in page and "**Not all parts" in page


@given(
    st.lists(st.floats(1e-3, 1e4), min_size=1, max_size=5),
    st.integers(1, 3),
    st.floats(1, 1.5),
)
def test_chart_is_readable_whatever_the_values(values, groups, slack) -> None:
    bars = [charts.Bar(f"a<{i}>", v / slack, v, v * slack) for i, v in enumerate(values)]
    drawing = ET.fromstring(
        charts.bar_chart("T & t", "note", {f"g{i}": bars for i in range(groups)})
    )
    space = "{http://www.w3.org/2000/svg}"
    width, height = int(drawing.get("width")), float(drawing.get("height"))
    texts = drawing.findall(f"{space}text")
    assert width == 900 and min(int(t.get("font-size")) for t in texts) >= 13
    assert all(0 <= float(t.get("y")) <= height for t in texts)
    # A digit is at most 0.65 em wide, so that the value of the longest bar stays inside.
    ends = [float(t.get("x")) + 9.1 * len(t.text) for t in texts if (t.text or "").endswith(" s")]
    assert len(ends) == groups * len(bars) and max(ends) <= width
    rects = drawing.findall(f"{space}rect")[1:]
    lengths = [float(rect.get("width")) for rect in rects[: len(bars)]]
    scale = max(lengths) / max(values)
    for length, value in zip(lengths, values, strict=True):
        # Rounded to a tenth, and never thinner than a pixel.
        assert abs(length - max(1.0, scale * value)) <= 0.11 + 0.06 * value / max(values)


def test_ticks_are_round_and_reach_the_largest() -> None:
    assert charts.nice_ticks(33.0) == [0, 5, 10, 15, 20, 25, 30, 35]
    assert charts.nice_ticks(0.6) == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6])


@pytest.mark.parametrize(
    ("on_gpu", "one", "count", "rounds"),
    [(True, 1e-5, 200, 50), (True, 1e-4, 20, 50), (True, 0.04, 5, 5), (False, 1e-5, 5, 2)],
)
def test_small_calls_are_replayed_by_the_hundred(
    tmp_path, monkeypatch, on_gpu, one, count, rounds
) -> None:
    """A convolution of some microseconds takes Python longer to launch than the GPU to do."""
    called, graphs = [], []

    def captured(calls):
        before = len(called)
        calls()
        graphs.append(len(called) - before)
        return lambda: called.extend([1] * graphs[0])

    def step_times(work, number, plan) -> list[float]:
        before = len(called)
        work.step()
        return [(len(called) - before) * one] * number

    monkeypatch.setattr(ceilings, "captured", captured)
    monkeypatch.setattr(ceilings, "step_times", step_times)
    plan = Plan(torch.device("cuda" if on_gpu else "cpu"), not on_gpu, 60, tmp_path)
    found = ceilings.call_times(lambda: called.append(1), plan)
    assert found == pytest.approx([one] * rounds)
    assert graphs == ([count] if on_gpu else [])
