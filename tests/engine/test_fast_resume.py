"""A fast run stopped and resumed, handed to the other engine, and replayed from captured steps."""

from __future__ import annotations

import copy
import json
import shutil
import signal
from functools import partial

import pytest
import torch

import engine_runs as runs
from cure_fast.engine import fast as fast_engine
from cure_fast.engine.fast import WARM_UP
from cure_fast.kernels.layout import memory_order
from cure_fast.runs.log import read_rows
from killing import same_end
from moments import signal_at
from processes import finish
from tiny_command import differences, tiny_words

pytestmark = pytest.mark.usefixtures("one_thread")

HALF = torch.bfloat16
QUICK = {"attack_steps": 1}


# Captures. The recording is a fake: it computes nothing, as a real one, and its replay computes the
# step, in which the numbers of the moment count.


class Recorded:
    """Stands for a captured step."""

    made: list[tuple]
    replays: list[int]
    failure: Exception | None = None

    def __init__(self, compute, batch, generators):
        if self.failure is not None:
            raise self.failure
        self.compute, self.generators = compute, list(generators)
        self.shape, self.number = batch.x.shape, len(self.made)
        self.made.append((len(batch), self.generators))

    def replay(self, batch):
        assert batch.x.shape == self.shape
        self.replays.append(self.number)
        return self.compute(batch)


@pytest.fixture
def recorded(monkeypatch):
    """Let the engine take the CPU for a device that has graphs."""

    class Fresh(Recorded):
        made, replays = [], []

    monkeypatch.setattr(fast_engine, "CapturedStep", Fresh)
    monkeypatch.setattr(fast_engine, "ON_GPU", ("stack", *fast_engine.COMPILED))
    return Fresh


OPTIONS = {"optim": {"epochs": 4, "schedule": "cosine"}, "revision_rate": 0.7}


def test_a_step_is_captured_once_per_kind(recorded):
    """Five epochs naturally, and the rest; the last batches are smaller."""
    assert WARM_UP == 3
    make = partial(
        runs.make_run,
        "cure",
        data=runs.batches(3, last=4),
        natural_share=0.5,
        revision_rate=0.7,
        revision_rate_decay="cosine",
        attack=QUICK,
        optim={"epochs": 10, "schedule": "cosine"},
    )
    run, plain = make(), make(without=["graph"])
    shapes = []
    for place in range(30):
        runs.train(run, 1, start=place)
        runs.train(plain, 1, start=place)
        shapes.append((len(recorded.made), len(recorded.replays)))
        # Rates, step numbers and coins of each moment: no bit is another.
        assert runs.differing(runs.snapshot(run), runs.snapshot(plain)) == [], place
    # Every third batch is smaller. The fourth of the others is captured and replayed at once: 4
    # behind 0, 1 and 3, and 19 behind 15, 16 and 18, with which the method begins.
    replayed = [4, 6, 7, 9, 10, 12, 13, 19, 21, 22, 24, 25, 27, 28]
    assert [sum(place <= last for place in replayed) for last in range(30)] == [
        replays for _, replays in shapes
    ]
    assert [captures for captures, _ in shapes] == [0] * 4 + [1] * 15 + [2] * 11
    assert [count for count, _ in recorded.made] == [6, 6]
    for _, generators in recorded.made:
        assert generators == list(run.generators.values())
    assert recorded.replays == [0] * 7 + [1] * 7


def test_graphs_of_attacks_that_have_grown_are_let_go(recorded):
    """Each keeps the memory of a step, and none of them is replayed again."""
    run = runs.make_run(
        "pgd_at",
        data=runs.batches(2),
        attack={"attack_steps": 3, "attack_ramp": 1.0},
        optim={"epochs": 9},
    )
    held = []
    for place in range(18):
        runs.train(run, 1, start=place)
        held.append([kind.attack_steps for kind in run.engine.captured])
    # Six steps of each; the fourth of each is captured.
    assert held == [[]] * 3 + [[1]] * 6 + [[2]] * 6 + [[3]] * 3
    assert len(recorded.made) == 3


def test_without_a_graph_nothing_is_captured(recorded):
    run = runs.make_run(data=runs.batches(2), without=["graph"])
    runs.train(run, 6)
    assert not recorded.made and not run.engine.captured


