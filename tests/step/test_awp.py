"""AWP against its original algorithm, at its limits, and together with what else moves weights."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import tiny_step
from cure_fast.policies.awp import AwpSettings
from cure_fast.policies.conserve import Conserve
from cure_fast.step.train_step import train_step


def fixed_attack(run, batch):
    return (batch.x + 0.05 * torch.cos(17 * batch.x)).clamp(0, 1)


def awp_run(changed, method="trades", *, gamma=0.3, model=None, **options):
    """A run with AWP whose attack needs no weights."""
    return tiny_step.tiny_run(
        changed(method, attack=fixed_attack),
        model=model or tiny_step.Normalised(),
        policies={} if gamma is None else {"awp": AwpSettings(awp_gamma=gamma)},
        **options,
    )


def state(run):
    return copy.deepcopy([run.model.state_dict(), run.optimizer.state_dict()["state"]])


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return a == b if not isinstance(a, list) else all(map(equal, a, b))


def trades_loss(model, x, x_adv, y):
    """Equation of TRADES, beta 6; the natural images pass first."""
    logits, logits_adv = model(x), model(x_adv)
    kl = F.kl_div(F.log_softmax(logits_adv, 1), F.softmax(logits, 1), reduction="batchmean")
    return F.cross_entropy(logits, y) + 6 * kl


class OriginalAwp:
    """TRADES-AWP as the official code does it: a proxy network, its SGD step, and differences."""

    def __init__(self, model, *, gamma, lr, momentum, weight_decay):
        self.model, self.proxy = model, copy.deepcopy(model)
        settings = {"momentum": momentum, "weight_decay": weight_decay}
        self.optimizer = torch.optim.SGD(model.parameters(), lr=lr, **settings)
        self.proxy_optimizer = torch.optim.SGD(self.proxy.parameters(), lr=0.01)
        self.gamma = gamma

    def step(self, x, x_adv, y):
        self.proxy.load_state_dict(self.model.state_dict())
        self.proxy.train()
        self.proxy_optimizer.zero_grad()
        (-trades_loss(self.proxy, x, x_adv, y)).backward()
        self.proxy_optimizer.step()
        difference = {}
        moved = self.proxy.state_dict()
        for name, weight in self.model.state_dict().items():
            if weight.ndim > 1 and "weight" in name:
                apart = moved[name] - weight
                difference[name] = weight.norm() / (apart.norm() + 1e-20) * apart
        self.add(difference, self.gamma)
        self.optimizer.zero_grad()
        trades_loss(self.model, x, x_adv, y).backward()
        self.optimizer.step()
        self.add(difference, -self.gamma)

    @torch.no_grad()
    def add(self, difference, factor):
        for name, parameter in self.model.named_parameters():
            if name in difference:
                parameter.add_(factor * difference[name])


@pytest.mark.parametrize("pieces", [1, 3])
def test_steps_equal_those_of_the_original_proxy(changed, pieces):
    # A pass of part of the batch has BatchNorm statistics of its own.
    model = tiny_step.Normalised() if pieces == 1 else tiny_step.Tiny()
    run = awp_run(changed, model=model)
    run.micro_batch_size = None if pieces == 1 else 4
    optim = run.config.optim
    original = OriginalAwp(
        copy.deepcopy(run.model),
        gamma=0.3,
        lr=optim.lr,
        momentum=optim.momentum,
        weight_decay=optim.weight_decay,
    )
    plain = awp_run(changed, gamma=None, model=copy.deepcopy(run.model))
    for batch in run.loader:
        original.step(batch.x, fixed_attack(run, batch), batch.y)
        train_step(run, batch)
        train_step(plain, batch)
        for (name, value), expected in zip(
            run.model.state_dict().items(), original.model.state_dict().values(), strict=True
        ):
            torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12, msg=name)
    # The perturbation matters: without it the weights are elsewhere.
    first, second = next(run.model.parameters()), next(plain.model.parameters())
    assert (first - second).abs().max() > 1e-3


def test_a_length_of_zero_is_the_method_alone(changed):
    start = tiny_step.Normalised()
    run = awp_run(changed, gamma=0.0, model=copy.deepcopy(start))
    base = awp_run(changed, gamma=None, model=copy.deepcopy(start))
    for batch in run.loader:
        train_step(run, batch)
        train_step(base, batch)
    for value, expected in zip(
        run.model.state_dict().values(), base.model.state_dict().values(), strict=True
    ):
        # The weights are taken back by a difference, which rounds.
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)


def test_a_batch_of_nan_moves_nothing(changed):
    run = awp_run(changed)
    train_step(run, run.loader.batch(0))
    before = state(run)
    assert train_step(run, tiny_step.poisoned(run.loader.batch(1))) is None
    assert equal(before, state(run)) and run.skipped == 1
    assert all(weight.isfinite().all() for weight in run.model.parameters())
    train_step(run, run.loader.batch(1))
    assert not equal(before, state(run))


def test_a_gradient_that_overflows_at_the_perturbed_weights_moves_nothing(changed):
    """The perturbation is finite there, and is taken back to the bit, however long it is."""
    run = awp_run(changed, gamma=3.0)
    # Weights that were drawn in float32 would survive any order of the sums.
    train_step(run, run.loader.batch(1))
    before, calls = state(run), []
    loss = run.method.loss

    def overflown(run, batch):
        calls.append(not equal(before[0], run.model.state_dict()))
        terms = loss(run, batch)
        return terms if len(calls) == 1 else {n: t * float("inf") for n, t in terms.items()}

    run.method = replace(run.method, loss=overflown)
    assert train_step(run, run.loader.batch(0)) is None
    assert calls == [False, True] and equal(before, state(run))


def test_an_error_in_the_loss_takes_the_perturbation_back(changed):
    run = awp_run(changed)
    before, calls, loss = state(run), [], run.method.loss

    def broken(run, batch):
        calls.append("loss")
        if len(calls) == 2:
            raise RuntimeError("shapes differ")
        return loss(run, batch)

    run.method = replace(run.method, loss=broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        train_step(run, run.loader.batch(0))
    for name, weight in run.model.named_parameters():
        assert torch.equal(weight, before[0][name])


def test_weights_are_perturbed_from_the_epoch_of_the_warm_up_on(changed):
    policies = {"awp": AwpSettings(awp_gamma=0.3, awp_warmup=1)}
    start = tiny_step.Normalised()
    name = changed("trades", attack=fixed_attack)
    run, base = (
        tiny_step.tiny_run(name, model=copy.deepcopy(start), policies=chosen)
        for chosen in (policies, {})
    )
    for epoch in (0, 1):
        run.epoch = base.epoch = epoch
        train_step(run, run.loader.batch(0))
        train_step(base, base.loader.batch(0))
        assert equal(state(run), state(base)) is (epoch == 0)


@pytest.mark.parametrize("gamma", [0.3, None])
def test_hard_frozen_weights_keep_their_value_before_the_perturbation(changed, gamma):
    run = awp_run(changed, "cure", gamma=gamma, freeze="hard", revision=False)
    for group in run.optimizer.param_groups:
        group["lr"] = 1e-30
    before = copy.deepcopy(dict(run.model.named_parameters()))
    train_step(run, run.loader.batch(0))
    conserve = run.policy(Conserve)
    assert all(0 < kept.mean() < 1 for kept in conserve.kept)
    for name, value in run.model.named_parameters():
        torch.testing.assert_close(value, before[name], rtol=0, atol=1e-15, msg=name)


def test_hard_frozen_weights_are_those_that_do_not_move(changed):
    run = awp_run(changed, "cure", freeze="hard", revision=False, percentile=50.0)
    before = copy.deepcopy(dict(run.model.named_parameters()))
    train_step(run, run.loader.batch(0))
    value = run.model.layer1[0].conv1.weight
    still = value == before["layer1.0.conv1.weight"]
    # Of 49, those below the one of rank 0.5 * 48.
    assert int(still.sum()) == 24


def test_memory_that_runs_out_while_it_perturbs_leaves_the_weights(changed, monkeypatch):
    run = awp_run(changed)
    before, calls, real = state(run), [], torch.where

    def limited(*arguments):
        calls.append(None)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*arguments)

    monkeypatch.setattr(torch, "where", limited)
    with pytest.raises(torch.OutOfMemoryError):
        train_step(run, run.loader.batch(0))
    assert len(calls) == 2 and equal(before, state(run))
