"""SEAT: PGD-AT whose average is evaluated, its decay and its schedule."""

from __future__ import annotations

from dataclasses import replace

import pytest

import tiny_step
from cure_fast.errors import InputError
from cure_fast.methods import check_config, find_method, publish, result_of, select_method
from cure_fast.policies.average import Average, EmaSettings
from cure_fast.recipes import find_recipe
from cure_fast.training.schedules import lr_at


def test_it_is_pgd_at_with_the_average_as_its_result():
    assert find_method("seat").loss is find_method("pgd_at").loss
    config = select_method(find_recipe("quickstart"), "seat")
    assert config.policies == {"ema": EmaSettings(ema_decay=0.999, ema_warmup="seat")}
    assert result_of(config) == "ema"
    check_config(config)
    with pytest.raises(InputError, match=r"ema among --policies .*--method pgd_at goes without"):
        check_config(replace(config, policies={}))


def test_a_tenth_of_the_average_stays_in_the_first_step():
    run = tiny_step.tiny_run("seat")
    average = run.policy(Average)
    found = []
    for run.step in (0, 1, 89, 8989, 8990, 8991, 100_000):
        found.append(average.decay(run))
    assert found == pytest.approx([1 / 10, 2 / 11, 90 / 99, 8990 / 8999, *[0.999] * 3])


@pytest.mark.parametrize(
    ("model", "decay", "rates"),
    [
        ("resnet18", 3.5e-3, {0: 0.01, 40: 0.01, 60: 5.5e-3, 80: 1e-3, 100: 5.5e-4, 120: 1e-4}),
        ("wrn34-10", 7e-4, {0: 0.1, 40: 0.1, 60: 0.055, 80: 0.01, 100: 7.5e-3, 120: 5e-3}),
    ],
)
def test_the_published_set_up(model, decay, rates):
    config = find_recipe("cifar10-resnet18")
    config = replace(config, model=replace(config.model, model=model))
    config = publish(select_method(config, "seat"))
    assert (config.optim.epochs, config.optim.weight_decay) == (120, decay)
    assert {e: lr_at(config.optim, e / 120) for e in rates} == pytest.approx(rates)
    attack = config.attack
    assert (attack.eps, attack.step_length, attack.attack_steps) == (0.031, 0.007, 10)
    assert (attack.start, attack.attack_mode, attack.clamp_start) == ("uniform", "eval", True)
    assert config.eval.eval_eps == 8 / 255
