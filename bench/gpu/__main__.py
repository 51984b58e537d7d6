"""Command line of the GPU benchmark; ``python -m bench.gpu --help``."""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bench.gpu.ablation import measure_ablation
from bench.gpu.ceilings import measure_ceilings
from bench.gpu.feeds import measure_feeds
from bench.gpu.gate import RedTestsError, require_green_tests
from bench.gpu.kernel_part import measure_kernels
from bench.gpu.plan import BATCHES, MODELS, STEP_PARTS, Plan
from bench.gpu.record import Record, Row, describe, reason
from bench.gpu.steps import measure_steps
from bench.gpu.summary import write_summary
from cure_fast.errors import InputError
from cure_fast.runs.environment import choose_device

STEPS = dict.fromkeys(STEP_PARTS, measure_steps)
# In the order of their turn: what targets name comes first.
PARTS: dict[str, Callable[[Plan, Record], None]] = {
    "ceilings": measure_ceilings,
    **{part: measure for part, measure in STEPS.items() if STEP_PARTS[part][1] == BATCHES[0]},
    "ablation": measure_ablation,
    "kernels": measure_kernels,
    "feeds": measure_feeds,
    **STEPS,
}
# The tests that come before each part, by themselves.
GATE = "gate"
# What stands for several parts.
SEVERAL = {model: tuple(f"{model}-{batch}" for batch in BATCHES) for model in MODELS}
RESULTS = Path(__file__).parents[1] / "results"
REHEARSE = "python -m bench.gpu --tiny --device cpu"
REHEARSALS = Path("runs") / "bench-gpu-rehearsal"
# Seconds of a part's measuring, so that with its start and its end it takes eight minutes.
SECONDS = 450
# Seconds that a part may take beyond its time before it is ended, and then to write what it has.
GRACE, ENDING = 75, 30
INTERRUPTED = 130


def parser() -> argparse.ArgumentParser:
    """Return the options."""
    made = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description="Measure what this GPU can do, and what of it each training engine gets.",
    )
    made.add_argument(
        "--part",
        nargs="+",
        choices=[GATE, *SEVERAL, *PARTS],
        default=list(PARTS),
        help=f"what to measure, of {', '.join(PARTS)}; {', '.join(SEVERAL)} for a model's three "
        f"parts, {GATE} for the tests alone; all parts without it",
        metavar="NAME",
    )
    made.add_argument(
        "--out",
        type=Path,
        help="folder of the results; bench/results/gpu-<gpu name>-<date> without it, and "
        f"{REHEARSALS} for tiny shapes",
    )
    made.add_argument(
        "--device",
        default="cuda",
        help="cuda, cuda:N for the GPU of that number, or cpu, which can only rehearse and needs "
        "--tiny; cuda without it",
    )
    made.add_argument("--tiny", action="store_true", help=f"rehearse on tiny shapes: {REHEARSE}")
    made.add_argument(
        "--seconds-per-part",
        type=float,
        default=SECONDS,
        help=f"time of a part's measuring; {SECONDS} without it",
    )
    return made


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark; return the exit code: 0, 1 for a failure, 2 for wrong options."""
    options = parser().parse_args(arguments)
    try:
        plan = plan_of(options, arguments)
        make_folder(plan.out)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if plan.on_gpu and plan.device.index is not None:
        # Streams, events and graphs are those of the current GPU.
        torch.cuda.set_device(plan.device)
    try:
        require_green_tests(plan)
    except RedTestsError as error:
        print(f"error: {error}; nothing was measured", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted while the tests ran; nothing was measured", file=sys.stderr)
        return INTERRUPTED
    # The tests' time is not the part's.
    plan = plan_of(options, arguments)
    parts = parts_of(options.part)
    try:
        if len(parts) == 1:
            return run_part(parts[0], plan)
        return run_parts(parts, plan, folder=options.out or Path(os.path.relpath(plan.out)))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def make_folder(folder: Path) -> None:
    """Make the folder of the results where it is not there yet.

    Raises:
        InputError: if that cannot be.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = "a file" if folder.is_file() else (error.strerror or str(error)).lower()
        raise InputError(
            f"--out {folder}: expected a folder, or a path where one can be made, got {what}. "
            "Name another."
        ) from error


