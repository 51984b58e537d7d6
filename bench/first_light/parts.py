"""What each part measures. Each writes its record anew after every row."""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bench.device_timing import DeviceTimer, copy_bandwidth, rounds_within
from bench.gpu.ceilings import measure_ceilings
from bench.gpu.engines import Case, build, open_loader
from bench.gpu.estimates import build_seconds
from bench.gpu.plan import Plan
from bench.gpu.record import Record, Row, reason
from bench.gpu.robin import Contender, RoundRobin, is_kernel
from bench.gpu.sources import ROOT
from bench.gpu.steps import COLUMNS, TEXT, start, step_figures
from bench.kernel_cases import Case as KernelCase
from bench.kernel_cases import differing
from bench.kernel_operations import all_cases
from cure_fast.config import EngineFeature
from cure_fast.kernels.dispatch import VARIABLE
from cure_fast.models import build_model

Key = dict[str, str | int]
METHODS = ("pgd_at", "trades", "cure")
# The engines' steps that targets compare, in the order of their importance.
CASES = (
    ("cure", "fast"),
    ("trades", "fast"),
    ("cure", "authors"),
    ("cure", "eager"),
    ("trades", "authors"),
    ("trades", "eager"),
)
WIDE = (("cure", "fast"), ("cure", "authors"))
# Timed calls of a kernel take so many seconds, of which most is overwriting the cache.
KERNEL_S = 0.1
TOP = 10
REHEARSED = 3
STEPS = 5
# Bounds of the tests on a GPU. Without TF32 convolutions' algorithms round by some 1e-5, and a ReLU
# near 0 that flips moves 1e-3 of a gradient. Eight bits make other masks, so that losses and the
# norm of the gradient alone are compared there.
BOUNDS = {torch.float32: 2e-3, torch.bfloat16: 2**-5}
FLIPS = 20


def kernels(plan: Plan, record: Record) -> None:
    """Compare each kernel with plain PyTorch on each set of shapes, then time it."""
    record.columns = (("times_floor", "x floor", 1.0),)
    record.text = (
        "Each kernel against the same operation in plain PyTorch on the same device and tensors; "
        "all failures are listed. Times are cold, by events around one call."
    )
    timer = DeviceTimer(plan.device)
    bandwidth = copy_bandwidth(timer)
    # The others take Triton's interpreter a minute.
    cases = all_cases(rehearsal=plan.tiny)[: REHEARSED if plan.tiny else None]
    for case in cases:
        rival = next(name for name in ("torch-sort", "torch-eager") if name in case.providers)
        expected: list[Tensor] | None = None
        for name in (name for name in case.providers if name.startswith("triton")):
            key: Key = {"operation": case.operation, "shapes": case.shapes, "provider": name}
            if plan.left < 1:
                record.add(Row(key, "left out", "no time is left"))
                continue
            try:
                if expected is None:
                    _, step = prepared(case, rival, plan)
                    expected = [tensor.clone() for tensor in step()]
                inputs, step = prepared(case, name, plan)
                note = difference(step(), expected, case.tolerance)
                if note:
                    record.add(Row(key, "failed", f"wrong: {note}"))
                else:
                    seconds = times_of(step, timer, plan)
                    floor = case.floor_bytes(inputs) / bandwidth
                    over = statistics.median(seconds) / floor
                    record.add(Row(key, rounds=seconds, figures={"times_floor": over}))
            except Exception as error:
                record.add(Row(key, "failed", reason(error)))
        record.write(plan.out)


def prepared(case: KernelCase, name: str, plan: Plan) -> tuple[Any, Callable[[], Sequence[Tensor]]]:
    """Return a case's inputs at their first values, and a provider's step on them."""
    os.environ[VARIABLE] = "triton" if name.startswith("triton") else "reference"
    inputs = case.make(plan.device)
    step = case.providers[name](inputs)
    if case.restore is not None:
        # A captured step has run already.
        case.restore(inputs)
    return inputs, step


