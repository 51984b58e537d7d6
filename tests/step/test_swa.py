"""SWA against its formula, the statistics that it estimates, and what it leaves alone."""

from __future__ import annotations

import copy
import random
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import engine_runs as runs
import tiny_step
from cure_fast.errors import StoppedError
from cure_fast.policies.average import EmaSettings
from cure_fast.policies.swa import SwaSettings
from cure_fast.progress import Progress
from cure_fast.step.random_state import random_state
from cure_fast.training.trainer import next_step, train_epoch
from killing import equal


def trained(run, stop=lambda: False):
    """Train the epoch under way; return its row."""
    log = SimpleNamespace(stage="train", step=lambda *_, **__: None, progress=Progress())
    return train_epoch(run, log, stop)


def run_of(policies, *, epochs=4, model=None, loader=None):
    """A run on batches of unequal sizes."""
    torch.manual_seed(3)
    model = model() if model else tiny_step.Normalised()
    batches = [*tiny_step.tiny_batches(2), *tiny_step.tiny_batches(1, size=5, seed=1)]
    run = tiny_step.tiny_run("pgd_at", model=model, batches=batches, policies=policies)
    run.config = replace(run.config, optim=replace(run.config.optim, epochs=epochs))
    if loader is not None:
        run.loader = loader(batches)
    return run


def copied(network):
    return {name: value.detach().clone() for name, value in network.state_dict().items()}


def means(network, loader):
    """Mean and variance of what the network normalises, by batch and then by its images."""
    with torch.no_grad():
        found = [(len(batch), torch.tanh(network.conv1(batch.x)).flatten(1)) for batch in loader]
    total = sum(n for n, _ in found)
    mean = sum(n * h.mean(dim=0) for n, h in found) / total
    return mean, sum(n * h.var(dim=0, unbiased=True) for n, h in found) / total


def assert_estimated(network, loader):
    mean, variance = means(network, loader)
    torch.testing.assert_close(network.norm.running_mean, mean)
    torch.testing.assert_close(network.norm.running_var, variance)
    assert int(network.norm.num_batches_tracked) == 3


@pytest.mark.parametrize(
    ("start", "every", "counted"),
    [
        (0.0, 1, [0, 1, 2, 3, 4]),
        (0.275, 1, [2, 3, 4]),
        (0.4, 1, [2, 3, 4]),
        (0.2, 2, [1, 3]),
        (0.4, 7, [2]),
        (1.0, 1, []),
    ],
)
def test_the_mean_is_of_the_epochs_that_count(start, every, counted):
    run = run_of({"swa": SwaSettings(swa_start=start, swa_every=every)}, epochs=5)
    assert run.result == "swa"
    network, taken = run.networks["swa"], []
    for epoch in range(5):
        row = trained(run)
        taken += [copied(run.model)] if epoch in counted else []
        assert row["swa_epochs"] == len(taken)
        if not taken:
            assert equal(copied(network), copied(run.model))
            continue
        for name, value in network.named_parameters():
            mean = sum(state[name] for state in taken) / len(taken)
            torch.testing.assert_close(value.detach(), mean, rtol=1e-12, atol=1e-14)
        assert_estimated(network, run.loader)
    assert not counted or not equal(copied(network), copied(run.model))


def test_the_official_start_is_epoch_55_of_200():
    run = run_of({"swa": SwaSettings()}, epochs=200)
    swa, started = run.policies[0], []
    for run.epoch in range(60):
        swa.on_epoch_end(run)
        started.append(int(swa.since) > 0)
    assert started == [epoch >= 55 for epoch in range(60)]


