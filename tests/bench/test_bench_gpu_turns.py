"""The GPU benchmark's round robin: who takes turns, who waits, who is left out and why."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from bench.gpu import feeds, robin
from bench.gpu.engines import (
    BatchCutError,
    Case,
    CompiledLateError,
    CompiledStep,
    Work,
    WrongEngineError,
    check_run,
    open_loader,
    open_run,
)
from bench.gpu.plan import Plan
from bench.gpu.record import Record
from bench.gpu.robin import Contender, RoundRobin, is_kernel, step_times

CPU = torch.device("cpu")
ABOUT = {"tiny": True}


@pytest.fixture
def tiny(tmp_path) -> Plan:
    return Plan(CPU, True, 60.0, tmp_path)


class Lane:
    """Contenders whose steps are noted, and fail where they are told to."""

    def __init__(self, plan: Plan) -> None:
        self.record = Record("resnet18-128", dict(ABOUT))
        self.robin = RoundRobin(plan, self.record)
        # Collecting garbage takes a while, and what stands for steps here holds no memory.
        self.robin._free = lambda: None
        self.taken: list[str] = []

    def contender(self, name: str, *, build=None, step=None, **changes: object) -> Contender:
        count = iter(range(1000))

        def take() -> None:
            self.taken.append(name)
            if step is not None:
                step(next(count))
            time.sleep(1e-4)

        def make() -> Work:
            if build is not None:
                build()
            return Work(take)

        settings = {"kind": name, "expected": 0.0, **changes}
        return Contender({"engine": name}, make, **settings)

    def outcome(self) -> dict[str, tuple[str, int, int | None]]:
        rows = self.record.rows
        assert len({row.name for row in rows}) == len(rows)
        return {row.name: (row.status, len(row.rounds), row.together) for row in rows}

    def note(self, name: str) -> str:
        return next(row.note for row in self.record.rows if row.name == name)


def fail(error: Exception, when=lambda number: True):
    def step(number: int = 0) -> None:
        if when(number):
            raise error

    return step


OUT = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def test_contenders_take_turns_round_by_round(tiny) -> None:
    lane = Lane(tiny)
    lane.robin.measure([lane.contender(name) for name in "abc"], 10)
    # Two steps each to warm up; then one each per round, another first each time.
    assert "".join(lane.taken) == "aabbcc" + "abc" + "bca" + "cab" + "abc" + "bca"
    assert lane.outcome() == {name: ("measured", 5, 1) for name in "abc"}
    assert (tiny.out / "resnet18-128.json").exists()


def test_turns_have_their_steps_and_rounds_on_real_shapes(tmp_path) -> None:
    lane = Lane(Plan(CPU, False, 60, tmp_path))
    lane.robin.measure([lane.contender("a"), lane.contender("fed", fed=True)], 60)
    a, fed = lane.record.rows
    assert len(a.rounds) == len(fed.rounds) == 30
    # A turn of about 0.1 s has at most ten timed steps, with one before; a fed one 40, with ten.
    assert lane.taken.count("a") == 8 + 30 * 11 and lane.taken.count("fed") == 8 + 30 * 50


def test_one_failure_is_recorded_and_the_others_go_on(tiny) -> None:
    lane = Lane(tiny)
    broken = lane.contender("broken", build=fail(ValueError("no such\nlayer")))
    late = lane.contender("late", step=fail(RuntimeError("illegal address"), lambda n: n == 4))
    lane.robin.measure([broken, late, lane.contender("a")], 10)
    assert lane.outcome() == {
        "broken": ("failed", 0, None), "late": ("failed", 0, None), "a": ("measured", 5, 1),
    }  # fmt: skip
    assert lane.note("broken") == "ValueError: no such" and len(lane.record.failed) == 2
    assert lane.note("late") == "RuntimeError: illegal address"


def test_what_does_not_fit_beside_others_waits_for_the_next_turns(tiny) -> None:
    lane = Lane(tiny)
    built = []

    def second_time() -> None:
        built.append(1)
        if len(built) == 1:
            raise OUT

    waiting = lane.contender("big", build=second_time)
    lane.robin.measure([lane.contender("a"), waiting, lane.contender("b")], 10)
    measured = {"a": ("measured", 5, 1), "big": ("measured", 5, 2), "b": ("measured", 5, 2)}
    assert lane.outcome() == measured


def test_what_does_not_fit_alone_is_left_out(tiny) -> None:
    lane = Lane(tiny)
    lane.robin.measure([lane.contender("a"), lane.contender("big", build=fail(OUT))], 10)
    assert lane.outcome() == {"a": ("measured", 5, 1), "big": ("left out", 0, None)}
    assert lane.note("big").startswith("no memory, even alone: OutOfMemoryError: CUDA out of")
    assert not lane.record.failed


def test_what_runs_out_of_memory_in_its_turn_is_measured_alone(tiny) -> None:
    lane = Lane(tiny)
    cut = lane.contender("cut", step=fail(BatchCutError("passes of 2"), lambda n: n == 3))
    lane.robin.measure([cut, lane.contender("a"), lane.contender("b")], 10)
    assert lane.outcome() == {
        "a": ("measured", 5, 1), "b": ("measured", 5, 1), "cut": ("measured", 5, 2),
    }  # fmt: skip


def test_what_finds_no_time_is_left_out_and_says_so(tiny) -> None:
    lane = Lane(tiny)
    slow = lane.contender("slow", step=lambda number: time.sleep(0.1))
    long = lane.contender("long", expected=100.0)
    lane.robin.measure([lane.contender("a"), slow, long], 0.6)
    assert lane.outcome() == {
        "a": ("measured", 5, 1), "slow": ("left out", 0, None), "long": ("left out", 0, None),
    }  # fmt: skip
    assert re.match(r"no time: 5 rounds take \d+ s, 0 are left", lane.note("slow"))
    assert lane.note("long").startswith("no time: it takes 10")


class Clock:
    """A clock that goes on where it is told to, whatever else the machine does."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    perf_counter = monotonic

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_what_waits_for_memory_keeps_its_time(tiny, monkeypatch) -> None:
    clock = Clock()
    monkeypatch.setattr(robin, "time", clock)
    lane = Lane(replace(tiny, tiny=False))
    tries = iter([OUT])

    def second_time() -> None:
        for error in tries:
            raise error

    def slow(number: int) -> None:
        clock.sleep(0.02)

    waiting = lane.contender("big", build=second_time, step=slow, expected=0.5, turn=0.3)
    lane.robin.measure([lane.contender("a", step=slow), waiting], 4)
    (a, big) = lane.record.rows
    # A turn takes six steps of 20 ms: 30 rounds take 3.6 s, and 2.4 s of the 4 are the other's.
    assert 5 <= len(a.rounds) < 30 and len(big.rounds) >= 5 and big.together == 2