def parts_of(names: Sequence[str]) -> list[str]:
    """Return the parts that names of ``--part`` ask for, each once."""
    parts = [part for name in names for part in SEVERAL.get(name, (name,)) if name != GATE]
    return list(dict.fromkeys(parts))


def plan_of(options: argparse.Namespace, arguments: Sequence[str]) -> Plan:
    """Return what the options ask for.

    Raises:
        InputError: for a device that is not there, a CPU without tiny shapes, or no time.
    """
    device = device_of(options.device)
    if device.type == "cpu" and not options.tiny:
        raise InputError(
            "--device cpu: expected --tiny with it, as the full shapes take a CPU days. "
            f"`{REHEARSE}` rehearses."
        )
    if not options.seconds_per_part > 0:
        raise InputError(
            f"--seconds-per-part: expected more than 0, got {options.seconds_per_part:g}."
        )
    return Plan(
        device=device,
        tiny=options.tiny,
        seconds=options.seconds_per_part,
        out=(options.out or default_folder(device, options.tiny)).resolve(),
        command=("python", "-m", "bench.gpu", *arguments),
    )


def device_of(name: str) -> torch.device:
    """Return the device of that name.

    Raises:
        InputError: for a name that is none, or a GPU that is not there.
    """
    number = re.fullmatch(r"cuda(?::([0-9]+))?", name)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if number and int(number[1] or 0) >= count:
        raise InputError(
            f"--device {name}: this machine has {count} usable GPUs. Name another, or rehearse "
            f"without one: `{REHEARSE}`."
        )
    return choose_device(name)


def default_folder(device: torch.device, tiny: bool) -> Path:
    """Return where results go; what a rehearsal finds is no result."""
    if tiny:
        return REHEARSALS
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
    return RESULTS / f"gpu-{name}-{time.strftime('%Y-%m-%d')}"


def run_part(part: str, plan: Plan) -> int:
    """Measure one part in this process; return the exit code."""
    record = Record(part, describe(plan))
    try:
        PARTS[part](plan, record)
        record.finished = True
    except Exception as error:
        record.add(Row({"part": part}, "failed", reason(error)))
    except KeyboardInterrupt:
        count = sum(row.status == "measured" for row in record.rows)
        kept = f"{count} rows were measured and are kept" if count else "nothing was measured"
        print(f"{part}: {kept}", file=sys.stderr)
        raise
    finally:
        # Also after Ctrl-C: what was measured is worth keeping.
        record.write(plan.out)
        print(f"{part}: see {write_summary(plan.out)}", flush=True)
    return 1 if record.failed else 0


def run_parts(parts: Sequence[str], plan: Plan, *, folder: Path) -> int:
    """Measure each part in a process of its own, so that none suffers from one before it.

    Args:
        parts: which.
        plan: what was asked for.
        folder: of the results, as typed: each part's record says what it was called with, and the
            folders of this machine are nobody else's business.
    """
    failed = []
    for part in parts:
        command = [
            *(sys.executable, "-m", "bench.gpu", "--part", part, "--out", str(folder)),
            *("--device", str(plan.device), "--seconds-per-part", f"{plan.seconds:g}"),
            *(("--tiny",) if plan.tiny else ()),
        ]
        if run_process(command, plan.seconds + GRACE):
            failed.append(part)
    if failed:
        print(f"error: see the failures in {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def run_process(command: Sequence[str], seconds: float) -> int:
    """Run a command to its end, or stop it when its time is over; return its exit code."""
    with subprocess.Popen(command) as process:
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            print(f"error: not done in {seconds:.0f} s, stopped", file=sys.stderr)
            process.send_signal(signal.SIGINT)
        except KeyboardInterrupt:
            # The terminal has sent it to the process too, which writes what it has.
            process.wait(ENDING)
            raise
        try:
            process.wait(ENDING)
        except subprocess.TimeoutExpired:
            process.kill()
        return process.wait() or 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