def difference(outputs: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> str:
    """Return in words what differs by more than the tolerance; empty for nothing."""
    if len(outputs) != len(expected):
        return f"{len(outputs)} results instead of {len(expected)}"
    told = []
    for place, (found, wanted) in enumerate(zip(outputs, expected, strict=True)):
        if found.shape != wanted.shape or found.dtype != wanted.dtype:
            told.append(f"result {place} is {found.dtype} {tuple(found.shape)}")
            continue
        wrong = differing(found, wanted, tolerance)
        if count := int(wrong.sum()):
            first = int(wrong.flatten().nonzero()[0])
            told.append(f"result {place}: {count} of {found.numel()} elements, first {first}")
    return "; ".join(told)


def times_of(step: Callable[[], object], timer: DeviceTimer, plan: Plan) -> tuple[float, ...]:
    """Return the seconds of calls of a kernel, cold."""
    timer.abandon()
    one = min(timer.seconds(step, 2))
    # On a GPU most of a round overwrites the cache.
    least = one + (1e-4 if plan.on_gpu else 0.0)
    return tuple(timer.seconds(step, rounds_within(KERNEL_S, least, most=50, least=3)))


def equality(plan: Plan, record: Record) -> None:
    """Compare five steps of both engines; where they differ, without each feature in turn."""
    record.text = (
        f"{STEPS} steps of the fast engine beside the eager one from the same state, on the same "
        "adversarial images: terms, and in float32 weights, momenta and statistics. *Without*: "
        "with that feature off, only where the whole step was wrong."
    )
    sizes = [("resnet-small", 8)] if plan.tiny else [("resnet-small", 16), ("resnet18", 64)]
    for model, width in sizes:
        for dtype in BOUNDS:
            for method in METHODS:
                key: Key = {"model": model, "method": method, "dtype": str(dtype).split(".")[1]}
                if plan.left < 1:
                    record.add(Row({**key, "without": ""}, "left out", "no time is left"))
                    continue
                ask = partial(problem_of, plan, model, width, dtype, method)
                told = judge(record, {**key, "without": ""}, ask, ())
                for feature in get_args(EngineFeature) if told else ():
                    if plan.left > 1:
                        judge(record, {**key, "without": feature}, ask, (feature,))
                record.write(plan.out)


def judge(
    record: Record,
    key: Key,
    ask: Callable[[Sequence[str]], str],
    without: Sequence[str],
) -> str:
    """Add what ``ask`` finds without these features, and return it."""
    began = time.perf_counter()
    try:
        told = ask(without)
    except Exception as error:
        told = reason(error)
    seconds = time.perf_counter() - began
    row = Row(key, "failed", told) if told else Row(key, note="equal", rounds=(seconds,))
    record.add(row)
    return told


def problem_of(
    plan: Plan, model: str, width: int, dtype: torch.dtype, method: str, without: Sequence[str]
) -> str:
    """Return what differs between the engines in a few steps; empty for nothing.

    They are compared as in the tests, whose support it takes.
    """
    support = str(ROOT / "tests" / "support")
    if support not in sys.path:
        sys.path.insert(0, support)
    # Found once its folder is.
    import engine_runs as runs  # pyright: ignore[reportMissingImports]

    pixels = 8 if plan.tiny else 32

    def network() -> Any:
        torch.manual_seed(1)
        return build_model(model, num_classes=10, width=width)

    options = {
        "device": plan.device,
        "dtype": None if dtype == torch.float32 else dtype,
        "data": runs.batches(STEPS, size=8, pixels=pixels),
    }
    # Compiling is the matter of the part that is timed.
    off = [*({"compile", "compile-loss"} - set(without)), *without]
    with exact(plan):
        both = runs.Pair(
            runs.make_run(method, "fast", model=network(), without=off, **options),
            runs.make_run(method, "eager", model=network(), **options),
        )
        for place in range(STEPS):
            for run in (both.fast, both.eager):
                runs.reach(run, place)
            both.align()
            before = runs.snapshot(both.fast)
            ours, theirs = both.step(*both.fast.loader.batches[both.fast.batch])
            if dtype != torch.float32:
                # One image of eight that turns is an eighth.
                ours, theirs = (
                    {name: term for name, term in terms.items() if not name.endswith("accuracy")}
                    for terms in (ours, theirs)
                )
            try:
                runs.assert_equal_terms(ours, theirs, BOUNDS[dtype])
                if dtype == torch.float32:
                    runs.assert_equal_step(both, before, bound=BOUNDS[dtype], flips=FLIPS)
            except AssertionError as error:
                return (
                    f"step {place}: {error or 'more weights masked otherwise than rounding does'}"
                )
    return ""


@contextmanager
def exact(plan: Plan) -> Iterator[None]:
    """Compute without TF32 and with the same algorithms each time."""
    from cure_fast.evaluation.trust import full_precision

    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        with full_precision(torch.nn.Identity(), plan.device):
            yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before


def steps(plan: Plan, record: Record) -> None:
    """Time CURE's and TRADES' steps on each engine, and CURE's without each feature."""
    listed = [*CASES, *(("cure", f"fast without {f}") for f in get_args(EngineFeature))]
    compete(plan, record, "resnet18", listed)
    longest_kernels(plan, record)


def wide(plan: Plan, record: Record) -> None:
    """Time CURE's step of WRN-34-10."""
    # Its depth is no matter of a rehearsal.
    compete(plan, record, "resnet18" if plan.tiny else "wrn34-10", WIDE)


def compete(plan: Plan, record: Record, model: str, listed: Sequence[tuple[str, str]]) -> None:
    """Time steps in turns, as many as the part's time allows, in their order."""
    start(plan, record)
    network = plan.sizes.network(model)
    figures = step_figures(plan, record.about["bf16_flops"], network)
    with tempfile.TemporaryDirectory() as cache:
        loader = open_loader(plan, plan.sizes.batch, cache=Path(cache))
        contenders = []
        for method, engine in listed:
            kind, _, feature = engine.partition(" without ")
            without = (feature,) if feature else ()
            case = Case(network, method, kind, plan.sizes.batch, without)
            contenders.append(
                Contender(
                    {"method": method, "engine": engine, "batch": plan.sizes.batch},
                    partial(build, case, plan, loader),
                    kind=kind,
                    figures=figures,
                    expected=build_seconds(model, kind, first=True) if plan.on_gpu else 0.0,
                )
            )
        # What comes behind the steps takes a moment too.
        RoundRobin(plan, record).measure(contenders, plan.left - (5 if plan.on_gpu else 0))
    record.columns, record.text = COLUMNS, TEXT


def longest_kernels(plan: Plan, record: Record) -> None:
    """Add the kernels that take most of CURE's step on the fast engine."""
    if not plan.on_gpu or plan.left < 3:
        why = "a CPU has no kernels to profile" if not plan.on_gpu else "no time is left"
        record.add(Row({"kernel": "profile"}, "left out", why))
        return
    with tempfile.TemporaryDirectory() as cache:
        loader = open_loader(plan, plan.sizes.batch, cache=Path(cache))
        work = build(Case("resnet18", "cure", "fast", plan.sizes.batch), plan, loader)
        for _ in range(plan.sizes.warmups):
            work.step()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            work.step()
            torch.cuda.synchronize()
    spent: dict[str, list[float]] = {}
    for event in profiler.events() or ():
        if is_kernel(event):
            spent.setdefault(event.name[:80], []).append(event.device_time / 1e6)
    for name, times in sorted(spent.items(), key=lambda item: -sum(item[1]))[:TOP]:
        record.add(Row({"kernel": name}, note=f"{len(times)} calls", rounds=(sum(times),)))


PARTS: dict[str, Callable[[Plan, Record], None]] = {
    "ceilings": measure_ceilings,
    "kernels": kernels,
    "equality": equality,
    "resnet18-128": steps,
    "wrn34-10-128": wide,
}
