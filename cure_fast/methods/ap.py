"""A&P: weaker attacks on vision transformers at first (Mo et al., NeurIPS 2022, arXiv 2210.07540;
official code mo666666/When-Adversarial-Training-Meets-Vision-Transformers).

Only the attack changes, over AT, TRADES or MART. With the share q that grows from 0 to 1 in the
first epochs, attention random dropping (ARD) lets the gradient pass each block's attention with
probability q, decided anew for each block in each step of the attack, and perturbation random
masking (PRM) takes floor((1 - q) P) of the P patches, the same of all images, back to the natural
image before each step. Over AT, batches are mixed and have two labels in attack and loss.

The official code starts from networks pre-trained on ImageNet, which ``--init-from`` gives. It
normalises by CIFAR-10's statistics whatever the data. Its blocks' coins are drawn on the way back,
here on the way there. PIAT's paper, which prints the results below, writes of crops and flips
alone: ``--mix-prob 0``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Annotated, Any

import torch
from torch import Tensor

from cure_fast.batch import Batch
from cure_fast.config import MethodSettings
from cure_fast.config.checks import Bounds, Share, Weight
from cure_fast.losses import cross_entropy
from cure_fast.methods import mart, pgd_at, trades
from cure_fast.policies.mix import Mix
from cure_fast.step.method import Method, SetUp, rows
from cure_fast.step.run import Run, Terms


class ApSettings(MethodSettings):
    """A&P."""

    ap_warmup: Annotated[float, Bounds(0, 100_000)] = 10.0
    """Epochs, 0 or more, in which the attack grows to its full strength."""


class ApAtSettings(ApSettings):
    """A&P over AT."""

    mix_prob: Share = 0.3
    """Probability, 0 to 1, that a batch is mixed with itself by mixup or CutMix."""


class ApTradesSettings(ApSettings, trades.TradesSettings):
    """A&P over TRADES."""


class ApMartSettings(ApSettings, mart.MartSettings):
    """A&P over MART."""

    beta: Weight = 6.0
    """Weight of the KL term, 0 or more."""


def kept(run: Run) -> float:
    """Return the share q of attention and patches that the step's attack keeps."""
    done, warmup = (run.position + 1) / run.loader.batches_per_epoch, run.settings.ap_warmup
    return 1.0 if done >= warmup else done / warmup


@contextmanager
def dropping(run: Run) -> Iterator[None]:
    """Let no gradient pass a block's attention with probability 1 - q, in each pass."""
    share, source = run.engine.number("kept attention", kept), run.generators["attack"]

    def drop(_block: Any, _inputs: Any, out: Tensor) -> None:
        if out.requires_grad:
            coin = torch.rand((), generator=source, device=out.device) < share
            out.register_hook(lambda grad: grad * coin)

    with ExitStack() as stack:
        for branch in run.model.attention_branches:
            stack.callback(branch.register_forward_hook(drop).remove)
        yield


def masking(run: Run, x: Tensor) -> Callable[[Tensor], Tensor]:
    """Return what takes some patches of an iterate [N, C, H, W] back to those of ``x``."""
    patch = run.model.patch
    assert patch is not None
    sides = [size // patch for size in x.shape[2:]]
    patches = sides[0] * sides[1]
    masked = run.engine.number("masked patches", lambda run: int(patches * (1 - kept(run))))

    def before(x_adv: Tensor) -> Tensor:
        draw = torch.rand(patches, generator=run.generators["attack"], device=x.device)
        keep = (draw.argsort() >= masked).view(sides)
        keep = keep.repeat_interleave(patch, 0).repeat_interleave(patch, 1)
        return torch.where(keep, x_adv, x)

    return before


def weakened(attack: Callable[..., Tensor]) -> Callable[[Run, Batch], Tensor]:
    """Return the attack with ARD and PRM; it takes the arguments of ``run.pgd``."""

    def ap(run: Run, batch: Batch) -> Tensor:
        if kept(run) == 1:
            return attack(run, batch)
        with dropping(run):
            return attack(run, batch, before=masking(run, batch.x))

    return ap


def mixed_cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
    """Return the cross-entropy [N] of logits [N, K] to both labels, weighed by their shares.

    A batch that no policy has seen has one label.
    """
    own = cross_entropy(logits, batch.y)
    if "share" not in batch.notes:
        return own
    share, other = batch.notes["share"], cross_entropy(logits, batch.notes["partner"])
    return share * own + (1 - share) * other


def mixed_attack(run: Run, batch: Batch, **other: Any) -> Tensor:
    """Return PGD images that raise the cross-entropy to both labels."""
    return run.pgd(batch.x, lambda logits: mixed_cross_entropy(logits, batch).sum(), **other)


def mixed_loss(run: Run, batch: Batch) -> Terms:
    """Return the cross-entropy of x' to both labels."""
    total = mixed_cross_entropy(run.model(batch.x_adv), batch).mean()
    return {"total": total, "adversarial_ce": total}


def published(**values: Any) -> dict[str, Any]:
    """Return the official set-up, which is for transformers."""
    found = SetUp(
        "mo666666/When-Adversarial-Training-Meets-Vision-Transformers",
        epochs=40,
        batch_size=64,
        weight_decay=1e-4,
        clip_grad=1.0,
        milestones=(35 / 40, 38 / 40),
        normalize="dataset",
        **values,
    )
    return dict.fromkeys(("*/vit*", "*/deit*", "*/convit*"), found)


TABLE = " (PIAT's Table IV)"

AP_AT = Method(
    name="ap_at",
    label="A&P",
    title="A&P over AT: attention and patches dropped in the attack on transformers",
    arxiv="2210.07540",
    paper="Mo et al., When Adversarial Training Meets Vision Transformers, NeurIPS 2022",
    settings=ApAtSettings(),
    attack=weakened(mixed_attack),
    loss=mixed_loss,
    policies=lambda run: (Mix(run.settings.mix_prob),),
    phase=lambda run: kept(run) < 1,
    needs_attention=True,
    published=published(start="uniform"),
    rows=rows(
        "A&P",
        ("cifar10", "vit-base", TABLE, 84.64, 53.44, None, 49.67),
        ("cifar10", "deit-small", TABLE, 83.08, 52.28, None, 47.92),
        ("cifar10", "convit-base", TABLE, 85.21, 53.25, None, 49.01),
    ),
)
AP_TRADES = replace(
    AP_AT,
    name="ap_trades",
    label="TRADES + A&P",
    title=AP_AT.title.replace("over AT", "over TRADES"),
    settings=ApTradesSettings(),
    attack=weakened(trades.kl_attack),
    loss=trades.loss,
    policies=lambda run: (),
    published=published(),
    rows=rows(
        "A&P over TRADES",
        ("cifar10", "vit-base", TABLE, 83.91, 53.52, None, 50.56),
        ("cifar10", "deit-small", TABLE, 82.81, 52.74, None, 49.40),
        ("cifar10", "convit-base", TABLE, 83.51, 53.21, None, 50.11),
    ),
)
AP_MART = replace(
    AP_TRADES,
    name="ap_mart",
    label="MART + A&P",
    title=AP_AT.title.replace("over AT", "over MART"),
    settings=ApMartSettings(),
    attack=weakened(pgd_at.attack),
    loss=mart.loss,
    rows=rows(
        "A&P over MART",
        ("cifar10", "vit-base", TABLE, 78.75, 53.51, None, 49.01),
        ("cifar10", "deit-small", TABLE, 78.43, 52.98, None, 47.94),
        ("cifar10", "convit-base", TABLE, 80.32, 53.11, None, 48.35),
    ),
)