def test_a_capture_that_fails_is_told_once_and_trains_on(recorded, capsys):
    run, plain = (
        runs.make_run("cure", data=runs.batches(2), without=without, **OPTIONS)
        for without in ((), ("graph",))
    )
    recorded.failure = RuntimeError("a step that waits for the device\nand a long trace")
    for each in (run, plain):
        runs.train(each, 8)
    assert runs.differing(runs.snapshot(run), runs.snapshot(plain)) == []
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "warning: the fast engine runs without a CUDA graph, as the step has none: a step that "
        "waits for the device"
    ]
    assert run.engine.name == "fast" and not run.engine.has("graph")


def test_a_capture_without_memory_goes_to_the_eager_engine(recorded, capsys):
    """A capture computes nothing, so that the step is not taken twice."""
    made = [
        runs.make_run("cure_paper", engine, data=runs.batches(2), revision_rate=1.0)
        for engine in ("fast", "eager")
    ]
    run, eager = made
    runs.train(run, WARM_UP)
    eager.load_state_dict(copy.deepcopy(run.state_dict()))
    recorded.failure = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    for each in made:
        runs.train(each, 2, start=WARM_UP)
    assert run.engine.name == "eager"
    assert runs.differing(runs.snapshot(run), runs.snapshot(eager)) == []
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "gives way to the eager one: a step did not fit" in error


def test_a_loaded_state_starts_captures_anew(recorded):
    run = runs.make_run("cure", data=runs.batches(2))
    runs.train(run, 5)
    state = copy.deepcopy(run.state_dict())
    assert len(recorded.made) == 1
    run.load_state_dict(state)
    assert not run.engine.captured and run.engine.prepared is None
    runs.train(run, 4, start=5)
    assert len(recorded.made) == 2


# Checkpoints.

RESUMED = {
    "natural": ("natural", {}),
    "pgd_at": ("pgd_at", {}),
    "trades": ("trades", {"run": {"log_every": 3}}),
    "cure": ("cure", {"revision_rate": 0.7, "run": {"log_every": 3}}),
    "cure in half precision": ("cure", {"dtype": HALF, "revision_rate": 0.7}),
    "hard freeze in half precision": ("cure", {"dtype": HALF, "freeze": "hard"}),
    "cure_paper": ("cure_paper", {"revision_rate": 0.7, "revision_buffers": "average"}),
    "cure_eff": ("cure_eff", {"natural_share": 0.5}),
    "a mask of two steps": ("cure", {"mask_every": 2}),
}


@pytest.mark.parametrize(("case", "stop"), [*((case, 3) for case in RESUMED), ("cure", 4)])
def test_a_run_stopped_in_an_epoch_continues_to_the_same_bits(case, stop):
    method, options = RESUMED[case]
    whole, first, second = (
        runs.make_run(method, data=runs.batches(4, last=4), attack=QUICK, **copy.deepcopy(options))
        for _ in range(3)
    )
    expected = runs.train(whole, 6)
    runs.train(first, stop)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    found = runs.train(second, 6 - stop, start=stop)
    assert runs.differing(runs.snapshot(whole), runs.snapshot(second)) == []
    for ours, theirs in zip(found, expected[stop:], strict=True):
        assert ours is None or runs.differing(ours, theirs) == []
    for name in ("counted", "skipped", "skipped_in_row", "step"):
        assert getattr(whole, name) == getattr(second, name), name
    assert runs.differing(second.sums, whole.sums) == []


@pytest.mark.parametrize(("before", "after"), [("fast", "eager"), ("eager", "fast")])
@pytest.mark.parametrize("method", ["pgd_at", "cure", "cure_paper"])
def test_a_run_can_go_on_in_the_other_engine(before, after, method):
    """Its next step is that of the engine that it left, within rounding."""
    both = runs.pair(method, data=runs.batches(4), **runs_with_revision(method))
    made = {"fast": both.fast, "eager": both.eager}
    donor = runs.make_run(method, before, data=runs.batches(4), **runs_with_revision(method))
    runs.train(donor, 3)
    for run in made.values():
        run.load_state_dict(copy.deepcopy(donor.state_dict()))
    start = runs.snapshot(made[after])
    assert runs.differing(start, runs.snapshot(donor)) == []
    terms = both.step(*both.fast.loader.batches[3])
    runs.assert_equal_terms(*terms)
    runs.assert_equal_step(both, start)
    runs.assert_equal_counters(both)
    assert made[after].counted == 4


