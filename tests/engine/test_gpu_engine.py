"""The fast engine on a GPU: captured steps are the eager ones, in one graph, without waiting."""

from __future__ import annotations

import copy
import gc
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import engine_runs as runs
from cure_fast.batch import Batch
from cure_fast.engine.cuda_graph import CapturedStep
from cure_fast.engine.fast import COMPILED, WARM_UP
from cure_fast.evaluation.trust import full_precision
from cure_fast.kernels.ema import flip_coin_ref
from cure_fast.loaders import ImageSet, make_loader
from cure_fast.loaders.ffcv_reader import ffcv_problem
from cure_fast.step.run import Run
from gpu_cases import no_waiting

pytestmark = pytest.mark.gpu

# Read when cuBLAS starts: its sums are then the same in each run.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

GPU = torch.device("cuda", 0)
HALF = torch.bfloat16
METHODS = ("pgd_at", "trades", "cure")
# cuDNN's algorithms round differently, Winograd's by some 1e-5. Where the forward passes do, a ReLU
# near 0 flips now and then: one of 10,000 positions of a channel's gradient, 1e-3 at the worst.
BOUND = 2e-3
FLIPS = 20


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """No TF32, and the same algorithms each time."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    with full_precision(torch.nn.Identity(), GPU):
        yield
    cudnn.deterministic, cudnn.benchmark = before


def data(count: int = 8, **options) -> list:
    return runs.batches(count, **{"size": 32, "pixels": 16} | options)


# Compiling takes half a minute: one test has it on.
def gpu_pair(method: str, *, without=(), **options) -> runs.Pair:
    options.setdefault("data", data())
    return runs.pair(method, without=[*COMPILED, *without], device=GPU, **options)


def gpu_run(method: str, *, without=(), **options) -> Run:
    options.setdefault("data", data())
    return runs.make_run(method, without=[*COMPILED, *without], device=GPU, **options)


def assert_steps_equal(both: runs.Pair, count: int, *, signs: float = runs.SIGNS) -> None:
    for place in range(count):
        for run in (both.fast, both.eager):
            runs.reach(run, place)
        both.align()
        before = runs.snapshot(both.fast)
        terms = both.step(*both.fast.loader.batches[both.fast.batch])
        runs.assert_equal_terms(*terms, BOUND)
        runs.assert_equal_step(both, before, bound=BOUND, flips=FLIPS)
        assert runs.differing(before, runs.snapshot(both.fast))
    runs.assert_equal_counters(both, BOUND)
    assert max(both.other_pixels) <= signs


def compare_half_precision(both: runs.Pair, count: int) -> None:
    """Compare losses, which eight bits round by 2^-9 in a dozen layers, and the working copies."""
    for place in range(count):
        for run in (both.fast, both.eager):
            runs.reach(run, place)
        both.align()
        ours, theirs = both.step(*both.fast.loader.batches[both.fast.batch])
        runs.assert_equal_terms(ours, theirs, 2**-5)
        prepared = both.fast.engine.prepared
        for parameter in both.fast.model.parameters():
            if id(parameter) in prepared.copies:
                assert torch.equal(prepared.copies[id(parameter)], parameter.to(HALF))


# Captured steps against eager ones.


@pytest.mark.parametrize("method", METHODS)
def test_fifty_captured_steps_are_the_eager_ones(method):
    """The eager run follows with the same images, but its attack's noise is drawn by itself."""
    both = gpu_pair(method, optim={"epochs": 8, "schedule": "cosine"})
    assert_steps_equal(both, 50)
    assert list(both.fast.engine.warmed.values()) == [WARM_UP]
    assert len(both.fast.engine.captured) == 1


@pytest.mark.parametrize("method", METHODS)
def test_losses_of_fifty_steps_in_half_precision(method):
    both = gpu_pair(method, dtype=HALF, optim={"epochs": 8})
    compare_half_precision(both, 50)
    assert both.fast.engine.captured


def test_masks_agree_but_where_rounding_decides():
    both = gpu_pair("cure")
    flipped = 0
    for place in range(20):
        for run in (both.fast, both.eager):
            runs.reach(run, place)
        both.align()
        before = runs.snapshot(both.fast)
        both.step(*both.fast.loader.batches[both.fast.batch])
        otherwise = runs.masked_otherwise(both, before)
        (selector,) = both.fast.engine.selectors.built.values()
        space = selector.workspace
        names = both.fast.policies[0].names
        for name, scores, limit in zip(names, space.scores, space.thresholds, strict=True):
            places = otherwise.pop(name)
            flipped += int(places.sum())
            off = (scores[places] - limit).abs()
            assert bool((off <= 1e-4 * limit).all()), name
        assert not any(bool(rest.any()) for rest in otherwise.values())
    assert flipped <= FLIPS


