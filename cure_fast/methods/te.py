"""TE: temporal ensembling against memorisation (Dong et al., ICLR 2022).

Arxiv 2106.01606, official code dongyp13/memorization-AT. A memory t, zero at first, has a row for
each training image. Late in training t <- 0.9 t + 0.1 p(x) at each visit, and q = t / sum_k t_k
becomes a further target, of a weight w that rises with the epoch:

    PGD-AT:  L = CE(x', y) + w * mean_k (p(x')_k - q_k)^2
    TRADES:  L = CE(x, y) + beta * KL(p(x) || p(x')) + w * mean_k (p(x)_k - q_k)^2

The attack raises CE(x', y) or beta * KL(p(x) || p(x')) plus the same distance of p(x') to q. As in
the official code t has the new p(x) before it is a target; p(x) is computed in the attack's mode,
eval by default, of the image as it was augmented.

The official code counts epochs; here start and rise are shares of the run, equal for its 200.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Annotated

import torch
from torch import Tensor

from cure_fast.batch import Batch
from cure_fast.config import MethodSettings
from cure_fast.config.checks import POSITIVE, Bounds, Share, Weight
from cure_fast.losses import cross_entropy, kl_divergence, kl_divergence_from
from cure_fast.methods import pgd_at, trades
from cure_fast.step.method import Method, SetUp, rows
from cure_fast.step.policy import Policy
from cure_fast.step.run import Run, Terms


class TeSettings(MethodSettings):
    """TE."""

    te_weight: Weight = 300.0
    """Largest weight of the squared distance to the memory, 0 or more (mean over the classes)."""
    te_start: Share = 0.45
    """Share of the run, 0 to 1, at whose end the memory sets in (code: epoch 90 of 200)."""
    te_rise: Annotated[float, Bounds(POSITIVE, 1)] = 0.3
    """Share of the run over which the weight rises, above 0 (code: 60 epochs of 200)."""
    te_decay: Annotated[float, Bounds(0, 0.9999)] = 0.9
    """Share of the memory that stays at each visit, in [0, 1)."""


class TeTradesSettings(TeSettings):
    """TE with TRADES."""

    beta: Weight = 6.0
    """Weight of TRADES' KL term, 0 or more."""


class Memory(Policy):
    """Remembers what the network predicted for each training image."""

    moves_weights = False

    def __init__(self, run: Run) -> None:
        super().__init__()
        shape = run.loader.set_size, run.loader.num_classes
        # Of the weights' precision, float32 or wider, as logits are.
        self.bank = next(run.model.parameters()).new_zeros(shape)
        self.state = {"bank": self.bank}

    def on_step(self, run: Run, batch: Batch) -> None:
        """Store what the attack noted."""
        if "memory" in batch.notes:
            new, skip = batch.notes["memory"], run.engine.skip
            kept = new if skip is None else torch.where(skip, self.bank[batch.index], new)
            self.bank.index_copy_(0, batch.index, kept)


def place(run: Run) -> float:
    """Return the share of the run that is done at the end of the epoch under way."""
    return (run.epoch + 1) / run.config.optim.epochs


def remembers(run: Run) -> bool:
    """Return whether the memory has set in."""
    return place(run) >= run.settings.te_start


def weight(run: Run) -> float:
    """Return the weight of the distance in the epoch under way: a rise like a half Gaussian."""
    risen = min(1.0, (place(run) - run.settings.te_start) / run.settings.te_rise)
    return run.settings.te_weight * math.exp(-5 * (1 - risen) ** 2)


def remember(run: Run, batch: Batch) -> Tensor:
    """Note the memory with the prediction for the natural images; return their logits [N, K]."""
    with torch.no_grad():
        logits = run.model(batch.x)
    former, decay = run.policy(Memory).bank[batch.index], run.settings.te_decay
    batch.notes["memory"] = decay * former + (1 - decay) * logits.softmax(dim=1)
    return logits


def distance(run: Run, batch: Batch, logits: Tensor) -> Tensor:
    """Return the weighted mean squared distance [N] of predictions to the memory."""
    memory = batch.notes["memory"]
    target = memory / memory.sum(dim=1, keepdim=True)
    apart = (logits.softmax(dim=1) - target).square().mean(dim=1)
    return run.engine.number("te weight", weight) * apart


def with_memory(run: Run, batch: Batch, terms: Terms, logits: Tensor) -> Terms:
    """Return terms with the distance of predictions to the memory, once that has set in."""
    if not remembers(run):
        return terms
    memory = distance(run, batch, logits).mean()
    return {**terms, "total": terms["total"] + memory, "memory": memory}


def attack(run: Run, batch: Batch) -> Tensor:
    """Return PGD images that raise CE(x', y) and the distance of p(x') to the memory."""
    if not remembers(run):
        return pgd_at.attack(run, batch)
    remember(run, batch)
    return run.pgd(batch.x, lambda z: (cross_entropy(z, batch.y) + distance(run, batch, z)).sum())


def loss(run: Run, batch: Batch) -> Terms:
    """Return CE(x', y), and the distance of p(x') to the memory once that has set in."""
    logits_adv = run.model(batch.x_adv)
    adversarial_ce = cross_entropy(logits_adv, batch.y).mean()
    terms = {"total": adversarial_ce, "adversarial_ce": adversarial_ce}
    return with_memory(run, batch, terms, logits_adv)


def trades_attack(run: Run, batch: Batch) -> Tensor:
    """Return PGD images that raise beta * KL(p(x) || p(x')) and the distance of p(x')."""
    if not remembers(run):
        return trades.kl_attack(run, batch)
    beta, kl = run.settings.beta, kl_divergence_from(remember(run, batch))
    return run.pgd(batch.x, lambda z: (beta * kl(z) + distance(run, batch, z)).sum())


def trades_loss(run: Run, batch: Batch) -> Terms:
    """Return TRADES' loss, and the distance of p(x) to the memory once that has set in."""
    logits, logits_adv = run.model(batch.x), run.model(batch.x_adv)
    natural_ce = cross_entropy(logits, batch.y).mean()
    kl = kl_divergence(logits, logits_adv).mean()
    terms = {"total": natural_ce + run.settings.beta * kl, "natural_ce": natural_ce, "kl": kl}
    return with_memory(run, batch, terms, logits)


code = partial(SetUp, "dongyp13/memorization-AT", clamp_start=False)
plain = {"crop_padding": 0, "flip": False}

TE = Method(
    name="te",
    label="TE",
    title="TE: PGD-AT with the predictions of former epochs as further targets",
    arxiv="2106.01606",
    paper="Dong et al., Exploring Memorization in Adversarial Training, ICLR 2022",
    settings=TeSettings(),
    attack=attack,
    loss=loss,
    policies=lambda run: (Memory(run),),
    phase=remembers,
    published={"svhn/*": code(start="uniform", **plain), "*": code(start="uniform")},
    rows=rows(
        "TE",
        ("cifar10", "preactresnet18", ", best epoch (CURE's Table 3)", 82.35, None, None, 50.59),
    ),
)
TE_TRADES = replace(
    TE,
    name="te_trades",
    label="TE-TRADES",
    title="TE: TRADES with the predictions of former epochs as further targets",
    settings=TeTradesSettings(),
    attack=trades_attack,
    loss=trades_loss,
    preset=trades.unclamped_start,
    published={"svhn/*": code(**plain), "*": code()},
    rows={},
)
