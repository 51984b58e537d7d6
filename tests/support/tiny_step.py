"""A tiny network and a run around it, for tests of methods."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from cure_fast.batch import Batch
from cure_fast.config import AttackConfig, Config, OptimConfig, RunConfig
from cure_fast.methods import find_method, select_method
from cure_fast.models import ImageClassifier, build_model
from cure_fast.training.trainer import build_run

CHANNELS, HIDDEN, CLASSES = 5, 7, 4


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(HIDDEN, HIDDEN, 1)


class Tiny(ImageClassifier):
    """Three 1x1 layers with tanh on 1x1 images: the twin of the NumPy transcription.

    To methods of transformers, the middle layer is attention and an image one patch.
    """

    stem_names = ("conv1",)
    classifier_name = "linear"
    patch = 1

    def __init__(self):
        super().__init__(HIDDEN)
        self.conv1 = nn.Conv2d(CHANNELS, HIDDEN, 1)
        self.layer1 = nn.Sequential(Block())
        self.linear = nn.Linear(HIDDEN, CLASSES)

    @property
    def attention_branches(self):
        return [self.layer1[0].conv1]

    def logits(self, x):
        h = torch.tanh(self.conv1(x))
        return self.linear(torch.tanh(self.layer1[0].conv1(h)).flatten(1))


class FixedLoader:
    """Gives the same images and labels each epoch."""

    kind = reason = "fixed"

    def __init__(self, batches, num_classes=CLASSES):
        self.batches, self.num_classes = batches, num_classes
        self.batch_size = len(batches[0][1])
        self.num_images = self.set_size = sum(len(y) for _, y in batches)
        self.image_shape = tuple(batches[0][0].shape[1:])
        self.batches_per_epoch = len(batches)

    def __iter__(self):
        return map(self.batch, range(len(self.batches)))

    def batch(self, number):
        """One of them, whose images follow those of the batches before it in the set."""
        first = sum(len(y) for _, y in self.batches[:number])
        return batch_of(*self.batches[number], first=first)

    @contextmanager
    def epoch(self, epoch, *, start_batch=0):
        yield map(self.batch, range(start_batch, len(self.batches)))


class Normalised(Tiny):
    """The tiny network with BatchNorm, whose statistics every forward pass moves."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(HIDDEN)

    def logits(self, x):
        h = self.norm(torch.tanh(self.conv1(x)))
        return self.linear(torch.tanh(self.layer1[0].conv1(h)).flatten(1))


def small_model(method, *, num_classes):
    """A small network of the kind that the method trains, for images of 8x8."""
    if find_method(method).needs_attention:
        return build_model("vit-tiny", num_classes=num_classes, width=8, image_size=8)
    return build_model("resnet-small", num_classes=num_classes, width=4)


def poisoned(batch):
    """The batch with a pixel that is not a number."""
    x = batch.x.clone()
    x[1, 0] = float("nan")
    return replace(batch, x=x)


def batch_of(x, y, *, first=0):
    """A batch of these images, which lie one after another in the set."""
    return Batch(x, y, torch.arange(first, first + len(y), device=y.device))


def tiny_batches(count, *, size=12, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.rand(size, CHANNELS, 1, 1, generator=generator, dtype=dtype),
            torch.randint(CLASSES, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def tiny_run(
    method,
    *,
    batches=None,
    model=None,
    dtype=torch.float64,
    attack=None,
    policies=None,
    engine="auto",
    **settings,
):
    """A run of ``method`` on the tiny network in double precision, with policies by name."""
    config = Config(
        attack=AttackConfig(eps=0.1, step_size=0.03, attack_steps=5, **(attack or {})),
        optim=OptimConfig(epochs=2, lr=0.5, schedule="constant", batch_size=12),
        run=RunConfig(engine=engine, log_every=1),
    )
    config = select_method(config, method)
    if settings:
        config = replace(config, settings=replace(config.settings, **settings))
    if policies is not None:
        config = replace(config, policies=policies)
    if model is None:
        torch.manual_seed(3)
        model = Tiny()
    model = model.to(dtype)
    loader = FixedLoader(batches or tiny_batches(4, dtype=dtype))
    return build_run(config, model, loader, torch.device("cpu"), teachers_like(model, method))


def near_boundaries(run, count=48):
    """Images that few steps of an attack misclassify, some none; one in four begins so.

    It shifts the logits of the run's network, which prefers one class.
    """
    x = torch.rand(count, CHANNELS, 1, 1, dtype=torch.float64)
    with torch.no_grad():
        run.model.linear.bias -= run.model(x).mean(dim=0)
        y = run.model(x).argmax(dim=1)
    y[::4] = (y[::4] + 1) % CLASSES
    return batch_of(x, y)


def teachers_like(model, method):
    """Networks like the model with other weights, for each teacher of the method."""
    generator = torch.Generator().manual_seed(17)
    teachers = {name: copy.deepcopy(model) for name in find_method(method).teachers}
    for teacher in teachers.values():
        for weight in teacher.parameters():
            # In one type, as others draw other numbers.
            drawn = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            weight.data += 0.1 * drawn.to(weight.dtype)
    return teachers


def terms_of(method, *logits, y, **settings):
    """The terms of a method's loss, whose passes return these logits [N, K] in turn."""
    run = tiny_run(method, **settings)
    given = iter(logits)
    run.model = lambda x: next(given)
    return run.method.loss(run, batch_of(torch.zeros(len(y), 1, 1, 1), y))
