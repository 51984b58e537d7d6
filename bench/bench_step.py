"""Time of one training step and its parts: CURE against TRADES and PGD-AT.

    python -m pytest bench/bench_step.py --benchmark-only

On a CPU the small ResNet takes batches of 64 CIFAR-sized images; with a GPU, ResNet-18 takes 128.
Compare CURE with TRADES in one run only: a machine's speed changes between runs.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cure_fast.batch import Batch
from cure_fast.classifier import attack_mode
from cure_fast.config import AttackConfig, Config, OptimConfig
from cure_fast.kernels import ema_update_, rgp_mask_
from cure_fast.loaders import ImageSet, Loader, make_loader
from cure_fast.methods import select_method
from cure_fast.models import build_model
from cure_fast.policies.conserve import maskable_parameters
from cure_fast.runs.environment import choose_dtype
from cure_fast.step.state import TrainState
from cure_fast.step.train_step import add_gradients, train_step
from cure_fast.training.trainer import build_run

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
MODEL, BATCH, STEPS = ("resnet18", 128, 10) if GPU else ("resnet-small", 64, 10)


def one_batch_loader() -> Loader:
    """Return a loader of one batch of random images: the step is measured, not the feeding."""
    pixels = np.random.default_rng(0).integers(0, 256, (BATCH, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(BATCH) % 10
    images = ImageSet("random", pixels, labels, tuple("0123456789"), "random")
    return make_loader(
        "resident",
        images,
        batch_size=BATCH,
        device=DEVICE,
        seed=0,
        crop_padding=4,
        flip=True,
        workers=None,
        cache=Path("."),
    )


def random_batch() -> Batch:
    generator = torch.Generator(DEVICE).manual_seed(0)
    x = torch.rand(BATCH, 3, 32, 32, generator=generator, device=DEVICE)
    y = torch.randint(10, (BATCH,), generator=generator, device=DEVICE)
    index = torch.arange(BATCH, device=DEVICE)
    return Batch(x.contiguous(memory_format=torch.channels_last), y, index)


def make_run(method: str) -> TrainState:
    torch.manual_seed(0)
    config = select_method(
        Config(attack=AttackConfig(attack_steps=STEPS), optim=OptimConfig(batch_size=BATCH)), method
    )
    model = build_model(MODEL, num_classes=10).to(DEVICE)
    model.compute_dtype = choose_dtype("auto", DEVICE)
    return build_run(config, model, one_batch_loader(), DEVICE)


def timed(function):
    """Wait for the device, so that the clock sees the work and not its launch."""

    def wrapped():
        function()
        if GPU:
            torch.cuda.synchronize()

    return wrapped


@pytest.mark.benchmark(group="step")
@pytest.mark.parametrize("method", ["natural", "pgd_at", "trades", "cure", "cure_official"])
def bench_step(benchmark, method):
    run, batch = make_run(method), random_batch()
    benchmark.extra_info["images_per_step"] = BATCH
    benchmark.pedantic(timed(lambda: train_step(run, batch)), rounds=7, warmup_rounds=2)


@pytest.mark.benchmark(group="ablation of CURE")
@pytest.mark.parametrize(
    "settings",
    [{}, {"rgp": False}, {"revision": False}, {"rgp": False, "revision": False}],
    ids=str,
)
def bench_cure_without(benchmark, settings):
    run, batch = make_run("cure"), random_batch()
    config = replace(run.config, settings=replace(run.config.settings, **settings))
    run = build_run(config, run.model, run.loader, DEVICE)
    benchmark.pedantic(timed(lambda: train_step(run, batch)), rounds=7, warmup_rounds=2)


@pytest.mark.benchmark(group="parts")
def bench_attack(benchmark):
    run, batch = make_run("cure"), random_batch()

    def part():
        with attack_mode(run.model, "eval"):
            run.method.attack(run, batch)

    benchmark.pedantic(timed(part), rounds=7, warmup_rounds=2)


@pytest.mark.benchmark(group="parts")
def bench_loss_and_backward(benchmark):
    run, batch = make_run("cure"), random_batch()

    def part():
        add_gradients(run, batch, 1)
        run.optimizer.zero_grad()
        run.gradients.clear()

    benchmark.pedantic(timed(part), rounds=7, warmup_rounds=2)


@pytest.mark.benchmark(group="parts")
def bench_mask(benchmark):
    run = make_run("cure")
    chosen = maskable_parameters(run.model, "all_but_classifier", True)
    grads, adversarial = ([torch.randn_like(p) for p in chosen.values()] for _ in range(2))
    part = timed(lambda: rgp_mask_(grads, grads, adversarial, percentile=30, alpha=0.1))
    benchmark.extra_info["weights"] = sum(g.numel() for g in grads)
    benchmark.pedantic(part, rounds=20, warmup_rounds=3)


@pytest.mark.benchmark(group="parts")
def bench_revision(benchmark):
    run = make_run("cure")
    averages, params = list(run.networks["revision"].parameters()), list(run.model.parameters())
    part = timed(lambda: ema_update_(averages, params, decay=0.999, rate=0.2, seed=0, step=0))
    benchmark.pedantic(part, rounds=20, warmup_rounds=3)
