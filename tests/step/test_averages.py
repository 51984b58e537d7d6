"""Weights moved between steps: PIAT's interpolation and SEAT's average, against their formulas."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

import tiny_step
from cure_fast.errors import StoppedError
from cure_fast.policies.average import EmaSettings
from cure_fast.policies.piat import PiatSettings
from cure_fast.progress import Progress
from cure_fast.training.trainer import next_step, train_epoch
from killing import equal


def trained(run, stop=lambda: False):
    """Train the epoch under way; return its row."""
    log = SimpleNamespace(stage="train", step=lambda *_, **__: None, progress=Progress())
    return train_epoch(run, log, stop)


def averaged(decay, average, value):
    """Return decay * average + (1 - decay) * value; counts are copied."""
    return {
        name: decay * old + (1 - decay) * value[name]
        if old.is_floating_point()
        else value[name].clone()
        for name, old in average.items()
    }


def copied(run):
    return {name: value.clone() for name, value in run.model.state_dict().items()}


def assert_state(network, expected):
    for name, value in network.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-12, msg=name)


def both(policies, method="pgd_at"):
    """A run with these policies, and one without any, from the same weights."""
    torch.manual_seed(3)
    start = tiny_step.Normalised()
    return [
        tiny_step.tiny_run(method, model=copy.deepcopy(start), policies=chosen)
        for chosen in (policies, {})
    ]


def test_piat_interpolates_with_the_weights_of_the_epochs_begin():
    run, plain = both({"piat": PiatSettings()})
    for epoch in (0, 1):
        former = copied(run)
        # The same start in both, also where the first epoch has set them apart.
        plain.model.load_state_dict(run.model.state_dict())
        row = trained(run)
        trained(plain)
        share = (epoch + 1) / (epoch + 10)
        assert row["piat_share"] == pytest.approx(share)
        assert_state(run.model, averaged(share, former, plain.model.state_dict()))
        # Momenta are not interpolated, and so the same.
        states = (r.optimizer.state_dict()["state"] for r in (run, plain))
        for a, b in zip(*(s.values() for s in states), strict=True):
            torch.testing.assert_close(a["momentum_buffer"], b["momentum_buffer"])
    assert row["lr"] == 0.5


def test_a_share_of_one_goes_back_and_a_share_of_zero_does_nothing():
    (back, plain), (ahead, _) = (both({"piat": PiatSettings(piat_share=s)}) for s in (1.0, 0.0))
    start = copied(back)
    for run in (back, ahead, plain):
        trained(run)
    counted = "norm.num_batches_tracked"
    assert start[counted] == 0 and back.model.norm.num_batches_tracked == 4
    for name, value in back.model.state_dict().items():
        assert torch.equal(value, start[name]) or name == counted
    for value, expected in zip(copied(ahead).values(), copied(plain).values(), strict=True):
        assert torch.equal(value, expected)
    assert any(not torch.equal(value, start[name]) for name, value in copied(ahead).items())


@pytest.mark.parametrize("buffers", ["interpolate", "keep"])
def test_piat_interpolates_statistics_or_keeps_the_epochs(buffers):
    run, plain = both({"piat": PiatSettings(piat_share=0.75, piat_buffers=buffers)})
    former = copied(run)
    trained(run)
    trained(plain)
    last = plain.model.state_dict()
    expected = averaged(0.75, former, last)
    if buffers == "keep":
        expected |= dict(plain.model.named_buffers())
    assert_state(run.model, expected)
    assert not torch.allclose(former["norm.running_mean"], last["norm.running_mean"])


def test_piat_may_leave_the_first_epoch_alone_and_estimate_statistics_anew():
    run, plain = both({"piat": PiatSettings(piat_skip_first=True, piat_buffers="estimate")})
    trained(run)
    trained(plain)
    for own, other in zip(run.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(own, other)
    x = torch.cat([batch.x for batch in run.loader])
    seen = torch.tanh(run.model.conv1(x))
    torch.testing.assert_close(run.model.norm.running_mean, seen.mean(dim=(0, 2, 3)))
    trained(run)
    trained(plain)
    moved = zip(run.model.parameters(), plain.model.parameters(), strict=True)
    assert any(not torch.equal(own, other) for own, other in moved)


@pytest.mark.parametrize("after", [3, 4])
def test_a_run_stopped_before_the_end_of_an_epoch_interpolates_once(after):
    """Also where the stop came after its last step."""
    policies = {"piat": PiatSettings(piat_share=0.75)}
    whole, stopped = both(policies)[0], both(policies)[0]
    with pytest.raises(StoppedError):
        trained(stopped, lambda: stopped.batch == after)
    resumed = both(policies)[0]
    resumed.load_state_dict(copy.deepcopy(stopped.state_dict()))
    for _ in range(2):
        trained(whole)
        trained(resumed)
    assert equal(whole.state_dict(), resumed.state_dict())


def test_ema_follows_its_formula_in_every_step():
    run, _ = both({"ema": EmaSettings(ema_decay=0.3)})
    average = copied(run)
    assert run.result == "ema" and run.networks["ema"] is not run.model
    for step in range(8):
        run.epoch, run.batch = divmod(step, 4)
        next_step(run, run.loader.batch(run.batch))
        decay = min(0.3, (step + 1) / (step + 10))
        assert (decay < 0.3) is (step < 3)
        average = averaged(decay, average, copied(run))
        assert_state(run.networks["ema"], average)
    assert run.policies[0].epoch_metrics(run) == {"ema": {"rate": 1.0, "moves": 8}}


def test_ema_without_warm_up_has_its_share_from_the_first_step():
    run, _ = both({"ema": EmaSettings(ema_decay=0.9, ema_warmup="none")})
    average = copied(run)
    next_step(run, run.loader.batch(0))
    assert_state(run.networks["ema"], averaged(0.9, average, copied(run)))


def test_an_average_neither_takes_gradients_nor_changes_the_training():
    run, plain = both({"ema": EmaSettings()})
    for batch in run.loader:
        next_step(run, batch)
        next_step(plain, batch)
    assert all(not p.requires_grad for p in run.networks["ema"].parameters())
    assert len(run.trained_parameters) == len(plain.trained_parameters)
    for value, expected in zip(copied(run).values(), copied(plain).values(), strict=True):
        assert torch.equal(value, expected)


def test_a_step_that_is_not_finite_leaves_the_average(engine, small_run):
    run = small_run("pgd_at", policies={"ema": EmaSettings()})
    next_step(run, run.loader.batch(0))
    before = copy.deepcopy(run.networks["ema"].state_dict())
    assert next_step(run, tiny_step.poisoned(run.loader.batch(1)))[1] is None
    after = run.networks["ema"].state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    next_step(run, run.loader.batch(1))
    assert any(not torch.equal(value, after[name]) for name, value in before.items())
