"""Train the same tiny runs by two checkouts, and compare every tensor they leave bit by bit.

    python -m bench.identical --against ../former [--flags="--clamp-start"] [--methods cure,trades]

The eager engine on one CPU thread computes the same bits wherever the same operations run in the
same order: so a change that was to move code and not results leaves every tensor as it was.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors.torch import load_file

METHODS = (
    *("cure", "cure_paper", "cure_official", "cure_eff", "cure_eff_official"),
    *("trades", "pgd_at", "natural"),
)
RUN = (
    *("train", "quickstart", "--engine", "eager", "--epochs", "3", "--pretrain-epochs", "1"),
    *("--train-images", "192", "--val-images", "40", "--attack-steps", "3", "--limit", "20"),
    *("--attacks", "natural", "--val-attack-steps", "2", "--loader", "resident"),
)


def train(checkout: Path, out: Path, flags: list[str]) -> None:
    """Train in a process of its own, from the checkout's code alone."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    cache = ("--cache", str(out.parent / f"cache-{out.name}"), "--out", str(out))
    command = [sys.executable, "-m", "cure_fast", *RUN, *flags, *cache]
    done = subprocess.run(
        command, cwd=checkout, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{checkout}: {' '.join(command)}\n{done.stderr}")


def different(here: Path, there: Path) -> list[str]:
    """Return what differs between the weights of two run folders; nothing if they are equal."""
    names = sorted(path.name for path in there.glob("*.safetensors"))
    if names != sorted(path.name for path in here.glob("*.safetensors")):
        return [f"other files than {', '.join(names)}"]
    found = []
    for name in names:
        ours, theirs = load_file(here / name), load_file(there / name)
        if ours.keys() != theirs.keys():
            found.append(f"{name}: other tensors")
            continue
        found += [f"{name}: {key}" for key in theirs if not ours[key].equal(theirs[key])]
    return found


def main() -> None:
    """Compare every method, and exit with 1 if one differs."""
    parser = argparse.ArgumentParser(description="Train by two checkouts, and compare.")
    parser.add_argument("--against", type=Path, required=True, help="checkout of the other commit")
    parser.add_argument("--methods", default=",".join(METHODS), help="with commas between")
    parser.add_argument("--flags", default="", help="further flags for this checkout alone")
    arguments = parser.parse_args()
    here, wrong = Path(__file__).resolve().parents[1], 0
    for method in arguments.methods.split(","):
        with tempfile.TemporaryDirectory() as folder:
            ours, theirs = Path(folder) / "ours", Path(folder) / "theirs"
            train(here, ours, ["--method", method, *arguments.flags.split()])
            train(arguments.against.resolve(), theirs, ["--method", method])
            found = different(ours, theirs)
            count = sum(len(load_file(path)) for path in ours.glob("*.safetensors"))
        wrong += bool(found)
        print(f"{method}: {'; '.join(found) or f'{count} tensors identical'}", flush=True)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
