"""The kernel benchmark's own parts: what it compares, counts, judges and writes."""

from __future__ import annotations

import json
import re
import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench import bench_kernels, gpu_results, kernel_cases, kernel_providers
from bench.device_timing import DeviceTimer, rounds_within, spread
from bench.gpu_results import OUT, ROWS, SECONDS, Row, kept_rows, markdown, verdicts, write_results
from bench.kernel_cases import Case
from bench.kernel_inputs import LAYOUTS, model_tensors, plain_layout
from bench.kernel_operations import all_cases

CPU = torch.device("cpu")
ABOUT = {"gpu": "NVIDIA H200", "driver": "1", "torch": "2", "triton": "3", "commit": "abc"}


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch) -> None:
    """Keep the results of a real run: on a GPU each toy row is written."""
    monkeypatch.setattr(gpu_results, "FOLDER", tmp_path / "results")


def row(provider: str, microseconds: float | None, **changes: object) -> Row:
    times = None if microseconds is None else (microseconds / 1e6,) * 3
    base = Row(
        "update", "resnet18", provider, cold=times, rounds=50, floor_bytes=10**8, bandwidth=1e12
    )
    return replace(base, **changes)


def rehearsal_tensors(**changes: object):
    tensors = model_tensors(LAYOUTS["rehearsal"](), CPU, torch.float32)
    return replace(tensors, initial=[], **changes)


# Inputs.


def test_layouts_have_the_models_weights_and_exempt_the_classifier():
    for name, millions, exempt in (("resnet18", 11.174, 5130), ("wrn34-10", 46.160, 6410)):
        layout = LAYOUTS[name]()
        counts = [shape.numel() for _, shape, _, _ in layout]
        assert round(sum(counts) / 1e6, 3) == millions
        assert sum(n for n, (*_, masked) in zip(counts, layout, strict=True) if not masked) == (
            exempt
        )
    big = [shape.numel() for _, shape, _, _ in LAYOUTS["100M"]()]
    assert 99e6 < sum(big) < 101e6 and max(big) > 2**24


def test_tensors_lie_channels_last_and_are_the_same_at_each_call():
    first, second = rehearsal_tensors(), rehearsal_tensors()
    assert first.nat[0].is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(a, b) for a, b in zip(first.nat, second.nat, strict=True))
    assert not torch.equal(first.nat[0], first.adv[0])
    scales = torch.tensor([float(g.std()) for g in first.nat])
    assert scales.max() > 2 * scales.min() and 1e-6 < scales.min() and scales.max() < 0.1


def test_restore_brings_back_values_at_the_same_addresses():
    tensors = rehearsal_tensors()
    addresses, first = [p.data_ptr() for p in tensors.params], tensors.params[0].clone()
    for several in (tensors.params, tensors.grads, tensors.momentum, tensors.averages):
        torch._foreach_zero_(several)
    tensors.restore()
    assert [p.data_ptr() for p in tensors.params] == addresses
    assert torch.equal(tensors.params[0], first) and tensors.averages[0].abs().max() > 0


@pytest.mark.parametrize(
    ("dtype", "update", "ema", "masked", "exempt"),
    [
        (torch.float32, False, False, 12, 0),
        (torch.float32, True, False, 28, 20),
        (torch.float32, True, True, 36, 28),
        (torch.bfloat16, True, False, 22, 18),
    ],
)
def test_floor_counts_each_input_and_output_once(dtype, update, ema, masked, exempt):
    tensors = model_tensors(plain_layout([(10,), (7,)], exempt=1), CPU, dtype)
    wanted = 10 * masked + 7 * exempt
    assert kernel_cases.model_floor(tensors, update=update, ema=ema) == wanted


# Providers.