@pytest.mark.parametrize("feature", ["graph", "stack", "copies", "fuse"])
def test_each_feature_can_be_left_out(feature):
    both = gpu_pair("cure", without=[feature])
    assert_steps_equal(both, 6)
    assert bool(both.fast.engine.captured) == (feature != "graph")


@pytest.mark.parametrize("dtype", [None, HALF], ids=str)
def test_a_compiled_step_is_the_eager_one(dtype):
    both = runs.pair("cure", device=GPU, data=data(), dtype=dtype)
    (assert_steps_equal if dtype is None else compare_half_precision)(both, 6)
    # What torch.compile fails at, the engine goes on without, with the same results.
    assert both.fast.engine.without == set()
    assert all(both.fast.engine.has(feature) for feature in COMPILED)
    assert len(both.fast.engine.captured) == 1


def test_a_smaller_last_batch_is_computed_alike_and_not_captured():
    both = gpu_pair("cure", data=data(5, last=7))
    assert_steps_equal(both, 15)
    assert {key[-2][0] for key in both.fast.engine.captured} == {32}
    assert {key[-2][0] for key in both.fast.engine.warmed} == {32, 7}


def test_the_phases_of_a_natural_warm_up_have_graphs_of_their_own():
    both = gpu_pair("cure_eff", natural_share=0.5)
    assert_steps_equal(both, 16)
    assert len(both.fast.engine.captured) == 2


# Random numbers.


def test_replays_draw_new_attack_noise():
    run = gpu_run("pgd_at", data=data(1), attack={"attack_steps": 0})
    images = runs.Images()
    images.of(run)
    x, y = run.loader.batches[0]
    noises, offsets = [], []
    for _ in range(WARM_UP + 20):
        offsets.append(run.generators["attack"].get_offset())
        runs.step(run, x, y)
        noises.append(images.kept[x.shape] - x)
    assert len(run.engine.captured) == 1
    assert len(set(offsets)) == len(offsets)
    for i, noise in enumerate(noises):
        assert all(float((noise - other).abs().mean()) > 0.01 for other in noises[:i])


def test_coins_of_replays_fall_at_their_rate():
    rate, count = 0.3, 300
    run = gpu_run("cure", revision_rate=rate, run={"log_every": 50})
    for place in range(count):
        runs.reach(run, place % 8)
        runs.step(run, *run.loader.batches[place % 8])
    moves = int(run.policies[-1].moves)
    tossed = [bool(flip_coin_ref(rate, seed=run.config.run.seed, step=s)) for s in range(count)]
    assert moves == sum(tossed)
    assert abs(moves - rate * count) < 5 * (count * rate * (1 - rate)) ** 0.5


# Captures.


def states(run: Run) -> dict[str, torch.Tensor]:
    found = {name: source.get_state() for name, source in run.generators.items()}
    prepared = run.engine.prepared
    counted = {"counts": prepared.counters.counts.clone()}
    copies = {f"copy {i}": c.clone() for i, c in enumerate(prepared.copies.values())}
    return found | counted | copies | {"cuda": torch.cuda.get_rng_state(GPU)}


