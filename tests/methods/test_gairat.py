"""GAIRAT's counts and weights against its official code, its burn-in, and its set-ups."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import engine_runs as runs
import tiny_step
from cure_fast.engine import fast
from cure_fast.errors import InputError
from cure_fast.methods import check_config
from cure_fast.recipes import find_recipe
from cure_fast.step.train_step import train_step
from cure_fast.training.schedules import lr_at

WEIGHED = {"gairat_burn_in": 0.0}


def official_weights(kappa, steps, lam):
    """GAIR with Tanh, for an even number of steps."""
    reweight = ((lam + (int(steps / 2) - kappa) * 5 / (int(steps / 2))).tanh() + 1) / 2
    return reweight * len(reweight) / reweight.sum()


def official_attack(model, x, y, start, *, eps, step, steps):
    """GA_PGD: images, and how often each was still correct before a step."""
    kappa, x_adv = torch.zeros(len(x)), start.clone()
    for _ in range(steps):
        x_adv.requires_grad_()
        output = model(x_adv)
        predict = output.max(1, keepdim=True)[1]
        for p in range(len(x_adv)):
            if predict[p] == y[p]:
                kappa[p] += 1
        (grad,) = torch.autograd.grad(F.cross_entropy(output, y), x_adv)
        x_adv = x_adv.detach() + step * grad.sign()
        x_adv = torch.min(torch.max(x_adv, x - eps), x + eps).clamp(0.0, 1.0)
    return x_adv, kappa


def weights_of(kappa, *, steps=10, **settings):
    """What the policy notes for counts."""
    run = tiny_step.tiny_run("gairat", attack={}, **WEIGHED, **settings)
    run.config = replace(run.config, attack=replace(run.config.attack, attack_steps=steps))
    batch = tiny_step.batch_of(torch.zeros(len(kappa), 1, 1, 1), torch.zeros(len(kappa)))
    batch.notes["kappa"] = kappa
    with run.policies[0].around(run, batch):
        return batch.notes["weight"]


@pytest.mark.parametrize("lam", [-1.0, 0.0, 2.0])
@pytest.mark.parametrize("steps", [2, 10])
def test_weights_are_the_official_ones(lam, steps):
    kappa = torch.randint(steps + 1, (64,)).double()
    found = weights_of(kappa, steps=steps, gairat_lambda=lam)
    torch.testing.assert_close(found, official_weights(kappa, steps, lam), rtol=1e-9, atol=1e-12)
    assert float(found.mean()) == pytest.approx(1)


def test_weights_fall_with_the_count_and_are_equal_for_a_large_lambda():
    kappa = torch.arange(11.0, dtype=torch.float64)
    assert (weights_of(kappa).diff() < 0).all()
    torch.testing.assert_close(weights_of(kappa, gairat_lambda=100.0), torch.ones_like(kappa))
    # In float32 (1 + tanh(z)) / 2 would be 0 for all images.
    assert weights_of(torch.full((4,), 10.0), gairat_lambda=-20.0).tolist() == [1, 1, 1, 1]


def test_attack_and_counts_are_the_official_ones():
    run = tiny_step.tiny_run("gairat", attack={"start": "zero"})
    batch = tiny_step.near_boundaries(run)
    x, y = batch.x, batch.y
    found = run.method.attack(run, batch)
    expected, kappa = official_attack(run.model, x, y, x, eps=0.1, step=0.03, steps=5)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert batch.notes["kappa"].tolist() == kappa.tolist()
    assert set(kappa.tolist()) == {0, 1, 2, 3, 4, 5}


def test_loss_and_gradient_take_weights_as_they_are():
    logits = torch.randn(8, 4, dtype=torch.float64, requires_grad=True)
    y, w = torch.arange(8) % 4, torch.rand(8, dtype=torch.float64)
    run = tiny_step.tiny_run("gairat", **WEIGHED)
    run.model = lambda x: logits
    batch = tiny_step.batch_of(torch.zeros(8, 1, 1, 1), y)
    batch.notes["weight"] = w
    found = run.method.loss(run, batch)["total"]
    expected = (F.cross_entropy(logits, y, reduction="none") * w).mean()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for a, b in zip(*(torch.autograd.grad(t, logits) for t in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("size", [2, 5])
def test_weights_of_passes_are_those_of_the_whole_batch(size):
    """Normalised in each pass, they would be others."""
    whole, parts = (
        tiny_step.tiny_run("gairat", attack={"start": "uniform"}, **WEIGHED) for _ in range(2)
    )
    parts.micro_batch_size = size
    for _ in range(2):
        expected = train_step(whole, whole.loader.batch(0))
        torch.testing.assert_close(train_step(parts, parts.loader.batch(0)), expected)
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_before_its_burn_in_is_over_it_is_pgd_at():
    ours, base = (tiny_step.tiny_run(method) for method in ("gairat", "pgd_at"))
    weighed = tiny_step.tiny_run("gairat", **WEIGHED)
    totals = [train_step(run, run.loader.batch(0))["total"] for run in (ours, base, weighed)]
    assert torch.equal(totals[0], totals[1]) and not torch.equal(totals[0], totals[2])
    for a, b in zip(ours.model.parameters(), base.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("one_thread")
def test_weighted_steps_of_the_fast_engine_are_the_eager_ones(monkeypatch):
    monkeypatch.setattr(fast, "ON_GPU", ("graph", *fast.COMPILED))  # Records the loss.
    runs.assert_steps_equal(runs.pair("gairat", data=runs.batches(1), **WEIGHED), 2)


def test_an_attack_without_steps_is_refused():
    config = tiny_step.tiny_run("gairat").config
    check_config(config)
    with pytest.raises(InputError, match=r"--attack-steps: expected at least 1.*gairat"):
        check_config(replace(config, attack=replace(config.attack, attack_steps=0)))


@pytest.mark.parametrize(
    ("model", "rates", "burn_in"),
    [
        ("resnet18", {0: 0.1, 28: 0.1, 29: 0.01, 58: 0.01, 59: 1e-3, 99: 1e-3}, 29),
        ("wrn34-10", {58: 0.1, 59: 0.01, 88: 0.01, 89: 1e-3, 108: 1e-3, 109: 5e-4, 119: 5e-4}, 59),
    ],
)
def test_the_published_set_ups(model, rates, burn_in):
    """Official epochs count from 1."""
    config = find_recipe(f"gairat-cifar10-{model}")
    epochs = config.optim.epochs
    assert epochs == max(rates) + 1
    assert {e: lr_at(config.optim, e / epochs) for e in rates} == pytest.approx(rates)
    assert config.settings.gairat_burn_in == burn_in / epochs
    assert config.attack.start == "uniform" and config.attack.clamp_start
