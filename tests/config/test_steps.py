"""Step sizes that were not given: what they are, and that they follow the radius."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cure_fast.config import AttackConfig
from cure_fast.config.steps import STEP_SHARE, evaluation_step, step_warning
from cure_fast.config.values import with_values
from cure_fast.evaluation.record import main_settings
from cure_fast.methods import select_method
from cure_fast.recipes import PUBLIC_STEP, find_recipe


@pytest.mark.parametrize(
    ("recipe", "training", "evaluation"),
    [
        ("quickstart", (0.15, 0.0375), (0.15, 0.015)),
        ("cifar10-small", (8 / 255, 2 / 255), (8 / 255, 0.003)),
        ("cifar10-resnet18", (8 / 255, 2 / 255), (8 / 255, 0.003)),
        ("cifar10-resnet18-fast", (8 / 255, 2 / 255), (8 / 255, 0.003)),
        ("trades-cifar10-resnet18", (0.031, 0.007), (8 / 255, 0.003)),
        ("pgd-at-svhn-resnet18", (8 / 255, 1 / 255), (8 / 255, 0.003)),
        ("st-at-svhn-resnet18", (8 / 255, 1 / 255), (8 / 255, 0.003)),
    ],
)
def test_recipes_have_the_steps_of_their_papers_in_every_bit(recipe, training, evaluation):
    config = find_recipe(recipe)
    assert (config.attack.eps, config.attack.step_length) == training
    main = main_settings(config)
    assert (main["eps"], main["step_size"]) == evaluation
    for steps in (20, 100):
        share = config.eval.eval_step_share
        assert evaluation_step(main["eps"], steps, size=None, share=share) == evaluation[1]


@pytest.mark.parametrize(
    ("recipe", "share"), [("quickstart", 0.25), ("trades-cifar10-resnet18", 0.007 / 0.031)]
)
def test_steps_follow_another_radius_and_the_evaluation_is_within_it(recipe, share):
    config = with_values(find_recipe(recipe), {"eps": 0.02})
    assert config.attack.step_length == 0.02 * share
    assert main_settings(config)["eps"] == 0.02
    assert main_settings(config)["step_size"] == 0.02 * config.eval.eval_step_share
    given = with_values(config, {"eps": 0.01, "step_size": 0.005, "eval_eps": 0.03})
    assert given.attack.step_length == 0.005 and main_settings(given)["eps"] == 0.03
    # A radius that is given again changes nothing.
    same = find_recipe(recipe)
    assert with_values(same, {"eps": same.attack.eps}) == same


def test_the_public_codes_step_follows_the_radius_too():
    official = select_method(find_recipe("cifar10-resnet18"), "cure_official")
    assert (official.attack.eps, official.attack.step_length) == (0.031, 0.007)
    wider = replace(official.attack, eps=0.062)
    assert wider.step_length == pytest.approx(0.014)


def test_a_step_that_is_given_stays():
    assert AttackConfig(eps=0.1, step_size=0.5).step_length == 0.5
    assert evaluation_step(0.1, 2, size=0.001, share=STEP_SHARE) == 0.001


@given(
    eps=st.floats(1e-6, 1), steps=st.integers(1, 1000), share=st.sampled_from([0.1, PUBLIC_STEP])
)
def test_no_default_is_unreliable_for_its_steps(eps, steps, share):
    step = evaluation_step(eps, steps, size=None, share=share)
    assert step_warning(eps, steps, step) is None
    assert steps < 2 or steps >= 20 or steps * step >= 2.5 * eps * (1 - 1e-9)


def test_one_step_reaches_the_far_side_of_the_ball():
    assert evaluation_step(0.1, 1, size=None, share=STEP_SHARE) == 0.2
