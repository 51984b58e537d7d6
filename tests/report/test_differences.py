"""What makes a run another experiment than the recipe for its row of the paper."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cure_fast.config.values import to_dict
from cure_fast.evaluation.attack_result import AttackResult
from cure_fast.methods import paper_row, select_method
from cure_fast.policies.average import EMA
from cure_fast.policies.piat import PIAT
from cure_fast.recipes import RECIPES, find_recipe
from cure_fast.report.record import ModelScores, Results
from cure_fast.report.results import differences

FAST = "cifar10-resnet18-fast"
ROWS = [
    name
    for name in RECIPES
    if name.startswith(("cifar10-", "svhn-")) and name not in (FAST, "cifar10-small")
]


def score(attack: str, count: int = 10_000) -> AttackResult:
    return AttackResult(attack, correct=5, count=count, seconds=1.0, settings={})


def results(eps: float = 8 / 255, *scores: AttackResult) -> Results:
    attacks = {s.attack: s for s in scores or (score("natural"), score("aa"))}
    trained = ModelScores("CURE", attacks, {})
    return Results(["a", "b"], 10_000, eps, {"row": "x"}, {"trained": trained}, [])


def changed(section: str, **values: Any) -> dict[str, Any]:
    """The recipe for CIFAR-10 and ResNet-18 with another value in one section."""
    config = find_recipe("cifar10-resnet18")
    return to_dict(replace(config, **{section: replace(getattr(config, section), **values)}))


@pytest.mark.parametrize("name", ROWS)
def test_a_recipe_does_not_differ_from_itself(name: str) -> None:
    config = find_recipe(name)
    assert paper_row(config) is not None
    assert differences(to_dict(config), results()) == []


def test_the_fast_recipe_is_compared_with_the_papers() -> None:
    found = differences(to_dict(find_recipe(FAST)), results())
    assert "epochs 70 instead of 200" in found and "nesterov on instead of off" in found
    assert "epochs of natural pre-training 20 instead of 200" in found


@pytest.mark.parametrize(
    ("section", "values", "expected"),
    [
        ("settings", {"rgp": False}, "rgp off instead of on"),
        ("settings", {"revision": False}, "revision off instead of on"),
        ("settings", {"beta": 1.0}, "beta 1 instead of 5"),
        ("settings", {"gamma": 0.5}, "gamma 0.5 instead of 1"),
        ("settings", {"percentile": 50}, "percentile 50 instead of 30"),
        ("settings", {"alpha": 0.3}, "alpha 0.3 instead of 0.1"),
        ("settings", {"score": "signed"}, "score signed instead of abs"),
        ("model", {"stem": "imagenet"}, "first layer imagenet instead of cifar"),
        ("model", {"normalize": "dataset"}, "normalisation dataset instead of none"),
        ("model", {"width": 16}, "width of the network 16 instead of the published one"),
        ("model", {"init_from": "/elsewhere/x/w.pt"}, "first weights from w.pt instead of none"),
        ("pretrain", {"pretrain_epochs": 0}, "epochs of natural pre-training 0 instead of 200"),
        ("pretrain", {"pretrain_lr": 0.01}, "its learning rate 0.01 instead of 0.1"),
        ("attack", {"eps": 0.031}, "training eps 0.031 instead of 8/255"),
        ("attack", {"attack_steps": 7}, "training attack's steps 7 instead of 10"),
        ("optim", {"epochs": 100}, "epochs 100 instead of 200"),
        ("optim", {"lr": 0.01}, "learning rate 0.01 instead of 0.1"),
        ("optim", {"weight_decay": 5e-3}, "weight decay 0.005 instead of 0.0005"),
        ("optim", {"milestones": (0.4, 0.8)}, "milestones 0.4, 0.8 instead of 0.5, 0.75"),
        ("data", {"train_images": 5000}, "training images 5,000 instead of all"),
        ("data", {"flip": False}, "mirrored training images off instead of on"),
    ],
)
def test_each_other_setting_is_named_with_both_values(
    section: str, values: dict[str, Any], expected: str
) -> None:
    assert differences(changed(section, **values), results()) == [expected]


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("data", {"workers": 3, "loader": "torch", "val_images": 500}),
        ("eval", {"val_every": 5}),
        ("model", {"width": 64}),  # the published one, written out
        ("run", {"seed": 4, "device": "cuda"}),
        ("eval", {"networks": ("revision",)}),
    ],
)
def test_what_does_not_change_the_experiment_is_not_listed(
    section: str, values: dict[str, Any]
) -> None:
    assert differences(changed(section, **values), results()) == []


def test_another_method_is_named() -> None:
    config = find_recipe("cifar10-resnet18")
    # Against what its own authors do, not against the recipe of CURE.
    trades = differences(to_dict(select_method(config, "trades")), results())
    assert trades == [
        "training eps 8/255 instead of 0.031",
        "training attack's step size 2/255 instead of 0.007",
        "epochs of natural pre-training 200 instead of 0",
    ]
    # The recipe's schedule is that of CURE_Eff too, whose preset leaves the natural start out.
    assert differences(to_dict(select_method(config, "cure_eff")), results()) == []


def test_other_policies_are_named_with_what_is_not_their_default() -> None:
    config = find_recipe("cifar10-resnet18")
    chosen = {"ema": EMA.settings, "piat": replace(PIAT.settings, piat_share=0.5)}
    found = differences(to_dict(replace(config, policies=chosen)), results())
    assert found == ["policies EMA, PIAT (piat share 0.5) instead of none"]


def test_the_radius_and_the_number_of_test_images_of_the_attacks() -> None:
    config = changed("run", seed=1)
    assert differences(config, results(8 / 255 + 5e-7)) == []
    assert differences(config, results(0.031)) == [
        "eps of the evaluation 0.031 instead of 8/255",
    ]
    part = results(8 / 255, score("natural"), score("aa", 100))
    assert differences(config, part) == ["AutoAttack on 100 test images only"]


def test_settings_that_an_older_record_lacks_are_not_compared() -> None:
    config = changed("settings", beta=1.0)
    config["settings"] = {"beta": 1.0}
    del config["pretrain"]
    assert differences(config, results()) == ["beta 1 instead of 5"]
