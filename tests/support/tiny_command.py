"""The tiny run as a command line, and how two of its run folders are compared."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

from cure_fast.methods import find_method
from cure_fast.models.weights import read_weights
from tiny_job import stable_rows

# Of the tiny run, in both of its stages.
STEPS_PER_EPOCH = 3


def tiny_words(*more: str, method: str = "cure", out: str = "run") -> list[str]:
    """Return the words of a run of a second: one epoch natural, two of the method, two attacks.

    Paths are relative: run it in a folder of its own.
    """
    words = (
        f"train quickstart --method {method} --train-images 96 --val-images 20 --width 4 "
        "--batch-size 32 --pretrain-epochs 1 --epochs 2 --attack-steps 2 --step-size 0.075 "
        "--val-attack-steps 1 --attacks natural,pgd2 --limit 24 --eval-step-size 0.1 "
        f"--loader resident --log-every 1 --device cpu --no-tensorboard --cache cache --out {out}"
    )
    kind = ["--model", "vit-tiny"] if find_method(method).needs_attention else []
    return [*words.split(), *kind, *more]


def checkpoints(folder: Path) -> list[int]:
    """Return the steps of the finished checkpoints of a stage, in order."""
    names = (path.name for path in (folder / "checkpoints").glob("*"))
    return sorted(int(m[1]) for n in names if (m := re.fullmatch(r"checkpoint-(\d+)", n)))


def differences(first: Path, second: Path) -> list[str]:
    """Return in what two run folders differ, besides times and names; nothing for the same run."""
    found = []
    names = [{p.name for p in folder.glob("*.safetensors")} for folder in (first, second)]
    if names[0] != names[1] or "model.safetensors" not in names[0]:
        found.append(f"files of weights: {sorted(names[0])}, {sorted(names[1])}")
    for name in sorted(names[0] & names[1]):
        a, b = (read_weights(folder / name) for folder in (first, second))
        if a.keys() != b.keys():
            found.append(f"{name}: names of tensors")
        found += [f"{name}: {k}" for k in a.keys() & b.keys() if not torch.equal(a[k], b[k])]
    if stable_rows(first) != stable_rows(second):
        found.append("metrics.jsonl")
    if stable_results(first) != stable_results(second):
        found.append("results.json")
    found += [f"{folder}: no report" for folder in (first, second) if not report(folder).exists()]
    return found


def report(folder: Path) -> Path:
    return folder / "report.html"


def stable_results(folder: Path) -> Any:
    """Return results.json without the times, which no two runs share."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: strip(v) for k, v in value.items() if k != "seconds"}
        return [strip(item) for item in value] if isinstance(value, list) else value

    return strip(json.loads((folder / "results.json").read_text(encoding="utf-8")))
