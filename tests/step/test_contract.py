"""What every method and every policy keeps to, alone, together, and policies in pairs."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from itertools import permutations
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import tiny_step
from cure_fast.config import Config
from cure_fast.errors import InputError
from cure_fast.methods import METHODS, check_config
from cure_fast.policies import POLICIES
from cure_fast.step.policy import Policy
from cure_fast.step.train_step import Verdict, judge
from cure_fast.training.trainer import next_step

# Radius of the images in units of eps, where a method leaves the ball by design.
RADIUS = {"n_fgsm": 3.0, "las_at": 15 / 8 + 1e-6}
# Settings without which four steps would not move all that a method moves.
SETTINGS = {"las_at": {"strategy_every": 2}}
STEPS = 4  # two epochs of two batches
BATCHES = tiny_step.tiny_batches(2)
FOUND = {"natural": 50.0, "robust": 40.0, "robust_by_class": [40.0] * 4}


class Watching(Policy):
    """Checks the images of each step, and that the attack left the network as it was."""

    def before(self, run, batch):
        self.modes = [module.training for module in run.model.modules()]
        self.statistics = copy.deepcopy(dict(run.model.named_buffers()))

    @contextmanager
    def around(self, run, batch):
        radius = RADIUS.get(run.method.name, 1.0) * run.config.attack.eps
        assert batch.x_adv.shape == batch.x.shape and not batch.x_adv.requires_grad
        assert (batch.x_adv - batch.x).abs().max() <= radius + 1e-9
        assert batch.x_adv.min() >= 0 and batch.x_adv.max() <= 1
        assert [module.training for module in run.model.modules()] == self.modes
        assert all(parameter.requires_grad for parameter in run.model.parameters())
        if run.config.attack.attack_mode == "eval":
            assert same(self.statistics, dict(run.model.named_buffers()))
        yield


def same(a, b):
    """Whether two nests of tensors and plain values are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def make(method, policies=()):
    """A run of the method, whose own policies come first."""
    torch.manual_seed(3)
    model = tiny_step.Normalised()
    own = METHODS[method].preset(Config(settings=METHODS[method].settings)).policies
    chosen = {**own, **{name: POLICIES[name].settings for name in policies}}
    settings = SETTINGS.get(method, {})
    run = tiny_step.tiny_run(method, model=model, policies=chosen, batches=BATCHES, **settings)
    check_config(run.config)
    run.policies = (*run.policies, Watching())
    return run


def go(run, *, stops=()):
    """Train to the end as the trainer does, epochs' ends included.

    Returns:
        The last state, and that after each number of steps in ``stops``.
    """
    states = {}
    while run.position < STEPS:
        if run.position in stops:
            states[run.position] = copy.deepcopy(run.state_dict())
        _, terms = next_step(run, run.loader.batch(run.batch))
        assert all(torch.isfinite(term) for term in terms.values())
        if run.batch == run.loader.batches_per_epoch:
            for policy in run.policies:
                policy.on_epoch_end(run)
            run.engine.weights_moved()
            for policy in run.policies:
                policy.on_validation(run, FOUND)
            run.epoch, run.batch = run.epoch + 1, 0
            run.engine.reset_sums()
    return run.state_dict(), states


def assert_keeps_the_contract(method, policies=(), *, stops=(3,)):
    whole = make(method, policies)
    start = copy.deepcopy(whole.state_dict())
    end, states = go(whole, stops=stops)
    assert list(states) == list(stops)
    for at, state in states.items():
        resumed = make(method, policies)
        resumed.load_state_dict(state)
        assert same(end, go(resumed)[0]), f"stopped after step {at}"
    for name, network in {"model": end["model"], **end["networks"]}.items():
        assert all(tensor.isfinite().all() for tensor in network.values())
        before = start["model"] if name == "model" else start["networks"][name]
        assert not same(network, before), f"{name} has not moved"


@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_the_contract(method):
    # Not at all, in the first epoch, where one ends, and in the last.
    assert_keeps_the_contract(method, stops=(0, 1, 2, 3))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_it_with_every_policy(method, policy):
    try:
        make(method, [policy])
    except InputError as error:
        pytest.skip(str(error))
    assert_keeps_the_contract(method, [policy])


@pytest.mark.parametrize("pair", [*permutations(POLICIES, 2)], ids="+".join)
def test_policies_keep_it_in_pairs(pair):
    results = [POLICIES[name].result for name in pair]
    if None not in results:
        with pytest.raises(InputError, match="one policy at most"):
            make("trades", pair)
        return
    assert_keeps_the_contract("trades", pair)


@pytest.mark.parametrize("value", [1.0, float("nan")])
@pytest.mark.parametrize("has_grad", [True, False])
def test_what_is_not_finite_is_told_by_its_kind(value, has_grad):
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2) if has_grad else None
    state = SimpleNamespace(
        trained_parameters=[parameter], gradients={"score": [torch.tensor([value])]}
    )
    terms = {"total": torch.tensor(1.0)}
    assert judge(state, terms) == Verdict(loss=True, grads=True, further=value == 1)
    assert ("gradient_norm" in terms) == has_grad
