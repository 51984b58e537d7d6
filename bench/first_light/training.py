"""The last part: CURE on CIFAR-10 for as long as the call has time, and what it reaches."""

from __future__ import annotations

import json
import shutil
import signal
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
# Seconds that a training has to end, less than its caller waits.
ENDING_S = 4.0
# Natural epochs where no start is given, as a share of CURE's.
PRETRAIN = 0.25


def train(plan: Plan, data_root: Path, start: Path | None) -> int:
    """Train, evaluate, and record accuracy and seconds; return the exit code."""
    record = Record("training", describe(plan))
    record.columns = (("accuracy", "accuracy in %", 1.0), ("images", "images", 1.0))
    folder = plan.out / "run"
    words = tiny_words() if plan.tiny else cifar_words(plan, data_root, start)
    record.text = f"cure-fast {' '.join(words)}"
    record.write(plan.out)
    shutil.rmtree(folder, ignore_errors=True)
    code = run([*words, "--out", str(folder)])
    # AutoAttack comes last and by itself: where no time is left for it, the rest is recorded.
    keep(record, folder)
    record.write(plan.out)
    if code == 0 and not plan.tiny:
        asked = ["--attacks", "aa", "--limit", "1000", "--data-root", str(data_root)]
        code = run(["eval", str(folder), *asked])
        keep(record, folder)
    if code:
        record.add(Row({"part": "training"}, "failed", f"cure-fast ended with {code}"))
    record.finished = not code
    record.write(plan.out)
    return 1 if record.failed else 0


def run(words: list[str]) -> int:
    """Run a command of cure-fast and return its exit code, also where the time is over."""
    with subprocess.Popen([sys.executable, "-m", "cure_fast", *words]) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            return process.wait(ENDING_S)


def keep(record: Record, folder: Path) -> None:
    """Add the accuracies of a run that are not in the record yet."""
    path, known = folder / "results.json", [row.key for row in record.rows]
    models = json.loads(path.read_text(encoding="utf-8"))["models"] if path.exists() else {}
    for network, entry in models.items():
        for attack, result in entry["attacks"].items():
            key: dict[str, str | int] = {"network": network, "attack": attack}
            if key not in known:
                figures = {"accuracy": result["accuracy"], "images": float(result["count"])}
                record.add(Row(key, rounds=(max(result["seconds"], 1e-9),), figures=figures))


def cifar_words(plan: Plan, data_root: Path, start: Path | None) -> list[str]:
    """Return the words of a training that fills the time, by the measured step."""
    row = step_of(read_results(plan.out), "cure", "fast")
    step = row["seconds"][1] if row else STEP_S
    epoch = step * IMAGES / BATCH
    whole = 1.0 if start else 1.0 + PRETRAIN * NATURAL
    epochs = max(2, int((plan.seconds - OTHER_S) / (epoch * whole)))
    words = ["train", "cifar10-resnet18-fast", "--data-root", str(data_root)]
    words += ["--epochs", str(epochs), "--val-every", str(max(1, epochs // 3))]
    words += ["--attacks", "natural,pgd20", "--limit", "1000"]
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
