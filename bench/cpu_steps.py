"""Steps of CURE and TRADES on a CPU, beside those of the public code.

    python -m bench.cpu_steps --amp bf16

ResNet-18, PGD-10, one thread. The four kinds of steps take turns, as a processor's speed changes
from one minute to the next, and processor time is taken, which other programs disturb less. The
public code computes in float32 whatever --amp says.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.gpu.engines import Case, build, first_batch, open_loader, open_run
from bench.gpu.plan import Plan
from cure_fast.runs.environment import processor_name
from cure_fast.training.trainer import next_step

KINDS = [(method, engine) for method in ("cure", "trades") for engine in ("eager", "authors")]


def main(arguments: Sequence[str]) -> None:
    """Time the steps in turns; print medians and their ratios."""
    reading = parser()
    options = reading.parse_args(arguments)
    if options.batch < 2 or options.rounds < 1:
        reading.error("expected --batch of 2 or more and --rounds of 1 or more")
    torch.set_num_threads(1)
    print(f"{processor_name()}, torch {torch.__version__}, --amp {options.amp}", flush=True)
    plan = Plan(torch.device("cpu"), options.tiny, seconds=0.0, out=Path())
    with tempfile.TemporaryDirectory() as cache:
        steps = build_steps(plan, options.batch, options.amp, Path(cache))
        seconds = time_steps(steps, options.rounds)
    for (method, engine), each in seconds.items():
        span = f"{min(each):.3f} to {max(each):.3f}"
        print(f"{method:8}{engine:10}{median(each):8.3f} s of processor time  ({span})")
    for one, other in [*zip(KINDS[::2], KINDS[1::2], strict=True), (KINDS[0], KINDS[2])]:
        ratio = median(seconds[one]) / median(seconds[other])
        print(f"{' '.join(one)} / {' '.join(other)}: {ratio:.2f}")


def parser() -> argparse.ArgumentParser:
    """Return the options."""
    made = argparse.ArgumentParser(prog="python -m bench.cpu_steps", description=__doc__)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    made.add_argument("--amp", choices=("off", "bf16"), default="off", help="our precision")
    made.add_argument("--batch", type=int, default=32, help="images of a step")
    made.add_argument("--rounds", type=int, default=5, help="steps of each kind")
    made.add_argument("--tiny", action="store_true", help="rehearse on a tiny network")
    return made


def build_steps(
    plan: Plan, batch: int, amp: str, cache: Path
) -> dict[tuple[str, str], Callable[[], Any]]:
    """Return what takes a step of each kind."""
    loader = open_loader(plan, batch, cache=cache)
    steps: dict[tuple[str, str], Callable[[], Any]] = {}
    for method, engine in KINDS:
        case = Case(plan.sizes.network("resnet18"), method, engine, batch)
        if engine == "authors":
            steps[method, engine] = build(case, plan, loader).step
            continue
        torch.manual_seed(0)
        run, images = open_run(case, plan, loader, amp), first_batch(loader)
        steps[method, engine] = lambda run=run, images=images: next_step(run, images)
    return steps


def time_steps(
    steps: dict[tuple[str, str], Callable[[], Any]], rounds: int
) -> dict[tuple[str, str], list[float]]:
    """Return seconds of processor time of each kind's steps, after a first one that allocates."""
    for step in steps.values():
        step()
    seconds: dict[tuple[str, str], list[float]] = {kind: [] for kind in steps}
    for _ in range(rounds):
        for kind, step in steps.items():
            before = time.process_time()
            step()
            seconds[kind].append(time.process_time() - before)
    return seconds


if __name__ == "__main__":
    main(sys.argv[1:])
