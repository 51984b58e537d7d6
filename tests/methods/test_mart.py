"""MART against its official loss, in double precision, and its official set-ups."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tiny_step
from cure_fast.methods import publish, select_method
from cure_fast.recipes import find_recipe
from cure_fast.training.schedules import lr_at


def official_loss(logits, logits_adv, y, beta):
    """YisenWang/MART's mart.py, from the logits on."""
    kl = nn.KLDivLoss(reduction="none")
    batch_size = len(y)
    adv_probs = F.softmax(logits_adv, dim=1)
    tmp1 = torch.argsort(adv_probs, dim=1)[:, -2:]
    new_y = torch.where(tmp1[:, -1] == y, tmp1[:, -2], tmp1[:, -1])
    loss_adv = F.cross_entropy(logits_adv, y)
    loss_adv = loss_adv + F.nll_loss(torch.log(1.0001 - adv_probs + 1e-12), new_y)
    nat_probs = F.softmax(logits, dim=1)
    true_probs = torch.gather(nat_probs, 1, (y.unsqueeze(1)).long()).squeeze()
    divergence = torch.sum(kl(torch.log(adv_probs + 1e-12), nat_probs), dim=1)
    loss_robust = (1.0 / batch_size) * torch.sum(divergence * (1.0000001 - true_probs))
    return loss_adv + float(beta) * loss_robust


def ours(logits, logits_adv, y, beta=5.0):
    return tiny_step.terms_of("mart", logits, logits_adv, y=y, beta=beta)


@pytest.mark.parametrize("scale", [0.1, 3.0, 40.0])
@pytest.mark.parametrize("beta", [5.0, 6.0, 0.0])
def test_loss_and_gradients_are_the_official_ones(scale, beta):
    logits, logits_adv = scale * torch.randn(2, 64, 10, dtype=torch.float64)
    y = torch.randint(10, (64,))
    # The label is the adversarial prediction in some rows and not in others.
    y[:20] = logits_adv[:20].argmax(dim=1)
    assert 20 <= (logits_adv.argmax(dim=1) == y).sum() < 64
    both = [[t.clone().requires_grad_() for t in (logits, logits_adv)] for _ in range(2)]
    found, expected = ours(*both[0], y, beta)["total"], official_loss(*both[1], y, beta)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(found, both[0]), torch.autograd.grad(expected, both[1]), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-14)
        assert a.abs().max() > 1e-6 or beta == 0


def test_terms_add_up_to_the_total():
    logits, logits_adv = torch.randn(2, 9, 4, dtype=torch.float64)
    terms = ours(logits, logits_adv, torch.arange(9) % 4, beta=2.5)
    parts = terms["adversarial_ce"] + terms["margin"] + 2.5 * terms["weighted_kl"]
    assert float(terms["total"]) == pytest.approx(float(parts))


def test_the_runner_up_is_another_class():
    """Of p = (0.7, 0.2, 0.1): 0.2 where the label is the first class, else 0.7."""
    logits = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64).log()
    for label, runner_up in ((0, 0.2), (1, 0.7), (2, 0.7)):
        terms = ours(logits, logits, torch.tensor([label]))
        assert float(terms["margin"]) == pytest.approx(-math.log(1.0001 - runner_up + 1e-12))


@pytest.mark.parametrize("certain", [0, 1])
def test_a_certain_prediction_has_a_finite_loss_and_gradients(certain):
    """In float32, where probabilities round to 0 and 1."""
    logits = torch.tensor([[200.0, -200.0, 0.0]], requires_grad=True)
    adversarial = torch.tensor([[-200.0, 200.0, 0.0]], requires_grad=True)
    total = ours(logits, adversarial, torch.tensor([certain]))["total"]
    for value in (total, *torch.autograd.grad(total, (logits, adversarial))):
        assert value.isfinite().all()


@pytest.mark.parametrize(
    ("model", "beta", "decay", "rates"),
    [
        ("resnet18", 5.0, 3.5e-3, {0: 0.01, 73: 0.01, 74: 1e-3, 89: 1e-4, 99: 1e-5, 119: 1e-5}),
        ("wrn34-10", 6.0, 7e-4, {0: 0.1, 73: 0.1, 74: 0.01, 88: 0.01, 89: 1e-3}),
    ],
)
def test_the_published_set_up(model, beta, decay, rates):
    config = select_method(find_recipe("cifar10-resnet18"), "mart")
    config = publish(replace(config, model=replace(config.model, model=model)))
    assert (config.settings.beta, config.optim.weight_decay) == (beta, decay)
    assert config.pretrain.pretrain_epochs == 0
    assert (config.attack.eps, config.attack.step_length, config.attack.attack_steps) == (
        *(0.031, 0.007),
        10,
    )
    assert (config.attack.start, config.attack.attack_mode) == ("normal", "eval")
    assert config.eval.eval_eps == 8 / 255
    epochs = config.optim.epochs
    assert epochs == max(rates) + 1
    assert {e: lr_at(config.optim, e / epochs) for e in rates} == pytest.approx(rates)