class Dropping(tiny_step.Normalised):
    """Draws random numbers in train mode."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def logits(self, x):
        return self.drop(super().logits(x))


class Drawing(tiny_step.FixedLoader):
    """Draws from every source when an epoch opens, as worker processes are seeded."""

    @contextmanager
    def epoch(self, epoch, *, start_batch=0):
        with super().epoch(epoch, start_batch=start_batch) as batches:
            torch.rand(()), random.random(), np.random.rand()
            yield batches


POLICIES = {
    "swa": {"swa": SwaSettings(swa_start=0.0)},
    "ema": {"ema": EmaSettings(ema_buffers="estimate")},
}


@pytest.mark.parametrize("policies", POLICIES.values(), ids=POLICIES)
def test_it_leaves_the_training_and_its_random_numbers_alone(policies):
    random.seed(1)
    run, plain = (run_of(p, model=Dropping, loader=Drawing) for p in (policies, {}))
    states = []
    for trainee in (run, plain):
        torch.manual_seed(9)
        random.seed(9)
        np.random.seed(9)
        for _ in range(2):
            trained(trainee)
        state = trainee.state_dict()
        states.append([state[key] for key in ("model", "optimizer", "generators")])
        states[-1].append(random_state())
    assert equal(*states)
    network = next(iter(run.networks.values()))
    assert not any(p.requires_grad or p.grad is not None for p in network.parameters())
    assert network.norm.momentum == 0.1 == run.model.norm.momentum
    assert all(module.training for module in (*network.modules(), *run.model.modules()))


def test_statistics_of_a_plain_average_are_estimated_anew_where_asked():
    """IDBH's average: no warm-up; its parameters are those of the one with averaged buffers."""
    settings = EmaSettings(ema_decay=0.9, ema_warmup="none")
    averaged, estimated = (
        run_of({"ema": replace(settings, ema_buffers=buffers)})
        for buffers in ("average", "estimate")
    )
    for _ in range(2):
        trained(averaged)
        trained(estimated)
        ours, theirs = (run.networks["ema"] for run in (estimated, averaged))
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(a, b)
        assert_estimated(ours, estimated.loader)
        assert not torch.allclose(ours.norm.running_var, theirs.norm.running_var)


class Counting(tiny_step.FixedLoader):
    """Counts the epochs that are opened."""

    opened = 0

    def epoch(self, epoch, *, start_batch=0):
        self.opened += 1
        return super().epoch(epoch, start_batch=start_batch)


@pytest.mark.parametrize(("model", "opened"), [(tiny_step.Tiny, 2), (tiny_step.Normalised, 4)])
def test_a_network_without_statistics_is_spared_the_pass(model, opened):
    run = run_of(POLICIES["swa"], model=model, loader=Counting)
    weights = []
    for _ in range(2):
        trained(run)
        weights.append(copied(run.model)["conv1.weight"])
    torch.testing.assert_close(run.networks["swa"].conv1.weight.detach(), sum(weights) / 2)
    assert run.loader.opened == opened


@pytest.mark.parametrize("policies", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("after", [2, 3])
def test_a_run_stopped_in_its_third_epoch_is_resumed_to_the_same_mean(policies, after):
    """Also where the stop came after the epoch's last step."""
    whole, stopped, resumed = (run_of(policies) for _ in range(3))
    for _ in range(2):
        trained(stopped)
    with pytest.raises(StoppedError):
        trained(stopped, lambda: stopped.batch == after)
    resumed.load_state_dict(copy.deepcopy(stopped.state_dict()))
    assert resumed.epoch == 2 and resumed.batch == after
    for _ in range(4):
        trained(whole)
    for _ in range(2):
        trained(resumed)
    assert equal(whole.state_dict(), resumed.state_dict())


@pytest.mark.parametrize("policies", POLICIES.values(), ids=POLICIES)
def test_both_engines_move_and_estimate_alike(policies):
    both = runs.pair("pgd_at", data=runs.batches(2), policies=policies)
    runs.assert_steps_equal(both, 2)
    both.align()
    for run in (both.fast, both.eager):
        run.epoch = 0
        run.policies[0].on_epoch_end(run)
        run.engine.weights_moved()
    found, name = runs.worst(runs.tensors(both.fast), runs.tensors(both.eager))
    assert found <= runs.ROUNDING, name
    # The tables of the fast engine still hold.
    runs.assert_steps_equal(both, 2)


def test_steps_that_are_not_finite_are_in_no_mean(engine, small_run):
    run = small_run("pgd_at", policies={"swa": SwaSettings(swa_start=0.0)})
    before = copied(run.model)
    assert next_step(run, tiny_step.poisoned(run.loader.batch(0)))[1] is None
    run.policies[0].on_epoch_end(run)
    for name, value in run.networks["swa"].named_parameters():
        assert torch.equal(value, before[name])
