"""ST-AT: squeeze training, against collaborative images too (Li et al., ICLR 2023).

Arxiv 2205.11156, official code qizhangli/ST-AT. The attack moves two images of each: of x and these
two, the one with the lowest p_y and the one with the highest take a step that raises their
symmetric KL, and become the adversarial and the collaborative image. The loss is

    L = CE(x, y) + beta * KL_sym(p_low, p_high),
    KL_sym(a, b) = [KL(sg b || a) + KL(sg a || b)] / 2,

low and high chosen anew of x, x' and the collaborative image; sg stops gradients.

BatchNorm normalises by the batch in the attack and leaves its running statistics; in the loss x
and x' move them, the collaborative images do not. The official code computes the pass of x in each
attack step where an image chose x; its result never changes, so here it is computed once.

The official scripts leave beta to the user for CIFAR; 6 is that of their script for more data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from cure_fast.attacks import start_point
from cure_fast.batch import Batch
from cure_fast.classifier import still_statistics
from cure_fast.config import Config, MethodSettings
from cure_fast.config.checks import Weight
from cure_fast.kernels import pgd_step_
from cure_fast.losses import cross_entropy, kl_divergence
from cure_fast.step.method import Method, SetUp, rows
from cure_fast.step.run import Run, Terms


class StAtSettings(MethodSettings):
    """ST-AT."""

    beta: Weight = 6.0
    """Weight of the symmetric KL, 0 or more."""


def extremes(logits: Sequence[Tensor], y: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each image [N] which of the logits [N, K] give its label least, and most."""
    p = torch.stack([z.softmax(dim=1).gather(1, y[:, None]).squeeze(1) for z in logits])
    return p.argmin(dim=0), p.argmax(dim=0)


def chosen(tensors: Sequence[Tensor], which: Tensor) -> Tensor:
    """Return for each image its row of the tensor [N, ...] of the number that ``which`` [N] has."""
    which = which.view(-1, *[1] * (tensors[0].ndim - 1))
    found = tensors[0]
    for number, tensor in enumerate(tensors[1:], 1):
        found = torch.where(which == number, tensor, found)
    return found


def symmetric_kl(a: Tensor, b: Tensor) -> Tensor:
    """Return [KL(sg b || a) + KL(sg a || b)] / 2, [N], for two sets of logits [N, K]."""
    return (kl_divergence(b.detach(), a) + kl_divergence(a.detach(), b)) / 2


def attack(run: Run, batch: Batch) -> Tensor:
    """Return the adversarial images; note the collaborative ones."""
    config, steps = run.config.attack, run.attack_steps
    # An image's two starts are drawn one after the other, however a batch is cut.
    starts = start_point(
        batch.x.repeat_interleave(2, dim=0),
        eps=config.eps,
        start=config.start,
        norm=config.norm,
        clamp_start=config.clamp_start or steps == 0,
        generator=run.generators["attack"],
        draw=run.drawn,
    )
    x_adv, x_col = (torch.empty_like(batch.x).copy_(starts[place::2]) for place in range(2))
    with still_statistics(run.model), torch.enable_grad():
        x = batch.x.detach().requires_grad_()
        logits = run.model(x)
        for _ in range(steps):
            points = [x, x_col.requires_grad_(), x_adv.requires_grad_()]
            found = [logits, run.model(x_col), run.model(x_adv)]
            ends = extremes(found, batch.y)
            apart = symmetric_kl(*(chosen(found, which) for which in ends)).sum()
            grads = torch.autograd.grad(apart, points, retain_graph=True)
            x_adv, x_col = (
                pgd_step_(
                    chosen([point.detach() for point in points], which),
                    batch.x,
                    chosen(grads, which),
                    eps=config.eps,
                    step_size=config.step_length,
                    norm=config.norm,
                )
                for which in ends
            )
    batch.notes["x_col"] = x_col
    return x_adv


def loss(run: Run, batch: Batch) -> Terms:
    """Return CE(x, y) + beta * the symmetric KL of the two that are furthest apart in p_y."""
    with still_statistics(run.model):
        logits_col = run.model(batch.notes["x_col"])
    logits, logits_adv = run.model(batch.x), run.model(batch.x_adv)
    natural_ce = cross_entropy(logits, batch.y).mean()
    found = [logits, logits_col, logits_adv]
    apart = symmetric_kl(*(chosen(found, which) for which in extremes(found, batch.y))).mean()
    total = natural_ce + run.settings.beta * apart
    return {"total": total, "natural_ce": natural_ce, "symmetric_kl": apart}


def in_train_mode(config: Config) -> Config:
    """Return ``config`` with the attack's start and its mode as in the official code."""
    attack = replace(config.attack, attack_mode="train", clamp_start=False)
    return replace(config, attack=attack)


code = partial(
    SetUp,
    "qizhangli/ST-AT",
    epochs=120,
    milestones=(80 / 120, 100 / 120),
    attack_mode="train",
    clamp_start=False,
)

ST_AT = Method(
    name="st_at",
    label="ST-AT",
    title="ST-AT: squeezes what lies between an adversarial and a collaborative image",
    arxiv="2205.11156",
    paper="Li et al., Squeeze Training for Adversarial Robustness, ICLR 2023",
    settings=StAtSettings(),
    attack=attack,
    loss=loss,
    published={
        "svhn/*": code(lr=0.01, step_share=1 / 8, crop_padding=0, flip=False),
        "*": code(),
    },
    rows=rows(
        "ST-AT",
        ("cifar10", "resnet18", " (CURE's Table 1)", 83.10, 54.62, 51.43, 50.50),
        ("cifar100", "resnet18", " (CURE's Table 2)", 58.44, 30.53, 26.70, None),
        ("svhn", "resnet18", " (CURE's Table 2)", 90.68, 56.35, 52.75, None),
        ("cifar10", "wrn34-10", " (CURE's Table 1)", 84.92, 57.73, None, 53.54),
    ),
    preset=in_train_mode,
)
