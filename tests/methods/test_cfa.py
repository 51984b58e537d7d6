"""CFA against its formulas, in double precision, and its statistics of classes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import engine_runs as runs
import tiny_step
from cure_fast.methods import find_method, select_method
from cure_fast.methods.cfa import Classes
from cure_fast.policies.fawa import FAWA
from cure_fast.recipes import find_recipe
from cure_fast.step.train_step import train_step

ACCURACY = [0.0, 0.25, 0.5, 1.0]
BASES = {"cfa_at": "pgd_at", "cfa_trades": "trades"}


def cfa_run(method, **options):
    """A run that treats its four classes by the accuracies above."""
    run = tiny_step.tiny_run(method, policies={}, **options)
    run.epoch = run.settings.cfa_warmup
    run.policy(Classes).accuracy.copy_(torch.tensor(ACCURACY))
    return run


@pytest.mark.parametrize("method", BASES)
@pytest.mark.parametrize(("start", "steps"), [("uniform", 0), ("uniform", 5), ("normal", 5)])
def test_each_class_has_its_radius(method, start, steps):
    x, y = 0.25 + 0.5 * torch.rand(64, tiny_step.CHANNELS, 1, 1).double(), torch.arange(64) % 4
    run = cfa_run(method, batches=[(x, y)], cfa_radius=0.25)
    attack = replace(run.config.attack, start=start, attack_steps=steps)
    run.config = replace(run.config, attack=attack)
    moved = (run.method.attack(run, run.loader.batch(0)) - x).abs()
    for label, accuracy in enumerate(ACCURACY):
        radius, own = (0.25 + accuracy) * 0.1, moved[y == label]
        assert own.max() <= radius + 1e-7
        # Steps reach the edge, and a uniform start comes near it.
        assert own.max() > (0.999 if steps else 0.9) * radius


@pytest.mark.parametrize(("method", "base"), BASES.items())
@pytest.mark.parametrize("start", ["normal", "uniform"])
def test_before_the_warm_up_it_is_its_base(method, base, start):
    run, plain = (
        tiny_step.tiny_run(name, policies={}, attack={"start": start}) for name in (method, base)
    )
    run.policy(Classes).accuracy.fill_(0.75)
    batch = run.loader.batch(0)
    assert torch.equal(run.method.attack(run, batch), plain.method.attack(plain, batch))
    total, expected = (r.method.loss(r, batch)["total"] for r in (run, plain))
    # The mixture of TRADES' terms has weights that add up to 1.
    torch.testing.assert_close(total, expected if method == "cfa_at" else expected / 7)
    run.epoch = 10
    assert not torch.equal(run.method.attack(run, batch), plain.method.attack(plain, batch))


def test_trades_terms_are_mixed_by_class():
    logits, logits_adv = torch.randn(2, 12, 4, dtype=torch.float64)
    run = cfa_run("cfa_trades", cfa_beta=0.25, beta=3.0)
    batch = run.loader.batch(0)
    both = [[t.clone().requires_grad_() for t in (logits, logits_adv)] for _ in range(2)]
    given = iter(both[0])
    run.model = lambda x: next(given)
    found = run.method.loss(run, batch)["total"]
    expected = torch.zeros((), dtype=torch.float64)
    for z, z_adv, label in zip(*both[1], batch.y, strict=True):
        value = 3.0 * (0.25 + ACCURACY[label])
        log_p, log_p_adv = z - z.logsumexp(0), z_adv - z_adv.logsumexp(0)
        kl = (log_p.exp() * (log_p - log_p_adv)).sum()
        expected = expected + (-log_p[label] + value * kl) / (1 + value) / 12
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(found, both[0]), torch.autograd.grad(expected, both[1]), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-14)
        assert a.abs().max() > 1e-3


def fixed_attack(run, batch):
    return (batch.x + 0.1 * torch.cos(17 * batch.x)).clamp(0, 1)


@pytest.mark.parametrize("method", BASES)
@pytest.mark.parametrize("micro_batch_size", [None, 5])
def test_statistics_are_of_the_whole_epoch(method, micro_batch_size):
    run = tiny_step.tiny_run(method)
    run.method = replace(run.method, attack=fixed_attack)
    run.micro_batch_size = micro_batch_size
    seen, robust = torch.zeros(2, 4, dtype=torch.int64)
    for batch in run.loader:
        right = run.model(fixed_attack(run, batch)).argmax(1) == batch.y
        train_step(run, batch)
        for label in range(4):
            seen[label] += (batch.y == label).sum()
            robust[label] += (right & (batch.y == label)).sum()
    classes = run.policy(Classes)
    assert torch.equal(classes.seen, seen) and torch.equal(classes.robust, robust)
    assert not classes.accuracy.any() and 0 < robust.sum() < seen.sum()
    classes.on_epoch_end(run)
    torch.testing.assert_close(classes.accuracy, (robust / seen).double())
    assert not classes.seen.any() and not classes.robust.any()
    expected = {"worst": float((robust / seen).min()), "mean": float((robust / seen).mean())}
    assert classes.epoch_metrics(run)["class_accuracy"] == pytest.approx(expected)


@pytest.mark.parametrize("engine", ["eager", "fast"])
def test_a_step_that_is_not_finite_counts_no_image(engine):
    run = runs.make_run("cfa_at", engine, data=runs.batches(1))
    x, y = run.loader.batches[0]
    runs.step(run, x, y)
    before = runs.snapshot(run)
    poisoned = x.clone()
    poisoned[1, 0] = float("nan")
    assert runs.step(run, poisoned, y) is None
    assert runs.differing(before, runs.snapshot(run)) == []
    assert run.policy(Classes).seen.sum() == len(y)


@pytest.mark.parametrize("method", BASES)
def test_fast_steps_are_the_eager_ones_by_class(method):
    both = runs.pair(method, data=runs.batches(1), cfa_warmup=1)
    for run in (both.fast, both.eager):
        run.policy(Classes).accuracy.copy_(torch.linspace(0, 1, 10))
    runs.assert_steps_equal(both, 2)
    assert both.fast.epoch == 1 and both.fast.policy(Classes).robust.sum() > 0


def test_the_paper_s_average_comes_with_both_forms():
    for name in BASES:
        config = select_method(find_recipe("quickstart"), name)
        assert config.policies == {"fawa": FAWA.settings}
        assert find_method(name).preset(config) == config