def test_a_turn_that_is_too_long_by_estimate_is_not_begun(tiny) -> None:
    lane = Lane(tiny)
    long = lane.contender("long", turn=1.0)
    lane.robin.measure([lane.contender("a"), long], 4)
    assert lane.outcome() == {"a": ("measured", 5, 1), "long": ("left out", 0, None)}
    assert lane.note("long").startswith("no time: it takes 5 s")
    assert "long" not in lane.taken


def test_ctrl_c_keeps_the_rounds_that_were_taken(tiny) -> None:
    lane = Lane(tiny)
    stopped = lane.contender("b", step=fail(KeyboardInterrupt(), lambda n: n == 4))
    with pytest.raises(KeyboardInterrupt):
        lane.robin.measure([lane.contender("a"), stopped], 10)
    assert lane.outcome() == {"a": ("measured", 3, 1), "b": ("measured", 2, 1)}
    written = json.loads((tiny.out / "resnet18-128.json").read_text())
    notes = [row["note"] for row in written["rows"]]
    assert notes == [f"interrupted after {n} rounds" for n in (3, 2)]
    assert written["finished"] is False


def test_step_times_are_of_each_step(tiny) -> None:
    waits = iter([0.02, 0.0, 0.04])
    times = step_times(Work(lambda: time.sleep(next(waits))), 3, tiny)
    assert 0.02 <= times[0] and times[1] < 0.02 <= 0.04 <= times[2]


@pytest.mark.parametrize(
    ("name", "device", "label", "counts"),
    [
        ("void gemm<128>()", DeviceType.CUDA, False, True),
        ("Memcpy DtoD (Device -> Device)", DeviceType.CUDA, False, False),
        ("Memset (Device)", DeviceType.CUDA, False, False),
        ("## step ##", DeviceType.CUDA, True, False),
        ("cudaLaunchKernel", DeviceType.CPU, False, False),
    ],
)
def test_kernels_are_told_from_copies_and_labels(name, device, label, counts) -> None:
    event = SimpleNamespace(name=name, device_type=device, is_user_annotation=label)
    assert is_kernel(event) is counts