def runs_with_revision(method):
    return {} if method == "pgd_at" else {"revision_rate": 0.9}


def test_momenta_in_another_memory_order_are_laid_out_anew():
    """As a checkpoint's may be: values count, strides do not."""
    run, plain = (runs.make_run("cure", data=runs.batches(2)) for _ in range(2))
    for each in (run, plain):
        runs.train(each, 2)
        state = copy.deepcopy(each.state_dict())
        if each is run:
            for entry in state["optimizer"]["state"].values():
                buffer = entry["momentum_buffer"]
                entry["momentum_buffer"] = buffer.contiguous()
                if buffer.ndim == 4 and min(buffer.shape[1], buffer.shape[2]) > 1:
                    assert memory_order(buffer) != memory_order(entry["momentum_buffer"])
        each.load_state_dict(state)
        runs.train(each, 2, start=2)
    assert runs.differing(runs.snapshot(run), runs.snapshot(plain)) == []
    for parameter in run.model.parameters():
        buffer = run.optimizer.state[parameter]["momentum_buffer"]
        assert memory_order(buffer) == memory_order(parameter)


# The command line.


@pytest.mark.parametrize("method", ["cure"])
def test_a_fast_command_stopped_and_resumed_ends_as_an_unbroken_one(tmp_path, method):
    """And leaves rows of the same kind as the eager engine."""
    folders = {name: tmp_path / name for name in ("whole", "broken", "eager")}
    for folder in folders.values():
        folder.mkdir()
    words = tiny_words("--engine", "fast", "--attacks", "natural", method=method)
    code, output = finish(words, folders["whole"])
    assert code == 0 and "engine: fast" in output, output
    # Three steps of the natural start, then in the second epoch of the method.
    place = "cure_fast.engine.fast:FastEngine.step"
    stop = partial(signal_at, place, 8, signal.SIGTERM)
    code, output = finish(words, folders["broken"], prepare=stop)
    assert code == 75, output
    shutil.copytree(folders["broken"], tmp_path / "other")
    code, output = finish([*words, "--resume"], folders["broken"])
    assert code == 0 and "engine: fast until" not in output, output
    whole, broken, eager = (folder / "run" for folder in folders.values())
    assert differences(whole, broken) == [] and same_end(whole, broken)
    code, output = finish([*words, "--engine", "eager"], folders["eager"])
    assert code == 0, output
    ours, theirs = (read_rows(folder / "metrics.jsonl") for folder in (whole, eager))
    assert [kinds(row) for row in ours] == [kinds(row) for row in theirs]
    for row, other in zip(ours, theirs, strict=True):
        if row["event"] == "epoch":
            assert row["skipped"] == other["skipped"]
            # The natural start has no policies.
            if row["stage"] == "train":
                assert row["revision"] == other["revision"]
                # Ranks are the engines' own.
                assert row["masked_energy"] == pytest.approx(other["masked_energy"], abs=0.05)
    config = json.loads((whole / "config.json").read_text())
    assert config["run"]["engine"] == "fast"
    check_resumed_by_the_eager_engine(tmp_path / "other", method)


def check_resumed_by_the_eager_engine(folder, method):
    code, output = finish([*tiny_words("--engine", "eager", method=method), "--resume"], folder)
    assert code == 0, output
    assert "engine: fast until step 5, eager from here on" in " ".join(output.split())
    rows = [r for r in read_rows(folder / "run" / "metrics.jsonl") if r["event"] == "epoch"]
    assert [r["engine"] for r in rows if r["stage"] == "train"] == ["fast", "eager"]
    page = (folder / "run" / "report.html").read_text(encoding="utf-8")
    assert "Engine of its steps: fast; then eager." in page


def kinds(value):
    """What a row is made of: names and types."""
    if isinstance(value, dict):
        return {name: kinds(item) for name, item in value.items()}
    return type(value).__name__
