"""The first minutes on a GPU: ``python -m bench.first_light`` measures what is most worth knowing.

Two calls of at most five minutes each, as machines are lent by the minute. The first compares
every kernel and both engines and times the steps that targets name; the second trains. Each part is
a process of its own with a time of its own; what it found is on disk before the next begins.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.first_light.page import write_page
from bench.first_light.processes import Ended, Planned, run_all

# Seconds of each part's process at most, its start included, in the order of the calls.
SECONDS = {
    1: {
        "ceilings": 20,
        "kernels": 55,
        "equality": 55,
        "resnet18-128": 115,
        "wrn34-10-128": 50,
    },
    2: {"training": 295},
}
# Of a call at most; parts that end earlier leave their time to those after them.
CALL_S = 300
# Importing torch, and the first touch of a GPU.
START_S = 10
RESULTS = Path(__file__).parents[1] / "results"
REHEARSALS = Path("runs") / "first-light-rehearsal"


def main(arguments: Sequence[str]) -> int:
    """Run a call, or one part of it in this process; return the exit code."""
    options = parser().parse_args(arguments)
    if options.device == "cpu" and not options.tiny:
        print("error: --device cpu: expected --tiny with it.", file=sys.stderr)
        return 2
    if options.tiny and options.device == "cpu":
        # Read when a kernel is defined.
        os.environ.setdefault("TRITON_INTERPRET", "1")
    if options.part:
        return run_part(options)
    if options.device == "cuda" and not has_gpu():
        print("error: no GPU that torch can use. Rehearse: --tiny --device cpu.", file=sys.stderr)
        return 2
    folder: Path = options.out or (REHEARSALS if options.tiny else RESULTS / "first-light")
    folder.mkdir(parents=True, exist_ok=True)
    planned = SECONDS[options.call]
    total = sum(sum(each.values()) for each in SECONDS.values())
    print(
        f"call {options.call}: {sum(planned.values())} s planned at most, {total} s in both calls"
    )
    # Else parts, which are sessions of their own, would outlive this process.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    parts = [Planned(name, s, command(name, s, folder, options)) for name, s in planned.items()]
    before = former(folder, [part.name for part in parts])
    about = {"tiny": options.tiny, "command": "python -m bench.first_light"}

    def tell(ended: list[Ended]) -> None:
        write_page(folder, [*before, *ended], about)

    ended = run_all(parts, folder, CALL_S, tell)
    print(f"see {folder / 'first-light.md'}")
    return 0 if all(part.how == "finished" for part in ended) else 1


def has_gpu() -> bool:
    """Return whether torch finds a GPU."""
    import torch

    return torch.cuda.is_available()


def parser() -> argparse.ArgumentParser:
    """Return the options."""
    made = argparse.ArgumentParser(prog="python -m bench.first_light", description=__doc__)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    made.add_argument("--call", type=int, choices=sorted(SECONDS), default=1, help="1 or 2")
    made.add_argument("--out", type=Path, help="folder of the results")
    made.add_argument("--device", default="cuda", help="cuda, or cpu with --tiny")
    made.add_argument("--tiny", action="store_true", help="rehearse on tiny shapes")
    made.add_argument("--data-root", type=Path, default=Path("data"), help="of CIFAR-10, to train")
    made.add_argument("--start", type=Path, help="weights to start from, instead of training them")
    made.add_argument("--part", help=argparse.SUPPRESS)
    made.add_argument("--seconds", type=float, default=60, help=argparse.SUPPRESS)
    return made


def command(
    name: str, seconds: float, folder: Path, options: argparse.Namespace
) -> tuple[str, ...]:
    """Return the command line of a part's process."""
    words = ["--part", name, "--seconds", f"{seconds:g}", "--out", str(folder)]
    words += ["--device", options.device, "--data-root", str(options.data_root)]
    words += ["--tiny"] * options.tiny
    words += ["--start", str(options.start)] if options.start else []
    return (sys.executable, "-m", "bench.first_light", *words)


def former(folder: Path, now: Sequence[str]) -> list[Ended]:
    """Return how parts of an earlier call ended, which this one does not repeat."""
    path = folder / "first-light.json"
    if not path.exists():
        return []
    known = json.loads(path.read_text(encoding="utf-8"))["parts"]
    return [Ended(**part) for part in known if part["name"] not in now]


def run_part(options: argparse.Namespace) -> int:
    """Measure one part in this process; return the exit code."""
    import torch

    from bench.first_light.parts import PARTS
    from bench.gpu.plan import Plan
    from bench.gpu.record import Record, Row, describe, reason

    plan = Plan(
        device=torch.device(options.device),
        tiny=options.tiny,
        seconds=max(2.0, options.seconds - START_S),
        out=options.out.resolve(),
        command=("python", "-m", "bench.first_light", "--part", options.part),
    )
    if options.part == "training":
        from bench.first_light.training import train

        return train(plan, options.data_root, options.start)
    record = Record(options.part, describe(plan))
    try:
        PARTS[options.part](plan, record)
        record.finished = True
    except Exception as error:
        record.add(Row({"part": options.part}, "failed", reason(error)))
    finally:
        # Also after the signal that its time is over: what was measured is worth keeping.
        record.write(plan.out)
    return 1 if record.failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