@given(st.integers(1, 3000), st.integers(0, 2**31 - 1), st.booleans())
def test_counting_finds_the_order_statistics_that_sorting_finds(count, seed, few_values):
    generator = np.random.default_rng(seed)
    width = kernel_providers.ROW
    vectors = [generator.exponential(size=n).astype(np.float32) for n in (count, 5)]
    if few_values:
        vectors = [np.round(v) for v in vectors]
    rows, segments = [], []
    for i, vector in enumerate(vectors):
        bits = np.full(-(-len(vector) // width) * width, kernel_providers.LARGEST, np.int32)
        bits[: len(vector)] = vector.view(np.int32)
        rows.append(bits.reshape(-1, width))
        segments += [i] * len(rows[-1])
    ranks = [kernel_providers.rank_of(len(v)) for v in vectors]
    found = torch.zeros(2, dtype=torch.int32)
    for steps in kernel_providers.digit_steps(CPU):
        found = kernel_providers.find_digit(
            torch.from_numpy(np.concatenate(rows)),
            torch.tensor(segments),
            found,
            torch.tensor(ranks, dtype=torch.int32),
            steps,
        )
    wanted = [np.sort(v)[r] for v, r in zip(vectors, ranks, strict=True)]
    assert found.view(torch.float32).tolist() == wanted


@pytest.mark.parametrize("name", list(kernel_cases.THRESHOLDS))
def test_rivals_mask_what_numpy_in_float64_masks(name):
    tensors = rehearsal_tensors()
    before = [g.clone() for g in tensors.grads]
    case = kernel_cases.model_case("mask", "rehearsal", [name])
    case.providers[name](tensors)()
    for grad, old, nat, adv, masked in zip(
        tensors.grads, before, tensors.nat, tensors.adv, tensors.masked, strict=True
    ):
        scores = 0.1 * nat.double().abs().numpy() + 0.9 * adv.double().abs().numpy()
        low = torch.from_numpy(scores < np.percentile(scores, 30))
        assert torch.equal(grad, old.masked_fill(low, 0) if masked else old)
        assert masked or not (grad == 0).any()


def test_update_is_that_of_torch_sgd():
    tensors = rehearsal_tensors()
    tensors.masked = [True] * len(tensors.params)
    torch._foreach_zero_(tensors.momentum)
    params = [p.clone().requires_grad_() for p in tensors.params]
    average = tensors.averages[0].clone()
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=5e-4)
    case = kernel_cases.model_case("update+ema", "rehearsal", ["torch-sort"])
    step = case.providers["torch-sort"](tensors)
    for _ in range(2):
        step()
        for p, grad in zip(params, tensors.grads, strict=True):
            p.grad = grad.clone()
        optimizer.step()
        average = 0.999 * average + 0.001 * params[0].detach()
    for mine, torchs in zip(tensors.params, params, strict=True):
        torch.testing.assert_close(mine, torchs.detach(), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(tensors.averages[0], average, rtol=1e-6, atol=1e-8)


# Comparing before timing.


def test_difference_counts_and_limits():
    wanted = [torch.arange(1.0, 1001)]
    near = [wanted[0].clone()]
    assert bench_kernels.difference(near, wanted, 0, 0) == ""
    near[0][5] = 0
    assert bench_kernels.difference(near, wanted, 0, 1e-5).startswith("1 elements differ")
    with pytest.raises(AssertionError, match="1 of 1000 elements are wrong"):
        bench_kernels.difference(near, wanted, 1e-6, 0)
    near[0][6] = float("nan")
    with pytest.raises(AssertionError, match="2 of 1000 elements are wrong"):
        bench_kernels.difference(near, wanted, 1e-6, 1e-5)
    with pytest.raises(AssertionError, match="0 results, not 1"):
        bench_kernels.difference([], wanted, 0, 0)
    with pytest.raises(AssertionError):
        bench_kernels.difference([wanted[0].double()], wanted, 0, 0)


def toy_case(**providers) -> Case:
    return Case(
        "toy",
        "small",
        make=lambda device: torch.ones(4, device=device),
        restore=None,
        floor_bytes=lambda x: 8 * x.numel(),
        reference=lambda x: lambda: [x * 2],
        providers=providers,
        tolerance=0,
    )


class FakeBenchmark:
    """Stands for pytest-benchmark's fixture: runs the rounds and keeps their times."""

    def __init__(self) -> None:
        self.extra_info, self.group, self.runs = {}, "", 0

    def pedantic(self, function, rounds, warmup_rounds=0):
        for _ in range(rounds + warmup_rounds):
            function()
        self.runs = rounds
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=[1e-6] * rounds))


def test_a_right_provider_gets_figures(monkeypatch):
    results, benchmark = bench_kernels.Results(1e9), FakeBenchmark()
    case = toy_case(mine=lambda x: lambda: [x + x])
    bench_kernels.bench_kernel(benchmark, monkeypatch, results, ABOUT, case, "mine")
    (found,) = results.rows
    assert found.rounds == benchmark.runs >= 2 and found.cold == (1e-6,) * 3
    assert found.floor_bytes == 32 and benchmark.extra_info["gigabytes_per_s"] == 0.032
    assert found.of_floor == pytest.approx(1e-6 / 32e-9)


