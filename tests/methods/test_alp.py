"""ALP against its formula in double precision, in both forms, and its set-ups."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import tiny_step
from cure_fast.methods import select_method
from cure_fast.recipes import find_recipe
from cure_fast.training.schedules import lr_at


def formula(logits, logits_adv, y, weight, ce, reduce):
    """Image by image and class by class."""
    total, (count, classes) = torch.zeros((), dtype=torch.float64), logits.shape
    for z, z_adv, label in zip(logits, logits_adv, y, strict=True):
        natural, adversarial = (torch.logsumexp(v, 0) - v[label] for v in (z, z_adv))
        distance = sum((a - b) ** 2 for a, b in zip(z, z_adv, strict=True))
        total = total + (adversarial if ce == "adv" else 0.5 * natural + 0.5 * adversarial)
        total = total + weight * distance / (classes if reduce == "mean" else 1)
    return total / count


@pytest.mark.parametrize("reduce", ["mean", "sum"])
@pytest.mark.parametrize("ce", ["adv", "mix"])
def test_loss_and_gradients_follow_the_formula(ce, reduce):
    logits, logits_adv = torch.randn(2, 12, 5, dtype=torch.float64)
    y = torch.arange(12) % 5
    both = [[t.clone().requires_grad_() for t in (logits, logits_adv)] for _ in range(2)]
    settings = {"alp_weight": 0.7, "alp_ce": ce, "alp_reduce": reduce}
    found = tiny_step.terms_of("alp", *both[0], y=y, **settings)["total"]
    expected = formula(*both[1], y, 0.7, ce, reduce)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(found, both[0]), torch.autograd.grad(expected, both[1]), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-14)
        # Through the natural logits too, where the distance alone has them.
        assert a.abs().max() > 1e-3


def test_mixed_form_is_that_of_public_code():
    """ShawnXYang/AT_HE's alp_loss, from the logits on, with its beta."""
    logits, logits_adv = torch.randn(2, 12, 5, dtype=torch.float64)
    y = torch.arange(12) % 5
    ce = 0.5 * F.cross_entropy(logits, y) + 0.5 * F.cross_entropy(logits_adv, y)
    expected = ce + F.mse_loss(logits, logits_adv)
    found = tiny_step.terms_of("alp_mix", logits, logits_adv, y=y, alp_weight=1.0)["total"]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_without_pairing_it_is_pgd_at():
    logits, logits_adv = torch.randn(2, 12, 5, dtype=torch.float64)
    y = torch.arange(12) % 5
    ours = tiny_step.terms_of("alp", logits, logits_adv, y=y, alp_weight=0.0)["total"]
    assert torch.equal(ours, tiny_step.terms_of("pgd_at", logits_adv, y=y)["total"])


def test_the_published_set_ups():
    config = find_recipe("alp-cifar10-resnet18")
    assert (config.optim.schedule, config.optim.lr, config.settings.alp_ce) == ("piat", 0.01, "adv")
    config = find_recipe("alp-mix-cifar10-wrn34-10")
    assert (config.settings.alp_ce, config.settings.alp_weight) == ("mix", 1.0)
    # Their epoch 75, counted from 1.
    rates = {0: 0.1, 73: 0.1, 74: 0.01, 76: 0.01}
    assert {e: lr_at(config.optim, e / 77) for e in rates} == pytest.approx(rates)
    assert (config.attack.eps, config.optim.weight_decay) == (0.031, 2e-4)
    assert select_method(find_recipe("quickstart"), "alp").settings.alp_ce == "adv"
