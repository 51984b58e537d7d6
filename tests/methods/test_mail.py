"""MAIL against its official losses in double precision, its burn-in, and its set-up."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import engine_runs as runs
import tiny_step
from cure_fast.engine import fast
from cure_fast.recipes import find_recipe
from cure_fast.training.schedules import lr_at


def official_weights(logits_adv, y, slope, bias, norm):
    """QizhouWang/MAIL's weight_assign; the paper's sum of 1 over the batch for a mean of 1."""
    eye = torch.eye(logits_adv.shape[1], dtype=logits_adv.dtype)
    probs_gt = (logits_adv.softmax(1) * eye[y]).sum(1).detach()
    values, classes = logits_adv.softmax(1).topk(2, largest=True)
    among = (classes == y.view(-1, 1)).float().sum(1) == 1
    second = torch.where(among, values.sum(1) - probs_gt, values[:, 0]).detach()
    reweight = (((second - probs_gt) + bias) * slope).sigmoid().detach()
    return reweight * 3 if norm == "const3" else reweight / reweight.sum() * len(y)


def official_loss(method, logits, logits_adv, y, beta, *weighting):
    w = official_weights(logits_adv, y, *weighting)
    if method == "mail_at":
        return (F.cross_entropy(logits_adv, y, reduction="none") * w).mean()
    kl = nn.KLDivLoss(reduction="none")
    each = torch.sum(kl(F.log_softmax(logits_adv, dim=1), F.softmax(logits, dim=1)), dim=1)
    return F.cross_entropy(logits, y) + beta * (1.0 / len(y)) * torch.sum(each * w)


@pytest.mark.parametrize("norm", ["const3", "batch"])
@pytest.mark.parametrize(
    ("method", "slope", "bias"), [("mail_at", 10, -0.5), ("mail_trades", 2, 0)]
)
def test_loss_and_gradients_are_the_official_ones(method, slope, bias, norm):
    logits, logits_adv = 2 * torch.randn(2, 48, 6, dtype=torch.float64)
    y = torch.randint(6, (48,))
    # The label is the prediction, the second, and neither.
    y[:12], y[12:24] = logits_adv[:12].argmax(1), logits_adv[12:24].topk(2).indices[:, 1]
    both = [[t.clone().requires_grad_() for t in (logits, logits_adv)] for _ in range(2)]
    passes = both[0] if method == "mail_trades" else both[0][1:]
    found = tiny_step.terms_of(method, *passes, y=y, mail_burn_in=0.0, mail_norm=norm)["total"]
    expected = official_loss(method, *both[1], y, 5.0, slope, bias, norm)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(found, both[0], allow_unused=True),
        torch.autograd.grad(expected, both[1], allow_unused=True),
        strict=True,
    ):
        # Plain MAIL-AT passes adversarial images alone.
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize(("method", "base"), [("mail_at", "pgd_at"), ("mail_trades", "trades")])
def test_before_its_burn_in_is_over_it_is_its_base(method, base):
    y = torch.arange(24) % 6
    passes = torch.randn(2 if base == "trades" else 1, 24, 6, dtype=torch.float64)
    settings = {"beta": 5.0} if base == "trades" else {}
    run = tiny_step.tiny_run(method)
    ours = tiny_step.terms_of(method, *passes, y=y)["total"]
    assert torch.equal(ours, tiny_step.terms_of(base, *passes, y=y, **settings)["total"])
    assert not run.method.phase(run)
    run.epoch = run.config.optim.epochs - 1  # of two: half of the run is less than 76/120
    assert not run.method.phase(run)
    weighted = tiny_step.terms_of(method, *passes, y=y, mail_burn_in=0.0)["total"]
    assert abs(float(weighted - ours)) > 1e-3


def test_harder_images_weigh_more():
    """One image is certainly right, one undecided, one certainly wrong."""
    logits = torch.tensor([[9.0, 0.0], [0.0, 0.0], [0.0, 9.0]])
    w = official_weights(logits, torch.zeros(3, dtype=torch.int64), 10, -0.5, "const3")
    assert w[0] < w[1] < w[2] <= 3


@pytest.mark.parametrize("norm", ["const3", "batch"])
@pytest.mark.parametrize("method", ["mail_at", "mail_trades"])
@pytest.mark.usefixtures("one_thread")
def test_weighted_steps_of_the_fast_engine_are_the_eager_ones(method, norm, monkeypatch):
    monkeypatch.setattr(fast, "ON_GPU", ("graph", *fast.COMPILED))  # Records the loss.
    both = runs.pair(method, mail_burn_in=0.0, mail_norm=norm, data=runs.batches(1))
    runs.assert_steps_equal(both, 2)


def test_the_published_set_up():
    config = find_recipe("mail-at-cifar10-resnet18")
    rates = {0: 0.01, 74: 0.01, 75: 1e-3, 90: 1e-4, 100: 1e-5, 119: 1e-5}
    assert {e: lr_at(config.optim, e / 120) for e in rates} == pytest.approx(rates)
    # From epoch 76 on, counted from 0.
    assert 75 / 120 < config.settings.mail_burn_in == 76 / 120
    assert not config.attack.clamp_start and config.attack.start == "normal"
