"""ACT: a natural and a robust network teach each other (Arani et al., BMVC 2020).

Arxiv 2008.07015, official code NeurAI-Lab/ACT. With a the weight of mimicry and D(s <- t) =
T^2 KL(softmax(t/T) || softmax(s/T)), the robust network F and the natural one G minimise

L_F = (1 - a) CE(F(x'), y) + a D(F(x') <- G(x)),   L_G = (1 - a) CE(G(x), y) + a D(G(x) <- F(x')),

each taking the other's logits as given, while the attack raises (1 - a) CE(F(x'), y), a mean over
the batch, plus a KL(p_G(x) || p_F(x')), a sum, so that the KL counts more by the size of a batch.
As neither loss reaches the other's weights, the run's one optimiser of L_F + L_G is the official
two; --clip-grad, which they have not, would cut both gradients by one norm.

G is in training mode throughout, and its statistics move once per step. The official code computes
G(x) once for attack and losses; here the attack computes it by itself, with the same values. Its
mean is over --batch-size images also where an epoch's last batch has fewer, so that it does not
depend on how a batch is cut.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from cure_fast.batch import Batch
from cure_fast.classifier import still_statistics
from cure_fast.config import MethodSettings
from cure_fast.config.checks import POSITIVE, Bounds, Share
from cure_fast.losses import cross_entropy, kl_divergence, kl_divergence_from
from cure_fast.methods.trades import unclamped_start
from cure_fast.models.building import build_like
from cure_fast.step.method import EPS_031, Method, SetUp, rows
from cure_fast.step.run import Run, Terms


class ActSettings(MethodSettings):
    """ACT."""

    mimicry: Share = 0.9
    """Weight of the other network's answers, 0 to 1 (the paper's alpha); labels have the rest."""
    temperature: Annotated[float, Bounds(POSITIVE)] = 4.0
    """Temperature of these answers in the losses, above 0; the attack takes them at 1."""


def attack(run: Run, batch: Batch) -> Tensor:
    """Return PGD images that raise (1 - a) * mean CE + a * summed KL(p_G(x) || p(x'))."""
    a, natural = run.settings.mimicry, run.networks["natural"]
    with torch.no_grad(), still_statistics(natural):
        kl = kl_divergence_from(natural(batch.x))
    share = (1 - a) / run.loader.batch_size
    return run.pgd(
        batch.x, lambda logits: (share * cross_entropy(logits, batch.y) + a * kl(logits)).sum()
    )


def loss(run: Run, batch: Batch) -> Terms:
    """Return L_F + L_G."""
    a, t = run.settings.mimicry, run.settings.temperature
    logits, logits_adv = run.networks["natural"](batch.x), run.model(batch.x_adv)

    def mimicry(student: Tensor, teacher: Tensor) -> Tensor:
        return t**2 * kl_divergence(teacher.detach() / t, student / t).mean()

    terms = {
        "natural_ce": cross_entropy(logits, batch.y).mean(),
        "adversarial_ce": cross_entropy(logits_adv, batch.y).mean(),
        "natural_mimicry": mimicry(logits, logits_adv),
        "adversarial_mimicry": mimicry(logits_adv, logits),
    }
    natural_ce, adversarial_ce, *mimicries = terms.values()
    return {"total": (1 - a) * (natural_ce + adversarial_ce) + a * sum(mimicries), **terms}


ACT = Method(
    name="act",
    label="ACT",
    title="ACT: a natural and a robust network teach each other",
    arxiv="2008.07015",
    paper="Arani, Sarfraz and Zonooz, Adversarial Concurrent Training, BMVC 2020",
    settings=ActSettings(),
    attack=attack,
    loss=loss,
    networks=lambda run: {"natural": build_like(run.model, seed=run.config.run.seed)},
    published={
        "*": SetUp(
            "NeurAI-Lab/ACT",
            milestones=(59 / 200, 119 / 200, 159 / 200),
            lr_factors=(0.2, 0.04, 0.008),
            crop_padding=4,
            crop_mode="reflect",
            **EPS_031,
        ),
    },
    rows=rows("ACT", ("cifar10", "resnet18", " (CURE's Table 1)", 84.33, 55.83, None, None)),
    preset=unclamped_start,
)
