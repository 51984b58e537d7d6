"""TE against its formulas, in double precision, and its memory of each training image."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import engine_runs as runs
import tiny_step
from cure_fast.engine import fast
from cure_fast.methods import te
from cure_fast.step.train_step import train_step
from networks import Plain, network

FORMS = {"te": "pgd_at", "te_trades": "trades"}


def te_run(method, *, epochs=2, epoch=0, **options):
    """A run in the 0-based ``epoch`` of ``epochs``."""
    run = tiny_step.tiny_run(method, **options)
    run.config = replace(run.config, optim=replace(run.config.optim, epochs=epochs))
    run.epoch = epoch
    return run


def bank(run):
    return run.policy(te.Memory).bank


def log_softmax(z):
    return z - z.logsumexp(0)


def distance(z, memory):
    """mean_k (p_k - q_k)^2 of one image."""
    return sum((p - q) ** 2 for p, q in zip(z.softmax(0), memory / memory.sum(), strict=True)) / 4


def formula(method, logits, logits_adv, y, memory, weight, beta=6.0):
    """The loss, image by image."""
    total = torch.zeros((), dtype=torch.float64)
    for z, z_adv, label, row in zip(logits, logits_adv, y, memory, strict=True):
        if method == "te":
            total = total - log_softmax(z_adv)[label] + weight * distance(z_adv, row)
        else:
            kl = (z.softmax(0) * (log_softmax(z) - log_softmax(z_adv))).sum()
            total = total - log_softmax(z)[label] + beta * kl + weight * distance(z, row)
    return total / len(y)


@pytest.mark.parametrize("method", FORMS)
@pytest.mark.parametrize("epoch", [90, 120, 200])
def test_loss_and_gradients_follow_the_formula(method, epoch):
    logits, logits_adv = torch.randn(2, 12, 4, dtype=torch.float64)
    memory = torch.rand(12, 4, dtype=torch.float64)
    run = te_run(method, epochs=200, epoch=epoch - 1)
    batch = run.loader.batch(0)
    batch.notes["memory"] = memory
    both = [[t.clone().requires_grad_() for t in (logits, logits_adv)] for _ in range(2)]
    given = iter(both[0][method == "te" :])
    run.model = lambda x: next(given)
    weight = 300 * math.exp(-5 * (1 - min(1, (epoch - 90) / 60)) ** 2)
    found = run.method.loss(run, batch)["total"]
    expected = formula(method, *both[1], batch.y, memory, weight)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    first, second = (
        torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
        for total, leaves in zip((found, expected), both, strict=True)
    )
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-14)
    assert first[1].abs().max() > 1e-3


def test_the_weight_rises_as_in_the_official_code():
    run = te_run("te", epochs=200)
    weights = {}
    for number in (1, 89, 90, 120, 150, 151, 200):
        run.epoch = number - 1
        weights[number] = te.weight(run) if te.remembers(run) else 0.0
    expected = {90: 300 * math.exp(-5), 120: 300 * math.exp(-1.25), 150: 300, 151: 300, 200: 300}
    assert weights == pytest.approx({1: 0, 89: 0, **expected})


@pytest.mark.parametrize("method", FORMS)
def test_the_attack_raises_the_same_sum(method):
    """PGD as the official code has it: a mean of CE or beta KL, plus w times a mean square."""
    run = te_run(method, epochs=200, epoch=110, attack={"start": "zero"})
    batch = run.loader.batch(0)
    bank(run)[batch.index] = former = torch.rand(12, 4, dtype=torch.float64)
    p = run.model(batch.x).softmax(1).detach()
    q = 0.9 * former + 0.1 * p
    q = q / q.sum(1, keepdim=True)
    weight = 300 * math.exp(-5 * (1 - 21 / 60) ** 2)
    x_adv, plain = batch.x.clone(), batch.x.clone()
    for _ in range(5):
        moved = []
        for point, w in ((x_adv, weight), (plain, 0.0)):
            leaf = point.detach().requires_grad_()
            logits = run.model(leaf)
            if method == "te":
                base = torch.nn.functional.cross_entropy(logits, batch.y)
            else:
                base = 6 * (p * (p.log() - logits.log_softmax(1))).sum() / 12
            total = base + w * ((logits.softmax(1) - q) ** 2).mean()
            (grad,) = torch.autograd.grad(total, leaf)
            step = leaf.detach() + 0.03 * grad.sign()
            moved.append(step.clamp(batch.x - 0.1, batch.x + 0.1).clamp(0, 1))
        x_adv, plain = moved
    torch.testing.assert_close(run.method.attack(run, batch), x_adv, rtol=0, atol=1e-12)
    assert not torch.equal(x_adv, plain)  # The distance decides some signs.


@pytest.mark.parametrize(("method", "base"), FORMS.items())
def test_before_its_start_it_is_its_base(method, base):
    run, plain = te_run(method, te_start=1.0), te_run(base)
    for batch in run.loader:
        assert train_step(run, batch)["total"] == train_step(plain, batch)["total"]
    for a, b in zip(run.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not bank(run).any()
    run.epoch = 1
    terms = [train_step(r, r.loader.batch(0))["total"] for r in (run, plain)]
    assert terms[0] > terms[1] and bank(run).any()


@pytest.mark.parametrize("micro_batch_size", [None, 5])
def test_the_memory_is_of_each_image_wherever_it_comes(micro_batch_size):
    run = te_run("te")
    run.micro_batch_size = micro_batch_size
    count = run.loader.set_size
    images = torch.cat([batch.x for batch in run.loader])
    labels = torch.cat([batch.y for batch in run.loader])
    expected = torch.zeros(count, 4, dtype=torch.float64)
    for seed in (1, 2):
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        for index in order.split(12):
            batch = replace(tiny_step.batch_of(images[index], labels[index]), index=index, notes={})
            p = run.model.eval()(images[index]).softmax(1).detach()
            run.model.train()
            expected[index] = 0.9 * expected[index] + 0.1 * p
            train_step(run, batch)
            torch.testing.assert_close(batch.notes["memory"], expected[index])
    torch.testing.assert_close(bank(run), expected)
    # Of two visits, so that a target is a mean and sums to 1.
    torch.testing.assert_close(bank(run).sum(1), torch.full((count,), 0.19).double())
    run.model = lambda x: torch.zeros(12, 4, dtype=torch.float64)
    target = batch.notes["memory"] / batch.notes["memory"].sum(1, keepdim=True)
    apart = (0.25 - target).square().mean(1) * te.weight(run)
    torch.testing.assert_close(te.distance(run, batch, run.model(batch.x)), apart)


@pytest.mark.parametrize("engine", ["eager", "fast"])
def test_a_step_that_is_not_finite_leaves_the_memory(engine):
    run = runs.make_run("te", engine, data=runs.batches(1))
    x, y = run.loader.batches[0]
    runs.step(run, x, y)
    before = bank(run).clone()
    poisoned = x.clone()
    poisoned[1, 0] = float("nan")
    assert runs.step(run, poisoned, y) is None
    assert torch.equal(bank(run), before) and before.any()
    runs.step(run, x, y)
    assert not torch.equal(bank(run), before)


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("method", FORMS)
def test_fast_steps_are_the_eager_ones_before_and_after_its_start(method, recorded, monkeypatch):
    if recorded:
        monkeypatch.setattr(fast, "ON_GPU", ("graph", *fast.COMPILED))
    options = {"data": runs.batches(2), "te_start": 1.0}
    made = (runs.make_run(method, e, model=network(Plain), **options) for e in ("fast", "eager"))
    both = runs.Pair(*made)
    runs.assert_steps_equal(both, 4)
    assert bank(both.fast).any()
    assert len(both.fast.engine.prepared.loss.recorded) == 2 * recorded
