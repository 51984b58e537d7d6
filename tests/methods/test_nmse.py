"""NMSE against its formula, in double precision, and PIAT's preset and schedule."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import tiny_step
from cure_fast.methods import find_method, publish, select_method
from cure_fast.policies.piat import PIAT, Interpolate
from cure_fast.recipes import find_recipe
from cure_fast.training.schedules import lr_at


def ours(logits, logits_adv, y, **settings):
    return tiny_step.terms_of("nmse", logits, logits_adv, y=y, **settings)


def formula(logits, logits_adv, y, mu):
    """CE(x', y) + mu * mean[(1 - p_y) * 2 (1 - cos)], image by image."""
    total = torch.zeros((), dtype=torch.float64)
    for z, z_adv, label in zip(logits, logits_adv, y, strict=True):
        ce = torch.logsumexp(z_adv, 0) - z_adv[label]
        p = (z - torch.logsumexp(z, 0)).exp()[label]
        cosine = (z @ z_adv) / (z @ z).sqrt() / (z_adv @ z_adv).sqrt()
        total = total + ce + mu * (1 - p) * 2 * (1 - cosine)
    return total / len(y)


@pytest.mark.parametrize("mu", [4.0, 0.5, 0.0])
def test_loss_and_gradients_follow_the_formula(mu):
    logits, logits_adv = torch.randn(2, 32, 10, dtype=torch.float64)
    y = torch.randint(10, (32,))
    both = [[t.clone().requires_grad_() for t in (logits, logits_adv)] for _ in range(2)]
    found, expected = ours(*both[0], y, mu=mu)["total"], formula(*both[1], y, mu)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(found, both[0]), torch.autograd.grad(expected, both[1]), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-14)
        assert a.abs().max() > 1e-4 or mu == 0


@pytest.mark.parametrize("weight", [False, True])
@pytest.mark.parametrize("natural", [False, True])
def test_gradients_stop_where_asked(weight, natural):
    logits, logits_adv = (t.requires_grad_() for t in torch.randn(2, 8, 10, dtype=torch.float64))
    y = torch.randint(10, (8,))
    stops = {"nmse_detach_weight": weight, "nmse_detach_natural": natural}
    found = ours(logits, logits_adv, y, **stops)["nmse"]
    unit, unit_adv = (t / t.norm(dim=1, keepdim=True) for t in (logits, logits_adv))
    p = logits.softmax(1)[torch.arange(8), y]
    p, unit = p.detach() if weight else p, unit.detach() if natural else unit
    expected = ((1 - p) * (unit_adv - unit).square().sum(1)).mean()
    inputs = (logits, logits_adv)
    whole = {"materialize_grads": True, "allow_unused": True}
    pairs = (torch.autograd.grad(total, inputs, **whole) for total in (found, expected))
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-14)


def test_the_distance_is_of_directions_and_at_most_four():
    logits, logits_adv = torch.randn(2, 16, 10, dtype=torch.float64)
    y = torch.arange(16) % 10
    distance = ours(logits, logits_adv, y)["nmse"]
    longer = ours(logits, 7 * logits_adv, y)["nmse"]
    torch.testing.assert_close(longer, distance)
    assert float(ours(logits, logits, y)["nmse"]) == pytest.approx(0, abs=1e-12)
    # Certain and wrong: the weight is 1.
    opposite = 60.0 * torch.tensor([[1.0, -1.0]])
    assert float(ours(opposite, -opposite, torch.tensor([1]))["nmse"]) == pytest.approx(4)


def test_piat_is_nmse_with_its_policy_and_keeps_what_was_chosen():
    config = select_method(find_recipe("quickstart"), "piat_nmse")
    assert config.policies == {"piat": PIAT.settings} and config.settings.mu == 4
    chosen = replace(PIAT.settings, piat_share=0.5)
    again = select_method(replace(config, policies={"piat": chosen}), "piat_nmse")
    assert again.policies == {"piat": chosen}
    assert not select_method(find_recipe("quickstart"), "nmse").policies
    run = tiny_step.tiny_run("piat_nmse")
    assert isinstance(run.policies[0], Interpolate) and run.method.loss is find_method("nmse").loss


@pytest.mark.parametrize(
    ("model", "rates"),
    [
        ("resnet18", {0: 0.01, 60: 0.01, 75: 0.0055, 90: 1e-3, 105: 5.5e-4, 120: 1e-4}),
        ("wrn34-10", {0: 0.1, 90: 0.1, 135: 0.01, 180: 1e-3}),
    ],
)
def test_the_published_schedule(model, rates):
    config = find_recipe("cifar10-resnet18")
    config = replace(config, model=replace(config.model, model=model))
    config = publish(select_method(config, "piat_nmse"))
    epochs = max(rates)
    assert config.optim.epochs == epochs and config.attack.start == "uniform"
    assert {e: lr_at(config.optim, e / epochs) for e in rates} == pytest.approx(rates)
