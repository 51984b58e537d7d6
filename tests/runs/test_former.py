"""Configurations of earlier versions, read in today's layout."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

from cure_fast.config import EngineFeature
from cure_fast.config.values import to_dict
from cure_fast.errors import InputError
from cure_fast.recipes import RECIPES, find_recipe
from cure_fast.runs.folder import config_from_dict
from cure_fast.runs.former import GONE, upgraded
from cure_fast.training.schedules import lr_at

FORMAT_1 = Path(__file__).parents[1] / "faults" / "data" / "run-format-1" / "config.json"


def former(recipe="quickstart", **changes):
    """Return a configuration as the version before policies wrote it."""
    values = to_dict(find_recipe(recipe))
    del values["policies"], values["optim"]["lr_factors"], values["optim"]["clip_grad"]
    del values["data"]["crop_mode"], values["data"]["augment"], values["eval"]["networks"]
    values["attack"].pop("clamp_start", None)
    values["optim"]["lr_decay"] = 0.1
    values["settings"]["evaluate_revision"] = False
    values["run"] |= {"joint_forward": False, "engine_without": []}
    for section, fields in changes.items():
        values[section] |= fields
    return values


def start_is_clamped(config):
    """Return ``config`` with the start that earlier versions clamped."""
    return replace(config, attack=replace(config.attack, clamp_start=True))


@pytest.mark.parametrize("recipe", sorted(set(RECIPES) - {"cifar10-resnet18-fast"}))
def test_a_former_recipe_is_the_recipe(recipe):
    values = former(recipe)
    before = json.dumps(values)
    assert config_from_dict(values) == start_is_clamped(find_recipe(recipe))
    assert json.dumps(values) == before


def test_the_first_format_is_read():
    config = config_from_dict(json.loads(FORMAT_1.read_text()))
    assert (config.method, config.policies, config.optim.lr_factors) == ("cure", {}, None)


def test_another_decay_gives_the_same_rates_in_every_bit():
    values = former(
        optim={"lr_decay": 0.3, "milestones": [0.25, 0.5, 0.9], "schedule": "multistep"}
    )
    optim = config_from_dict(values).optim
    rates = [lr_at(optim, progress) for progress in (0, 0.25, 0.6, 0.95)]
    assert rates == [0.1, 0.1 * 0.3, 0.1 * 0.3**2, 0.1 * 0.3**3]


def test_the_evaluated_revision_is_a_network_to_attack():
    config = config_from_dict(former(settings={"evaluate_revision": True}))
    assert config.eval.networks == ("revision",)


def test_parts_of_the_engine_that_are_gone_are_left_out_no_more():
    parts = get_args(EngineFeature)
    config = config_from_dict(former(run={"joint_forward": True, "engine_without": [GONE, *parts]}))
    assert config.run.engine_without == parts


def test_todays_layout_stays_as_it_is():
    values = to_dict(find_recipe("quickstart"))
    assert upgraded(values) == values
    with pytest.raises(InputError, match="lr_decay"):
        config_from_dict(values | {"optim": {**values["optim"], "lr_decay": 0.1}})


@pytest.mark.parametrize(
    "changes",
    [
        {"optim": {"colour": 1}},
        {"optim": {"lr_decay": "much"}},
        {"optim": {"lr_decay": 0.5, "milestones": 3}},
        {"settings": {"shade": 1}},
        {"run": {"engine_without": ["folds"]}},
        {"run": {"engine_without": "fold"}},
        {"run": {"engine_without": [["fold"]]}},
    ],
    ids=str,
)
def test_what_no_version_wrote_is_refused(changes):
    with pytest.raises(InputError):
        config_from_dict(former(**changes))


@pytest.mark.parametrize("section", ["optim", "settings", "eval", "attack", "run", "data"])
@pytest.mark.parametrize("value", [None, 3, [], "text"])
def test_a_former_section_that_is_no_table_is_refused(section, value):
    with pytest.raises(InputError):
        config_from_dict(former(settings={"evaluate_revision": True}) | {section: value})


@pytest.mark.parametrize(
    ("attack", "evaluation", "found"),
    [
        ({}, {}, (None, None, 0.1)),
        ({"eps": 8 / 255, "step_size": 2 / 255}, {"eval_step_size": 0.003}, (None, None, 0.095625)),
        ({"eps": 0.031, "step_size": 0.007}, {"eval_step_size": 0.003}, (0.007, 0.003, 0.1)),
        ({"eps": 4 / 255}, {"eval_step_size": 0.003}, (2 / 255, 0.003, 0.1)),
        ({"eps": 0.15, "step_size": 0.0375}, {"eval_step_size": None}, (None, None, 0.1)),
    ],
)
def test_steps_of_earlier_recipes_stay_what_they_were(attack, evaluation, found):
    values = to_dict(find_recipe("quickstart"))
    config = config_from_dict({**values, "attack": attack, "eval": evaluation})
    own = config.eval
    assert (config.attack.step_size, own.eval_step_size, own.eval_step_share) == found
    assert config.attack.step_length == attack.get("step_size", 2 / 255)
