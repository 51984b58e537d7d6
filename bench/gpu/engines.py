"""One step of each engine, on a batch that stays the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.authors import AuthorsSettings, build_authors
from bench.gpu.plan import LEARNING_RATE, Plan
from cure_fast.batch import Batch
from cure_fast.config import AttackConfig, Config, OptimConfig
from cure_fast.engine.fast import FastEngine
from cure_fast.loaders import ImageSet, Loader, make_loader
from cure_fast.methods import select_method
from cure_fast.models import build_model
from cure_fast.runs.environment import choose_dtype
from cure_fast.step.state import TrainState
from cure_fast.training.trainer import build_run, next_step

COMPILED = ("eager+compile", "eager+reduce-overhead")


@dataclass(frozen=True)
class Case:
    """A training step to measure.

    Attributes:
        model: a key of ``cure_fast.models.MODELS``.
        method: a training method.
        engine: one of ``plan.ENGINES``.
        batch: images per step.
        without: features of the fast engine that are off.
    """

    model: str
    method: str
    engine: str
    batch: int
    without: tuple[str, ...] = ()


class BatchCutError(Exception):
    """Memory is short, and an engine went around that: its steps are others than asked for."""


class WrongEngineError(Exception):
    """A run has another engine than the one that was asked for, or not all of its features."""


class CompiledLateError(Exception):
    """A step that is timed had something to compile, as if it were another than those before."""


@dataclass
class Work:
    """What is timed.

    Attributes:
        step: takes one training step; takes images and labels where there is a choice of them.
        check: raises an error if the steps so far were not what was asked for.
    """

    step: Callable[..., Any]
    check: Callable[[], None] = lambda: None


def image_set(plan: Plan) -> ImageSet:
    """Return random images and labels: what they show makes no difference to the time."""
    sizes = plan.sizes
    shape = (sizes.images, sizes.image, sizes.image, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    labels = np.arange(sizes.images) % 10
    return ImageSet("random", pixels, labels, tuple("0123456789"), "a generator")


def open_loader(plan: Plan, batch: int, *, kind: str = "resident", cache: Path) -> Loader:
    """Return a loader of :func:`image_set` with the augmentation of CIFAR-10."""
    return make_loader(
        kind,
        image_set(plan),
        batch_size=batch,
        device=plan.device,
        seed=0,
        crop_padding=4,
        flip=True,
        workers=None,
        cache=cache,
    )


def first_batch(loader: Loader) -> Batch:
    """Return the first batch of an epoch."""
    with loader.epoch(0) as batches:
        return next(iter(batches))


def build(case: Case, plan: Plan, loader: Loader) -> Work:
    """Return the step of a case, on the first batch of ``loader``.

    Raises:
        WrongEngineError: if the fast engine does not take the case.
    """
    torch.manual_seed(0)
    batch = first_batch(loader)
    if case.engine == "authors":
        return _authors(case, plan, batch)
    run = open_run(case, plan, loader)
    if case.engine not in COMPILED:
        return Work(lambda: next_step(run, batch), lambda: check_run(run, case))
    graphs = case.engine == "eager+reduce-overhead"
    compile_networks(run, plan, graphs=graphs)
    step = CompiledStep(lambda: next_step(run, batch), compiling=plan.sizes.warmups, graphs=graphs)
    return Work(step, lambda: check_run(run, case))


@dataclass
class CompiledStep:
    """A step of networks that torch compiles when they are first called.

    The settings of the compiler take longer to set than some kernels to run, so they are set for
    the first steps alone, in which all is compiled. A later step that finds something to compile
    may go on uncompiled, and an error says so.

    Attributes:
        take: takes the step.
        compiling: how many steps may compile.
        graphs: whether compiled parts are replayed as CUDA graphs, which asks in each step whether
            one had to go without.
        taken: steps so far.
    """

    take: Callable[[], Any]
    compiling: int
    graphs: bool
    taken: int = 0

    def __call__(self) -> None:
        """Take a step.

        Raises:
            CompiledLateError: if it found something to compile after the first steps.
        """
        settled, before = self.taken >= self.compiling, compilations()
        with kept_buffers() if settled and not self.graphs else compiler_settings():
            if self.graphs:
                # What a step's passes return lives until its end, in the graphs' memory.
                torch.compiler.cudagraph_mark_step_begin()
            self.take()
        self.taken += 1
        if settled and compilations() > before:
            raise CompiledLateError(f"step {self.taken} had something to compile")


def compilations() -> int:
    """Return how often torch was about to compile in this process, whether it then did or not.

    Beyond its limit of compilations it does not, and goes on uncompiled.
    """
    # The compiler takes seconds to import, as in the functions below.
    from torch._dynamo.utils import counters

    return counters["frames"]["total"]


def _authors(case: Case, plan: Plan, batch: Batch) -> Work:
    settings = AuthorsSettings(attack_steps=plan.sizes.attack_steps)
    run = build_authors(
        case.method,
        case.model,
        plan.device,
        width=plan.sizes.widths.get(case.model),
        settings=settings,
    )
    for group in run.optimizer.param_groups:
        group["lr"] = LEARNING_RATE
    nchw = batch.x.contiguous(memory_format=torch.contiguous_format)
    return Work(lambda: run.step(nchw, batch.y))


def open_run(case: Case, plan: Plan, loader: Loader, amp: str = "auto") -> TrainState:
    """Return a run of this project's trainer at its first step, in the precision of ``--amp``."""
    sizes = plan.sizes
    config = Config(
        attack=AttackConfig(attack_steps=sizes.attack_steps),
        # So many epochs that the run does not end, and a rate that lets no weight overflow.
        optim=OptimConfig(
            batch_size=case.batch, epochs=100_000, lr=LEARNING_RATE, schedule="constant"
        ),
    )
    engine = "fast" if case.engine == "fast" else "eager"
    without: Any = case.without
    config = replace(config, run=replace(config.run, engine=engine, engine_without=without))
    config = select_method(config, case.method)
    width = sizes.widths.get(case.model)
    model = build_model(case.model, num_classes=10, width=width).to(plan.device)
    model.compute_dtype = choose_dtype(amp, plan.device)
    return build_run(config, model, loader, plan.device)


