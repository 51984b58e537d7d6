"""AT-AWP and TRADES-AWP: the methods that they are, with the policy and constants of their code."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

import engine_runs as runs
import tiny_step
from cure_fast.errors import InputError
from cure_fast.methods import check_config, find_method, labels, publish, select_method
from cure_fast.policies.awp import AwpSettings
from cure_fast.recipes import find_recipe
from cure_fast.step.train_step import train_step

BASES = {"awp_at": "pgd_at", "awp_trades": "trades"}


def published(method, data="cifar10"):
    config = find_recipe("cifar10-resnet18")
    config = replace(config, data=replace(config.data, data=data))
    return publish(select_method(config, method))


@pytest.mark.parametrize(("method", "base"), BASES.items())
def test_a_preset_is_its_base_with_the_policy(method, base):
    ours, theirs = find_method(method), find_method(base)
    assert (ours.loss, ours.attack) == (theirs.loss, theirs.attack)
    config = select_method(find_recipe("quickstart"), method)
    assert list(config.policies) == ["awp"]
    assert labels(method, config.policies) == f"{theirs.label} + AWP"
    assert config.attack == select_method(find_recipe("quickstart"), base).attack
    check_config(config)
    with pytest.raises(InputError, match=rf"awp among --policies .*--method {base} goes without"):
        check_config(replace(config, policies={}))


@pytest.mark.parametrize(("method", "base"), BASES.items())
def test_a_length_of_zero_is_the_base_but_for_rounding(method, base):
    """Weights are taken back by a difference, which rounds."""
    torch.manual_seed(5)
    model = tiny_step.Normalised()
    none = {"awp": AwpSettings(awp_gamma=0.0)}
    run = tiny_step.tiny_run(method, model=copy.deepcopy(model), policies=none)
    plain = tiny_step.tiny_run(base, model=copy.deepcopy(model))
    for batch in run.loader:
        train_step(run, batch)
        train_step(plain, batch)
    for value, expected in zip(
        run.model.state_dict().values(), plain.model.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("method", BASES)
def test_both_engines_compute_it_before_and_after_the_warm_up(method):
    settings = {"awp": AwpSettings(awp_gamma=0.05, awp_warmup=1)}
    both = runs.pair(method, data=runs.batches(1), policies=settings)
    runs.assert_steps_equal(both, 2)
    assert both.fast.epoch == 1 and both.fast.policies[0].phase(both.fast)


def test_the_published_set_ups():
    at, trades, svhn = (
        published(*words) for words in (("awp_at",), ("awp_trades",), ("awp_at", "svhn"))
    )
    for config in (at, trades):
        assert (config.optim.epochs, config.optim.lr, config.optim.weight_decay) == (200, 0.1, 5e-4)
        assert (config.attack.eps, config.attack.step_length) == (8 / 255, 2 / 255)
    assert at.policies == {"awp": AwpSettings(awp_gamma=0.01, awp_warmup=0)}
    assert trades.policies == {"awp": AwpSettings(awp_gamma=0.005, awp_warmup=10)}
    assert svhn.policies == {"awp": AwpSettings(awp_gamma=0.01, awp_warmup=5)}
    assert (svhn.optim.lr, svhn.attack.step_length) == (0.01, 1 / 255)
    assert (at.attack.start, at.attack.attack_mode) == ("uniform", "train")
    assert (at.data.crop_mode, at.model.normalize) == ("reflect", "dataset")
    attack = trades.attack
    assert (attack.start, attack.attack_mode, attack.clamp_start) == ("normal", "eval", False)
    assert (trades.settings.beta, trades.model.normalize) == (6.0, "none")
