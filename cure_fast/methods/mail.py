"""MAIL: losses weighted by probabilistic margins (Wang et al., NeurIPS 2021, arXiv 2106.07904).

Each image's adversarial loss has the weight w = sigmoid(slope * (m + bias)), without gradient,
where m = max_{k != y} p_k(x') - p_y(x') is its margin in the loss's own pass over x'.

MAIL-AT:     L = mean[w * CE(x', y)].
MAIL-TRADES: L = CE(x, y) + beta * mean[w * KL(p(x) || p(x'))].

Attacks are those of PGD-AT and TRADES, and until the burn-in is over, w is 1. Official code:
QizhouWang/MAIL, which multiplies weights by 3 where the paper normalises them over the batch. It
begins with them in epoch 77 of 120, two epochs after the learning rate's first drop at the start of
epoch 76. Its MAIL-MART, whose constants it does not tell, is left out.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

from torch import Tensor

from cure_fast.batch import Batch
from cure_fast.config import MethodSettings
from cure_fast.config.checks import Bounds, Share, Weight
from cure_fast.losses import cross_entropy, kl_divergence, margin
from cure_fast.methods.pgd_at import attack
from cure_fast.methods.trades import kl_attack, unclamped_start
from cure_fast.step.method import EPS_031, Method, SetUp, rows
from cure_fast.step.run import Run, Terms

# Where margins lie in [-1, 1].
Bias = Annotated[float, Bounds(-10, 10)]


class MailSettings(MethodSettings):
    """MAIL."""

    mail_slope: Weight = 10.0
    """How steeply weights rise with the margin, 0 or more (AT: 10, TRADES: 2)."""
    mail_bias: Bias = -0.5
    """What is added to margins, which lie in [-1, 1]; -10 to 10 (AT: -0.5, TRADES: 0)."""
    mail_norm: Literal["const3", "batch"] = "const3"
    """Weights times 3 (const3, official code), or brought to a mean of 1 over the images of a pass
    (batch, paper)."""
    mail_burn_in: Share = 76 / 120
    """Share of the run, 0 to 1, in whose epochs all weights are 1."""


class MailTradesSettings(MailSettings):
    """MAIL for TRADES."""

    mail_slope: Weight = 2.0
    """How steeply weights rise with the margin, 0 or more."""
    mail_bias: Bias = 0.0
    """What is added to margins, which lie in [-1, 1]; -10 to 10."""
    beta: Weight = 5.0
    """Weight of the KL term, 0 or more."""


def weighs(run: Run) -> bool:
    """Return whether the burn-in is over."""
    return run.epoch / run.config.optim.epochs >= run.settings.mail_burn_in


def weights(run: Run, logits_adv: Tensor, y: Tensor) -> Tensor | float:
    """Return the weight of each image [N], without gradient."""
    if not weighs(run):
        return 1.0
    settings = run.settings
    margins = margin(logits_adv.detach().softmax(dim=1), y)
    w = (settings.mail_slope * (margins + settings.mail_bias)).sigmoid()
    return 3 * w if settings.mail_norm == "const3" else w / run.mean(w)


def at_loss(run: Run, batch: Batch) -> Terms:
    """Return mean[w * CE(x', y)]."""
    logits_adv = run.model(batch.x_adv)
    each = cross_entropy(logits_adv, batch.y)
    total = (weights(run, logits_adv, batch.y) * each).mean()
    return {"total": total, "adversarial_ce": each.mean()}


def trades_loss(run: Run, batch: Batch) -> Terms:
    """Return CE(x, y) + beta * mean[w * KL(p(x) || p(x'))]."""
    logits, logits_adv = run.model(batch.x), run.model(batch.x_adv)
    natural_ce = cross_entropy(logits, batch.y).mean()
    kl = (weights(run, logits_adv, batch.y) * kl_divergence(logits, logits_adv)).mean()
    total = natural_ce + run.settings.beta * kl
    return {"total": total, "natural_ce": natural_ce, "weighted_kl": kl}


MAIL_AT = Method(
    name="mail_at",
    label="MAIL-AT",
    title="MAIL-AT: cross-entropy on PGD images weighted by their margins",
    arxiv="2106.07904",
    paper="Wang et al., Probabilistic Margins for Instance Reweighting in Adversarial Training, "
    "NeurIPS 2021",
    settings=MailSettings(),
    attack=attack,
    loss=at_loss,
    phase=weighs,
    published={
        "*": SetUp(
            "QizhouWang/MAIL",
            epochs=120,
            milestones=(75 / 120, 90 / 120, 100 / 120),
            lr=0.01,
            weight_decay=3.5e-3,
            **EPS_031,
        ),
    },
    # The row for SVHN contradicts its own differences.
    rows=rows(
        "MAIL",
        ("cifar10", "resnet18", ", best epoch (PIAT's Table I)", 82.65, 51.15, 48.88, 45.16),
        ("cifar100", "resnet18", ", best epoch (PIAT's Table I)", 58.73, 27.99, 26.28, 22.50),
        ("cifar10", "wrn32-10", " (PIAT's Table II)", 84.96, 52.58, None, 47.26),
        ("cifar100", "wrn32-10", " (PIAT's Table II)", 58.04, 29.50, None, 23.97),
    ),
    preset=unclamped_start,
)
MAIL_TRADES = replace(
    MAIL_AT,
    name="mail_trades",
    label="MAIL-TRADES",
    title="MAIL-TRADES: TRADES whose KL is weighted by margins",
    settings=MailTradesSettings(),
    attack=kl_attack,
    loss=trades_loss,
    rows={},
)