def compile_networks(run: TrainState, plan: Plan, *, graphs: bool) -> None:
    """Have torch compile the run's networks when they are first called.

    Args:
        run: whose networks.
        plan: the device. Inductor has no use for tiny shapes on a CPU, where it takes a minute.
        graphs: whether compiled parts are replayed as CUDA graphs (mode ``reduce-overhead``).
    """
    options: dict[str, Any] = {"backend": "inductor"} if plan.on_gpu else {"backend": "aot_eager"}
    if plan.on_gpu and graphs:
        options["mode"] = "reduce-overhead"
    for network in run.all_networks.values():
        network.compile(dynamic=False, **options)


@contextmanager
def compiler_settings() -> Iterator[None]:
    """Have the compiler take what steps ask of it.

    CURE takes several gradients of one graph, so no backward pass may give away its buffers. Each
    shape, mode and set of gradients is a compilation of its own, and more than torch's limit of
    eight; beyond a limit it would silently go on without, as it would where it can take no CUDA
    graph.
    """
    from torch._dynamo import config as dynamo_config
    from torch._inductor import config as inductor_config

    with (
        inductor_config.patch({"triton.cudagraph_or_error": True}),
        dynamo_config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True),
        kept_buffers(),
    ):
        yield


@contextmanager
def kept_buffers() -> Iterator[None]:
    """Have compiled backward passes give away no buffers.

    They ask for that whenever they run, not only when they are compiled: one from torch's cache
    refuses to go back twice where it was compiled for a step that goes back once.
    """
    from torch._functorch import config as functorch_config

    # Plain assignments, as `patch` would take some of the time of the steps that are timed.
    former = functorch_config.donated_buffer
    functorch_config.donated_buffer = False
    try:
        yield
    finally:
        functorch_config.donated_buffer = former


def check_run(run: TrainState, case: Case) -> None:
    """Raise an error if the run's steps are not those of the case.

    Raises:
        BatchCutError: if memory was short, so that a batch went in several passes or the fast
            engine gave way.
        WrongEngineError: if another engine computes them, or the fast one without all of its
            features.
    """
    if run.micro_batch_size is not None:
        raise BatchCutError(f"out of memory: passes of {run.micro_batch_size} images at a time")
    engine, wanted = run.engine, "fast" if case.engine == "fast" else "eager"
    if engine.name != wanted:
        problem = f"{engine.name} instead of {wanted}: {engine.reason}"
        # The fast engine gives way where memory runs out, and says so in these words.
        raise (BatchCutError if "memory" in str(engine.reason) else WrongEngineError)(problem)
    if isinstance(engine, FastEngine) and (lost := set(engine.without) - set(case.without)):
        raise WrongEngineError(f"the fast engine went on without {', '.join(sorted(lost))}")