def test_a_wrong_provider_fails_and_gets_no_figure(monkeypatch):
    results, benchmark = bench_kernels.Results(1e9), FakeBenchmark()
    case = toy_case(mine=lambda x: lambda: [x * 2.0000002])
    with pytest.raises(AssertionError, match="4 of 4 elements are wrong"):
        bench_kernels.bench_kernel(benchmark, monkeypatch, results, ABOUT, case, "mine")
    (found,) = results.rows
    assert found.cold is None and found.note.startswith("FAILED: ") and not benchmark.runs


def test_a_provider_that_refuses_the_shapes_is_reported_so(monkeypatch):
    def refuse(x):
        return lambda: torch.quantile(torch.empty(2**24 + 1), 0.3)

    results = bench_kernels.Results(1e9)
    with pytest.raises(pytest.skip.Exception, match="refuses these shapes"):
        bench_kernels.bench_kernel(
            FakeBenchmark(), monkeypatch, results, ABOUT, toy_case(mine=refuse), "mine"
        )
    assert results.rows[0].note.startswith("refused: ") and results.rows[0].cold is None


def test_what_begins_after_the_deadline_is_not_measured(monkeypatch):
    results = bench_kernels.Results(1e9, began=-1e9)
    with pytest.raises(pytest.skip.Exception, match="have passed"):
        bench_kernels.bench_kernel(
            FakeBenchmark(), monkeypatch, results, ABOUT, toy_case(mine=None), "mine"
        )
    assert results.rows[0].note.startswith("not measured")


@pytest.mark.parametrize("rehearsal", [True, False])
def test_kernels_come_first_and_what_compiles_last(rehearsal):
    items = bench_kernels.in_turn(all_cases(rehearsal=rehearsal))
    kinds = "".join(
        "k" if name.startswith("triton") else "c" if name.startswith("compile") else "r"
        for _, name in items
    )
    assert re.fullmatch("k+r+c+", kinds)
    # Among rivals those of the model's selection are the slow ones.
    for kind in "krc":
        models = [
            case.operation in ("mask", "update", "update+ema")
            for (case, _), other in zip(items, kinds, strict=True)
            if other == kind
        ]
        assert models == sorted(models) and not models[0] and models[-1]


def test_the_caller_says_where_results_go_and_in_what_time(tmp_path, monkeypatch):
    """Read where the modules are, in the process of the benchmark."""
    results = str(Path(gpu_results.__file__).with_name("results"))
    for named, folder, seconds in (
        ({}, results, 400.0),
        ({OUT: str(tmp_path), SECONDS: "7"}, str(tmp_path), 7.0),
    ):
        for name in (OUT, SECONDS):
            monkeypatch.delenv(name, raising=False)
        for name, value in named.items():
            monkeypatch.setenv(name, value)
        assert str(runpy.run_path(gpu_results.__file__)["FOLDER"]) == folder
        assert runpy.run_path(bench_kernels.__file__)["DEADLINE"] == seconds


def test_each_row_is_kept_for_a_caller_and_a_cut_one_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_results, "FOLDER", tmp_path)
    results, missing = bench_kernels.Results(1e9), row("numpy", None, note="FAILED: x")
    results.add(row("triton", 120), ABOUT, [1e-4, 2e-4])
    assert kept_rows(tmp_path) == []
    monkeypatch.setenv(OUT, str(tmp_path))
    results.add(row("triton", 120), ABOUT, [1e-4, 2e-4])
    results.add(missing, ABOUT)
    with (tmp_path / ROWS).open("a") as file:
        file.write('{"row": {"operation": "upd')
    (first, times), (second, none) = kept_rows(tmp_path)
    assert times == (1e-4, 2e-4) and first.of_floor == pytest.approx(1.2)
    assert (second, none) == (missing, ())


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("no file '/data/someone/a b/x.so': none", "no file 'a b/x.so': none"),
        ("in /tmp/torchinductor_me/ab/cd.py, line 3", "in cd.py, line 3"),
        ("see https://pytorch.org/docs/x.html", "see https://pytorch.org/docs/x.html"),
        ("tests/engine: 3 images/s of ~/runs/a", "tests/engine: 3 images/s of ~/runs/a"),
        ('File "/lib/a.py"', 'File "a.py"'),
    ],
)
def test_folders_of_a_machine_are_cut(text, wanted):
    assert gpu_results.without_folders(text) == wanted


