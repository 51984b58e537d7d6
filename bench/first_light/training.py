"""The last part: CURE on CIFAR-10 for as long as the call has time, and what it reaches."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from bench.gpu.plan import Plan
from bench.gpu.record import Record, Row, describe
from bench.gpu.summary import read_results
from bench.gpu.targets import step_of

BATCH, IMAGES = 128, 50_000
# Seconds of a step where none was measured, of an epoch of natural training over one of CURE, and
# of all that is no epoch: start, compilation, validation, PGD-20 and AutoAttack on 1,000 images.
STEP_S, NATURAL, OTHER_S = 0.016, 0.12, 120.0
# Natural epochs where no start is given, as a share of CURE's.
PRETRAIN = 0.25


def train(plan: Plan, data_root: Path, start: Path | None) -> int:
    """Train, evaluate, and record accuracy and seconds; return the exit code."""
    record = Record("training", describe(plan))
    folder = plan.out / "run"
    words = tiny_words() if plan.tiny else cifar_words(plan, data_root, start)
    record.text = f"cure-fast {' '.join(words)}"
    record.write(plan.out)
    code = subprocess.run(
        [sys.executable, "-m", "cure_fast", *words, "--out", str(folder)], check=False
    ).returncode
    found = folder / "results.json"
    if found.exists():
        models = json.loads(found.read_text(encoding="utf-8"))["models"]
        for network, entry in models.items():
            for attack, result in entry["attacks"].items():
                figures = {"accuracy": result["accuracy"], "images": float(result["count"])}
                key: dict[str, str | int] = {"network": network, "attack": attack}
                record.add(Row(key, rounds=(max(result["seconds"], 1e-9),), figures=figures))
    record.columns = (("accuracy", "accuracy in %", 1.0), ("images", "images", 1.0))
    if code:
        record.add(Row({"part": "training"}, "failed", f"cure-fast ended with {code}"))
    record.finished = not code
    record.write(plan.out)
    return 1 if record.failed else 0


def cifar_words(plan: Plan, data_root: Path, start: Path | None) -> list[str]:
    """Return the words of a training that fills the time, by the measured step."""
    row = step_of(read_results(plan.out), "cure", "fast")
    step = row["seconds"][1] if row else STEP_S
    epoch = step * IMAGES / BATCH
    whole = 1.0 if start else 1.0 + PRETRAIN * NATURAL
    epochs = max(2, int((plan.seconds - OTHER_S) / (epoch * whole)))
    words = ["train", "cifar10-resnet18-fast", "--data-root", str(data_root)]
    words += ["--epochs", str(epochs), "--val-every", str(max(1, epochs // 3))]
    words += ["--attacks", "natural,pgd20,aa", "--limit", "1000", "--aa-limit", "1000"]
    words += ["--no-tensorboard", "--checkpoint-every", str(epochs), "--networks", "none"]
    if start:
        return [*words, "--init-from", str(start), "--pretrain-epochs", "0"]
    return [*words, "--pretrain-epochs", str(max(1, int(PRETRAIN * epochs)))]


def tiny_words() -> list[str]:
    """Return the words of a training of seconds on a CPU, for a rehearsal."""
    words = (
        "train quickstart --train-images 96 --val-images 20 --width 4 --batch-size 32 --epochs 1 "
        "--pretrain-epochs 1 --attack-steps 1 --attacks natural,pgd2 --limit 16 --device cpu "
        "--loader resident --no-tensorboard"
    )
    return [*words.split()]
