"""The norm of the ball: what goes with it, and what is refused."""

from __future__ import annotations

import pytest

from cure_fast.config import AttackConfig
from cure_fast.config.arguments import EvalArgs
from cure_fast.config.values import with_values
from cure_fast.errors import InputError
from cure_fast.evaluation.record import main_settings, settings_metadata, stated_settings
from cure_fast.methods import check_config, select_method
from cure_fast.recipes import find_recipe


@pytest.mark.parametrize("recipe", ["cifar10-resnet18", "trades-cifar10-resnet18"])
def test_the_evaluation_follows_norm_and_radius(recipe):
    config = with_values(find_recipe(recipe), {"norm": "l2", "eps": 0.5})
    main = main_settings(config)
    assert (main["norm"], main["eps"]) == ("l2", 0.5)
    assert main["step_size"] == 0.5 * config.eval.eval_step_share
    assert config.attack.step_length == 0.5 * config.attack.step_share
    other = main_settings(with_values(config, {"eval_norm": "linf", "eval_eps": 4 / 255}))
    assert (other["norm"], other["eps"]) == ("linf", 4 / 255)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"norm": "l2"}, "--norm l2: expected --eps with it, as the radius so far is one in linf"),
        ({"eval_norm": "l2"}, "--eval-norm l2: expected --eval-eps with it"),
        ({"norm": "l1", "eps": 0.5}, "--norm: expected one of linf, l2, got 'l1'"),
        ({"eps": 1.5}, "--eps: expected a number at least 0 and at most 1, got 1.5"),
        ({"step_size": 1.5}, "--step-size: expected a number at least 0 and at most 1, got 1.5"),
        ({"eval_eps": 1.5}, "--eval-eps: expected a number at least 0 and at most 1, got 1.5"),
    ],
)
def test_a_norm_needs_a_radius_in_its_range(values, told):
    with pytest.raises(InputError, match=told):
        with_values(find_recipe("quickstart"), values)


def test_l2_takes_radii_above_1():
    config = with_values(find_recipe("quickstart"), {"norm": "l2", "eps": 2.0})
    assert main_settings(config)["eps"] == 2.0
    assert AttackConfig(norm="l2", eps=2.0, step_size=1.5).step_length == 1.5


@pytest.mark.parametrize("method", ["n_fgsm", "fgsm_pgi"])
def test_methods_made_of_corners_are_refused_in_l2(method):
    config = select_method(find_recipe("cifar10-resnet18"), method)
    check_config(config)
    with pytest.raises(InputError, match=f"--norm: expected linf with --method {method}"):
        check_config(with_values(config, {"norm": "l2", "eps": 0.5}))
    other = with_values(select_method(config, "fgsm_rs"), {"norm": "l2", "eps": 0.5})
    check_config(other)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"norm": "l2", "eps": 0.5, "seed": 3},
        {"eps": 0.031, "eval_eps": 8 / 255, "eval_step_size": 0.002},
        {"eval_norm": "l2", "eval_eps": 1.5},
    ],
)
def test_a_file_of_weights_states_what_its_run_is_measured_by(values, tmp_path):
    config = with_values(find_recipe("cifar10-resnet18"), values)
    told = stated_settings(settings_metadata(config), vars(EvalArgs()), tmp_path)
    assert main_settings(told) == main_settings(config)


def test_arguments_stand_before_what_a_file_states(tmp_path):
    def main(metadata, **given):
        args = vars(EvalArgs(**given))
        return main_settings(stated_settings(metadata, args, tmp_path / "x.safetensors"))

    assert main({"eps": "0.1"}) == main({}) | {"eps": 0.1, "step_size": 0.1 * 0.1}
    assert main({"eps": "wide"}, eps=0.1)["eps"] == 0.1
    assert main({"eps": "0.1", "eval_eps": "0.2"}, eps=2.0, norm="l2")["eps"] == 2.0
    assert main({"eps": "0.5", "norm": "l2"}, norm="l2")["eps"] == 0.5
    with pytest.raises(InputError, match=r"x\.safetensors: .* got eps 'wide'\. Give --eps\."):
        main({"eps": "wide"})
    with pytest.raises(InputError, match="--norm l2: expected --eps with it"):
        main({"eps": "0.1"}, norm="l2")
    with pytest.raises(InputError, match=r"^--eps: expected a number at least 0 and at most 1"):
        main({"seed": "3"}, eps=2.0)