def test_a_failures_note_names_no_folder(monkeypatch):
    def broken(x):
        raise RuntimeError("cannot open /data/someone/libx.so")

    results = bench_kernels.Results(1e9)
    with pytest.raises(RuntimeError):
        bench_kernels.bench_kernel(
            FakeBenchmark(), monkeypatch, results, ABOUT, toy_case(mine=broken), "mine"
        )
    assert results.rows[0].note == "FAILED: cannot open libx.so"


# Times.


def test_spread_and_rounds():
    assert spread([4.0, 1.0, 2.0, 3.0, 5.0, 6.0]) == (2.0, 3.5, 5.0)
    assert spread([2.0]) == (2.0, 2.0, 2.0)
    assert rounds_within(1.0, 0.01, most=200, least=3) == 100
    assert rounds_within(1.0, 10.0, most=200, least=3) == 3
    assert rounds_within(1.0, 0.0, most=200, least=3) == 200


def test_the_timer_counts_only_the_work():
    timer, calls = DeviceTimer(CPU), []
    times = timer.seconds(lambda: calls.append(1), 3)
    assert len(times) == len(calls) == 3 and all(0 <= t < 1 for t in times)


# Records.


def test_verdicts_of_a_kernel_that_meets_all():
    rows = [
        row("numpy", 50_000),
        row("torch-kthvalue", 5000),
        row("compile-sort", 900),
        row("compile-bisect", 600),
        row("triton-graph", 120),
    ]
    found = verdicts(rows[-1], rows)
    assert [v.met for v in found] == [True] * 4
    assert [v.found for v in found] == pytest.approx([1.2, 50_000 / 120, 5000 / 120, 5.0])
    assert found[0].text() == "floor, at most 1.6x: 1.20x, met by 1.33x"
    assert "best torch.compile" in found[3].text()
    assert verdicts(rows[0], rows) == []


def test_verdicts_of_a_kernel_that_misses():
    rows = [row("numpy", 1000), row("compile-sort", 300), row("triton", 200)]
    found = verdicts(rows[-1], rows)
    assert [v.met for v in found] == [False, False, None, False]
    assert found[0].text() == "floor, at most 1.6x: 2.00x, missed by 1.25x"
    assert found[2].text() == "over torch-kthvalue, at least 20x: not measured"
    wide = replace(rows[-1], shapes="wrn34-10")
    assert verdicts(wide, [wide])[0].wanted == 1.5
    failed = row("triton", None, note="FAILED")
    assert [v.met for v in verdicts(failed, [*rows, failed])] == [None] * 4


def test_results_are_written_and_read_back(tmp_path):
    rows = [row("numpy", 50_000), row("triton", None, note="FAILED: x"), row("triton-graph", 120)]
    page = write_results(rows, ABOUT, planned=9)
    assert page == tmp_path / "results" / "nvidia-h200-kernels.md"
    assert sorted(p.name for p in page.parent.iterdir()) == [
        "nvidia-h200-kernels.json",
        "nvidia-h200-kernels.md",
    ]
    record = json.loads(page.with_suffix(".json").read_text())
    assert record["about"] == ABOUT and record["planned"] == 9 and len(record["rows"]) == 3
    assert record["rows"][2]["targets"][0]["met"] is True
    text = page.read_text()
    assert text == markdown(rows, ABOUT, planned=9)
    assert "- rows: 3 of 9" in text and "1,000 GB/s" in text
    assert "| triton-graph | 120.0 (120.0 to 120.0) |  | 50 | 833 | 83.3 % | 1.20 |" in text
    assert "| triton | | | | | | | FAILED: x |" in text
    assert "update resnet18, triton-graph: over numpy, at least 100x: 416.67x, met" in text


def test_results_of_a_cpu_are_refused(tmp_path):
    with pytest.raises(ValueError, match="expected the name of the CUDA GPU"):
        write_results([row("triton", 1.0)], {"gpu": None}, planned=1)
    assert not list(tmp_path.iterdir())