@pytest.mark.parametrize("dtype", [None, HALF], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_a_capture_leaves_everything_as_it_was(method, dtype):
    run = gpu_run(method, dtype=dtype, run={"log_every": 100})
    runs.train(run, WARM_UP)
    before = runs.snapshot(run) | states(run)
    batch = run.loader.batch(WARM_UP)
    run.engine.prepared.numbers.send()
    captured = CapturedStep(run.engine.prepared.compute, batch, run.generators.values())
    torch.cuda.synchronize()
    assert runs.differing(before, runs.snapshot(run) | states(run)) == []
    captured.replay(batch)
    after = runs.snapshot(run) | states(run)
    moved = runs.differing(before, after)
    assert "attack" in moved and "counts" not in moved  # A snapshot reads and clears the counts.
    assert any(name.startswith("model.") for name in moved) and run.counted == WARM_UP + 1


def test_a_step_that_waits_runs_without_a_graph(capsys):
    """Its random sources, and torch's stream, are fit for use after the failure."""
    made = [gpu_run("pgd_at", without=without) for without in ((), ("graph",))]
    stream = torch.cuda.current_stream()
    for run in made:
        loss = run.method.loss

        def waiting(run, batch, loss=loss):
            terms = loss(run, batch)
            assert float(terms["total"]) > 0
            return terms

        run.method = replace(run.method, loss=waiting)
        runs.train(run, 8)
    assert torch.cuda.current_stream() == stream
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning: " in line]
    # Nor can such a loss be recorded.
    whys = ("as the loss has no graph", "runs without a CUDA graph, as the step has none")
    assert [sum(why in line for line in lines) for why in whys] == [2, 1] and len(lines) == 3
    assert runs.differing(*map(runs.snapshot, made)) == []


def test_memory_of_failed_captures_comes_back():
    """And the cache can be emptied, as it cannot while torch takes a capture to go on."""
    batch = Batch(*(torch.ones(n, device=GPU) for n in (2**24, 2, 2)))

    def waiting(batch):
        return {"total": torch.tensor((batch.x * 2).sum().item())}

    assert float(waiting(batch)["total"]) == 2**25
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    for _ in range(3):
        with pytest.raises(RuntimeError, match="captur"):
            CapturedStep(waiting, batch, ())
    assert float(waiting(batch)["total"]) == 2**25
    gc.collect()  # What pytest.raises may have kept.
    torch.cuda.empty_cache()
    # The step's tensors have 64 MiB each.
    assert torch.cuda.memory_reserved() - before < 2**24


@pytest.mark.parametrize("stop", [2, 5, 7])
@pytest.mark.parametrize(("method", "dtype"), [("pgd_at", None), ("cure", None), ("cure", HALF)])
def test_a_resumed_run_equals_an_undisturbed_one(method, dtype, stop):
    """In every bit: captured steps compute what uncaptured ones do."""
    whole, first, second = (gpu_run(method, dtype=dtype) for _ in range(3))
    runs.train(whole, 14)
    runs.train(first, stop)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    runs.train(second, 14 - stop, start=stop)
    assert whole.engine.captured and second.engine.captured
    assert runs.differing(runs.snapshot(whole), runs.snapshot(second)) == []
    sources = (run.generators["attack"].get_state() for run in (whole, second))
    assert torch.equal(*sources)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_waits_for_the_device_between_logged_steps(method):
    run = gpu_run(method, run={"log_every": 1000}, dtype=HALF)
    runs.train(run, WARM_UP + 2)
    with no_waiting():
        for place in range(3, 23):
            run.batch = place % 8
            runs.step(run, *run.loader.batches[run.batch])
    run.engine.flush()
    assert run.counted == WARM_UP + 2 + 20


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_two_thousand_steps_take_no_more_memory_than_two_hundred():
    run = gpu_run("cure", run={"log_every": 20}, revision_rate=0.5, data=data(5, last=7))
    device, host = [], []
    for place in range(2000):
        runs.reach(run, place % 5)
        runs.step(run, *run.loader.batches[place % 5])
        if place % 5 == 4 and place >= 200:
            device.append(torch.cuda.memory_allocated())
        if place in (200, 1999):
            torch.cuda.synchronize()
            host.append(resident_bytes())
    # Behind equal batches. Allocators of the host grow by pools of some megabytes.
    assert max(device) - device[0] < 2**16
    assert host[1] - host[0] < 32 * 2**20


# Faults and feeds.


@pytest.mark.parametrize("method", METHODS)
def test_a_nan_batch_in_a_replay_moves_nothing(method):
    run = gpu_run(method, dtype=HALF)
    runs.train(run, WARM_UP + 2)
    assert run.engine.captured
    copies = [c.clone() for c in run.engine.prepared.copies.values()]
    before = runs.snapshot(run)
    x, y = run.loader.batches[6]
    bad = x.clone(memory_format=torch.preserve_format)
    bad[3, 1] = float("nan")
    assert runs.step(run, bad, y) is None
    assert runs.differing(before, runs.snapshot(run)) == []
    assert all(map(torch.equal, copies, run.engine.prepared.copies.values()))
    assert (run.skipped, run.skipped_in_row) == (1, 1)
    assert runs.step(run, x, y) is not None
    assert runs.differing(before, runs.snapshot(run)) and run.skipped_in_row == 0


@pytest.mark.parametrize("kind", ["resident", "ffcv"])
def test_loaders_feed_captured_steps(kind, tmp_path):
    """FFCV's batches are views of memory that it fills again."""
    if kind == "ffcv" and (problem := ffcv_problem()):
        pytest.skip(problem)
    rng = np.random.default_rng(0)
    labels = np.arange(32 * 7 + 10, dtype=np.int64) % 3
    images = ImageSet(
        name="random",
        images=rng.integers(0, 256, (len(labels), 16, 16, 3), dtype=np.uint8),
        labels=labels,
        classes=("ape", "bee", "cat"),
        source="a generator",
    )
    loader = make_loader(
        kind,
        images,
        batch_size=32,
        device=GPU,
        seed=0,
        crop_padding=2,
        flip=True,
        workers=1,
        cache=tmp_path,
    )
    both = gpu_pair("trades")
    both.fast.loader = both.eager.loader = loader
    sizes = []
    for epoch in range(2):
        with loader.epoch(epoch, start_batch=0) as batches:
            for number, batch in enumerate(batches):
                for run in (both.fast, both.eager):
                    runs.reach(run, epoch * loader.batches_per_epoch + number)
                both.align()
                before = runs.snapshot(both.fast)
                runs.assert_equal_terms(*both.step(batch.x, batch.y), BOUND)
                runs.assert_equal_step(both, before, bound=BOUND, flips=FLIPS)
                sizes.append(len(batch))
    assert len(sizes) == 2 * loader.batches_per_epoch and both.fast.engine.captured
