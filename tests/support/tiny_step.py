"""A tiny network and a run around it, for tests of methods."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from cure_fast.config import AttackConfig, Config, OptimConfig
from cure_fast.methods import select_method
from cure_fast.models import ImageClassifier
from cure_fast.training.trainer import build_run

CHANNELS, HIDDEN, CLASSES = 5, 7, 4


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(HIDDEN, HIDDEN, 1)


class Tiny(ImageClassifier):
    """Three 1x1 layers with tanh on 1x1 images: the twin of the NumPy transcription."""

    stem_names = ("conv1",)
    classifier_name = "linear"

    def __init__(self):
        super().__init__(HIDDEN)
        self.conv1 = nn.Conv2d(CHANNELS, HIDDEN, 1)
        self.layer1 = nn.Sequential(Block())
        self.linear = nn.Linear(HIDDEN, CLASSES)

    def logits(self, x):
        h = torch.tanh(self.conv1(x))
        return self.linear(torch.tanh(self.layer1[0].conv1(h)).flatten(1))


class FixedLoader:
    """Gives the same batches each epoch."""

    kind = reason = "fixed"

    def __init__(self, batches):
        self.batches = batches
        self.batch_size = len(batches[0][1])
        self.num_images = sum(len(y) for _, y in batches)
        self.batches_per_epoch = len(batches)

    @contextmanager
    def epoch(self, epoch, *, start_batch=0):
        yield iter(self.batches[start_batch:])


def tiny_batches(count, *, size=12, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.rand(size, CHANNELS, 1, 1, generator=generator, dtype=dtype),
            torch.randint(CLASSES, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def tiny_run(method, *, batches=None, model=None, dtype=torch.float64, attack=None, **settings):
    """A run of ``method`` on the tiny network in double precision."""
    config = Config(
        attack=AttackConfig(eps=0.1, step_size=0.03, attack_steps=5, **(attack or {})),
        optim=OptimConfig(epochs=2, lr=0.5, schedule="constant", batch_size=12),
    )
    config = select_method(config, method)
    if settings:
        config = replace(config, settings=replace(config.settings, **settings))
    if model is None:
        torch.manual_seed(3)
        model = Tiny()
    model = model.to(dtype)
    loader = FixedLoader(batches or tiny_batches(4, dtype=dtype))
    return build_run(config, model, loader, torch.device("cpu"))