def run_with(engine: object, micro_batch_size: int | None = None) -> SimpleNamespace:
    return SimpleNamespace(micro_batch_size=micro_batch_size, engine=engine)


def test_a_cut_batch_and_another_engine_are_noticed() -> None:
    case = Case("resnet18", "cure", "fast", 128)
    fast = SimpleNamespace(name="fast", reason=None)
    check_run(run_with(fast), case)
    with pytest.raises(BatchCutError, match="out of memory: passes of 64 images"):
        check_run(run_with(fast, 64), case)
    eager = SimpleNamespace(name="eager", reason="its update is SGD's")
    check_run(run_with(eager), replace(case, engine="eager+compile"))
    with pytest.raises(WrongEngineError, match="eager instead of fast: its update is SGD's"):
        check_run(run_with(eager), case)


def test_a_fast_engine_that_lost_a_feature_or_its_memory_is_noticed(tiny, tmp_path) -> None:
    case = Case("resnet-small", "natural", "fast", 4, ("fuse",))
    run = open_run(case, tiny, open_loader(tiny, 4, cache=tmp_path))
    check_run(run, case)
    run.engine.without.add("graph")
    with pytest.raises(WrongEngineError, match="went on without graph"):
        check_run(run, case)
    run.engine.give_up("a step did not fit into memory")
    with pytest.raises(BatchCutError, match=r"eager instead of fast: .*memory"):
        check_run(run, case)


# Steps of networks that are compiled.


def settings() -> tuple[bool, bool, bool]:
    """Return which of the compiler's settings are in force."""
    from torch._dynamo import config as dynamo_config
    from torch._functorch import config as functorch_config
    from torch._inductor import config as inductor_config

    return (
        dynamo_config.fail_on_recompile_limit_hit,
        inductor_config.triton.cudagraph_or_error,
        not functorch_config.donated_buffer,
    )


@pytest.mark.parametrize("graphs", [False, True])
def test_the_compilers_settings_are_set_where_it_compiles(graphs) -> None:
    found, outside = [], settings()
    step = CompiledStep(lambda: found.append(settings()), compiling=2, graphs=graphs)
    for _ in range(4):
        step()
        assert settings() == outside == (False, False, False)
    # Graphs ask in each step whether they can be had.
    assert found == [(True,) * 3] * 2 + [(graphs, graphs, True)] * 2


@pytest.mark.parametrize("limit", [1, 8], ids=["beyond the limit", "below the limit"])
def test_a_timed_step_that_has_something_to_compile_is_noticed(limit) -> None:
    from torch._dynamo import config as dynamo_config

    torch.compiler.reset()
    double = torch.compile(lambda x: x * 2, backend="eager", dynamic=False)
    sizes = iter([2, 2, 2, 3])
    step = CompiledStep(lambda: double(torch.ones(next(sizes))), compiling=1, graphs=False)
    with dynamo_config.patch(recompile_limit=limit):
        for _ in range(3):
            step()
        with pytest.raises(CompiledLateError, match="step 4 had something to compile"):
            step()


def test_a_timed_step_may_go_back_twice_through_what_was_compiled_for_once() -> None:
    """As what torch's cache has of another method's step may be."""
    torch.compiler.reset()
    layer = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Tanh())
    network = torch.compile(layer, backend="aot_eager", dynamic=False)
    twice = iter([False, True])

    def take() -> None:
        out = network(torch.ones(1, 2)).sum()
        if next(twice):
            out.backward(retain_graph=True)
        out.backward()

    step = CompiledStep(take, compiling=1, graphs=False)
    step()
    step()
    assert step.taken == 2


def test_feeds_go_on_from_epoch_to_epoch_with_whole_batches() -> None:
    class Loader:
        def epoch(self, number: int):
            batches = [f"x{number}{i}" + "." * (n - 3) for i, n in enumerate((4, 4, 3))]
            return feeds.closing(iter_of(batches))

    def iter_of(batches):
        yield from batches

    found = feeds.endless(Loader(), 4)
    assert [next(found) for _ in range(5)] == ["x00.", "x01.", "x10.", "x11.", "x20."]
