"""Time of saving a checkpoint, and its share of the training that lies between two of them.

    python -m pytest bench/bench_checkpoint.py --benchmark-only

What is saved is CURE's state with ResNet-18: the model, its momentum and the revision model, in all
134 MB, flushed to the disk that holds the temporary files. By default that happens once an epoch.
The epoch is that of CIFAR-10's 50,000 images in steps of bench_step.py: on a GPU ResNet-18 itself;
on a CPU the small ResNet, whose steps are many times shorter, so that the share is an upper bound.
``share_of_epoch_percent`` (extra_info) compares the medians of both.
"""

from __future__ import annotations

import math
import statistics
import time
from pathlib import Path

import pytest
import torch

from bench.bench_step import BATCH, DEVICE, GPU, MODEL, make_run, random_batch
from cure_fast.config import Config
from cure_fast.config.values import to_dict
from cure_fast.methods import select_method
from cure_fast.models import build_model
from cure_fast.runs.checkpoint import load_checkpoint, save_checkpoint
from cure_fast.step.state import TrainState
from cure_fast.step.train_step import train_step
from cure_fast.training.trainer import build_run

IMAGES, STEPS_TIMED, WARMUP = 50_000, 5, 2


def resnet18_run() -> TrainState:
    """Return a run of CURE with ResNet-18 whose optimiser has momentum for every weight."""
    config = select_method(Config(), "cure")
    model = build_model("resnet18", num_classes=10).to(DEVICE)
    run = build_run(config, model, make_run("cure").loader, DEVICE)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    return run


def step_seconds() -> float:
    """Return the median time of a CURE step of bench_step.py's shape."""
    run, batch = make_run("cure"), random_batch()
    times = []
    for _ in range(WARMUP + STEPS_TIMED):
        started = time.perf_counter()
        train_step(run, batch)
        if GPU:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[WARMUP:])


@pytest.mark.benchmark(group="checkpoint")
def bench_save(benchmark, tmp_path: Path):
    run, folder = resnet18_run(), tmp_path / "checkpoints"
    config = to_dict(run.config)

    def save() -> Path:
        run.step += 1
        return save_checkpoint(folder, run.step, run.state_dict(), config)

    path = benchmark.pedantic(save, rounds=7, warmup_rounds=2)
    step, steps = step_seconds(), math.ceil(IMAGES / BATCH)
    benchmark.extra_info |= {
        "megabytes": round(sum(p.stat().st_size for p in path.iterdir()) / 1e6, 1),
        "step": f"{MODEL}, {BATCH} images",
        "step_seconds": step,
        "steps_per_epoch": steps,
        "share_of_epoch_percent": 100 * benchmark.stats.stats.median / (step * steps),
    }
    assert benchmark.extra_info["share_of_epoch_percent"] < 1


@pytest.mark.benchmark(group="checkpoint")
def bench_load(benchmark, tmp_path: Path):
    run = resnet18_run()
    save_checkpoint(tmp_path, 1, run.state_dict(), to_dict(run.config))
    state, skipped = benchmark.pedantic(
        lambda: load_checkpoint(tmp_path), rounds=5, warmup_rounds=1
    )
    assert not skipped and state["step"] == 0
