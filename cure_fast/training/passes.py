"""How much a method computes: the passes of networks in a step, counted by running steps."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from cure_fast.config import Config, DataConfig, ModelConfig, OptimConfig, RunConfig
from cure_fast.errors import InputError
from cure_fast.loaders import ImageSet
from cure_fast.methods import check_config, find_method, select_method
from cure_fast.models import MODELS
from cure_fast.policies import select_policies
from cure_fast.step.state import TrainState
from cure_fast.training.data import Data, open_loader
from cure_fast.training.stages import new_model
from cure_fast.training.trainer import build_run, next_step

# Networks to count on, of which a method's first that runs is taken: width, and size of the images.
TRIED = {"resnet-small": (2, 8), "vit-tiny": (16, 32)}
CLASSES, BATCH = 10, 4


@dataclass
class Passes:
    """Passes of a step over its batch, of all networks; those over a part count by its share."""

    forward: float = 0.0
    backward: float = 0.0

    @property
    def cost(self) -> float:
        """In forward passes: a backward pass, with the gradients of weights and input, is two."""
        return self.forward + 2 * self.backward


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
        InputError: if the method runs with none of the networks tried.
    """
    tried = [model for model in TRIED if model in MODELS]
    for model in tried:
        config = trial_config(name, policies, model)
        try:
            check_config(config)
            runs = [trial_run(config, epoch) for epoch in (0, config.optim.epochs - 1)]
            return Trial(model, tuple(runs[0].networks), *map(count_passes, runs))
        except InputError:
            if model == tried[-1]:
                raise
    raise AssertionError("there is no network to try")


def trial_config(name: str, policies: Sequence[str], model: str) -> Config:
    """Return the configuration of a method's trial."""
    config = Config(
        data=DataConfig(loader="resident"),
        model=ModelConfig(model=model, width=TRIED[model][0]),
        optim=OptimConfig(batch_size=BATCH),
        run=RunConfig(device="cpu", engine="eager"),
    )
    config = select_method(config, name)
    return select_policies(config, [*config.policies, *policies])


def trial_run(config: Config, epoch: int) -> TrainState:
    """Return a run on random images that stands at the beginning of a 0-based epoch."""
    _, size = TRIED[config.model.model]
    pixels = np.random.default_rng(0).integers(256, size=(40, size, size, 3), dtype=np.uint8)
    labels = np.arange(len(pixels), dtype=np.int64) % CLASSES
    images = ImageSet("cifar10", pixels, labels, tuple(map(str, range(CLASSES))), "random")
    device = torch.device("cpu")
    loader = open_loader(config, Data(images, images, images), device)
    model = new_model(config, CLASSES)
    teachers = {name: copy.deepcopy(model) for name in find_method(config.method).teachers}
    run = build_run(config, model, loader, device, teachers)
    run.epoch, run.step = epoch, epoch * loader.batches_per_epoch
    return run


def count_passes(run: TrainState) -> Passes:
    """Train on one batch and return the passes of the run's networks."""
    networks = [*run.all_networks.values(), *run.teachers.values()]
    with run.loader.epoch(run.epoch) as batches, counted(networks, BATCH) as passes:
        next_step(run, next(iter(batches)))
    return passes


@contextmanager
def counted(networks: list[nn.Module], batch: int) -> Iterator[Passes]:
    """Count passes of networks from images [N, ...] to [N, ...] in the block, in batches."""
    passes = Passes()

    def backward(gradient: Tensor) -> None:
        passes.backward += len(gradient) / batch

    def forward(network: nn.Module, inputs: object, output: Tensor) -> None:
        passes.forward += len(output) / batch
        if output.requires_grad:
            output.register_hook(backward)

    hooks = [network.register_forward_hook(forward) for network in dict.fromkeys(networks)]
    try:
        yield passes
    finally:
        for hook in hooks:
            hook.remove()
