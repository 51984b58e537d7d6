"""How much a method computes: the passes of networks in a step, counted by running steps."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cure_fast.classifier import ImageClassifier
from cure_fast.config import Config, DataConfig, ModelConfig, RunConfig
from cure_fast.loaders import ImageSet
from cure_fast.methods import check_config, find_method, select_method
from cure_fast.policies import select_policies
from cure_fast.step.state import TrainState
from cure_fast.step.train_step import train_step
from cure_fast.training.data import Data, open_loader
from cure_fast.training.stages import new_model
from cure_fast.training.trainer import build_run

# Networks to count on, the second for methods of transformers: width, and size of the images.
PLAIN, TRANSFORMER = "resnet-small", "vit-tiny"
TRIED = {PLAIN: (2, 8), TRANSFORMER: (16, 32)}
CLASSES, BATCH = 10, 4


@dataclass
class Passes:
    """Passes of a step over its batch, of all networks; those over a part count by its share."""

    forward: float = 0.0
    backward: float = 0.0
    # Of the backward passes those of attacks, to the image alone.
    light: float = field(default=0.0, compare=False)

    @property
    def cost(self) -> float:
        """In forward passes: a backward pass, with the gradients of weights and input, is two."""
        return self.forward + 2 * self.backward

    @property
    def work(self) -> float:
        """In forward passes, of which a backward pass to the image alone takes as long as one."""
        return self.cost - self.light


@dataclass(frozen=True)
class Trial:
    """What a method needs, as steps on a tiny network show it.

    Attributes:
        model: the network.
        networks: names of further networks that the method and its policies have.
        first: passes of a step in the first epoch.
        last: passes of a step in the last epoch.
    """

    model: str
    networks: tuple[str, ...]
    first: Passes
    last: Passes


def try_method(name: str, policies: Sequence[str] = ()) -> Trial:
    """Return what a step of a method computes, by its own preset and the default attack.

    Teachers are copies of the network.

    Raises:
        InputError: if the method cannot run here, as without timm.
    """
    model = TRANSFORMER if find_method(name).needs_attention else PLAIN
    config = trial_config(name, policies, model)
    check_config(config)
    runs = [trial_run(config, epoch) for epoch in (0, config.optim.epochs - 1)]
    return Trial(model, tuple(runs[0].networks), *map(count_passes, runs))


def trial_config(name: str, policies: Sequence[str], model: str) -> Config:
    """Return the configuration of a method's trial."""
    config = select_method(on_trial(Config(), model), name)
    return select_policies(config, [*config.policies, *policies])


def on_trial(config: Config, model: str) -> Config:
    """Return a configuration with the data, network and device of a trial."""
    return replace(
        config,
        data=DataConfig(loader="resident"),
        model=ModelConfig(model=model, width=TRIED[model][0]),
        optim=replace(config.optim, batch_size=BATCH, micro_batch_size=None),
        run=RunConfig(device="cpu", engine="eager"),
    )


def epoch_costs(config: Config) -> list[float]:
    """Return how much a training image costs in each epoch, in forward passes (`Passes.work`).

    Epochs of one phase are counted once.
    """
    model = TRANSFORMER if find_method(config.method).needs_attention else PLAIN
    with torch.random.fork_rng(devices=[]):
        run = trial_run(on_trial(config, model), 0)
        found: dict[Any, float] = {}
        costs = []
        for epoch in range(config.optim.epochs):
            run.epoch, run.step = epoch, epoch * run.loader.batches_per_epoch
            phases = (run.method.phase(run), *(policy.phase(run) for policy in run.policies))
            phase = (phases, run.attack_steps)
            if phase not in found:
                found[phase] = count_passes(run).work
            costs.append(found[phase])
    return costs


def trial_run(config: Config, epoch: int) -> TrainState:
    """Return a run on random images that stands at the beginning of a 0-based epoch."""
    _, size = TRIED[config.model.model]
    pixels = np.random.default_rng(0).integers(256, size=(40, size, size, 3), dtype=np.uint8)
    labels = np.arange(len(pixels), dtype=np.int64) % CLASSES
    images = ImageSet("cifar10", pixels, labels, tuple(map(str, range(CLASSES))), "random")
    device = torch.device("cpu")
    loader = open_loader(config, Data(images, images, images), device)
    model = new_model(config, CLASSES, size)
    teachers = {name: copy.deepcopy(model) for name in find_method(config.method).teachers}
    run = build_run(config, model, loader, device, teachers)
    run.epoch, run.step = epoch, epoch * loader.batches_per_epoch
    run.lr = config.optim.lr
    return run


def count_passes(run: TrainState) -> Passes:
    """Return the passes of a step, of all networks and of copies that it makes.

    They are the mean of as many steps as policies take to do once all that they do.
    """
    steps = max((policy.period for policy in run.policies), default=1)
    with counted(BATCH) as passes:
        for _ in range(steps):
            with run.loader.epoch(run.epoch) as batches:
                batch = next(iter(batches))
            for policy in run.policies:
                other = policy.before(run, batch)
                batch = batch if other is None else other
            train_step(run, batch)
            run.step += 1
    return Passes(*(n / steps for n in (passes.forward, passes.backward, passes.light)))


@contextmanager
def counted(batch: int) -> Iterator[Passes]:
    """Count passes of classifiers in the block, in batches of so many images."""
    passes = Passes()

    def backward(gradient: Tensor, *, light: bool) -> None:
        passes.backward += len(gradient) / batch
        passes.light += light * len(gradient) / batch

    def forward(network: nn.Module, inputs: object, output: Tensor) -> None:
        if isinstance(network, ImageClassifier):
            passes.forward += len(output) / batch
            if output.requires_grad:
                light = not any(p.requires_grad for p in network.parameters())
                output.register_hook(partial(backward, light=light))

    hook = nn.modules.module.register_module_forward_hook(forward)
    try:
        yield passes
    finally:
        hook.remove()
