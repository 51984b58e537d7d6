"""The known signs of a wrong evaluation are told, and a sound one is not slandered."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from cure_fast.evaluation.attack_result import AttackResult
from cure_fast.evaluation.evaluate import evaluate
from cure_fast.evaluation.trust import trust_warnings

pytestmark = pytest.mark.usefixtures("one_thread")

COMMON: dict[str, Any] = {
    "num_classes": 4,
    "eps": 0.05,
    "batch_size": 8,
    "device": "cpu",
    "seed": 0,
}


class Around(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base


class Detached(Around):
    def forward(self, x):
        return self.base(x).detach()


class Quantised(Around):
    def forward(self, x):
        return self.base((x * 8).round() / 8)


class QuantisedLogits(Around):
    def forward(self, x):
        return self.base(x).mul(100).round().div(100)


class Softmax(Around):
    def forward(self, x):
        return self.base(x).softmax(dim=1)


class Saturated(Around):
    def forward(self, x):
        return 1e4 * self.base(x)


class MostlyBlind(Around):
    def forward(self, x):
        return self.base(torch.cat([x[:, :1], x[:, 1:].detach()], dim=1))


class Noisy(Around):
    def forward(self, x):
        return self.base(x + 0.01 * torch.randn_like(x))


class BatchStatistics(Around):
    def forward(self, x):
        return self.base(x - x.mean(dim=0))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Detached, "no gradient path to the image"),
        (Quantised, "gradient of the margin is exactly zero for 24 of 24"),
        (QuantisedLogits, "gradient of the margin is exactly zero for 24 of 24"),
        (Softmax, "look like probabilities"),
        (Saturated, r"gradient of the cross-entropy is exactly zero for \d+ of 24"),
        (MostlyBlind, "67% of the input gradient is exactly zero"),
        (Noisy, "two passes over the same images differ"),
        (BatchStatistics, "with the other images of the batch"),
    ],
)
def test_signs_in_the_model(linear, data, kind, message):
    base = linear()
    images, labels = data(base)
    results = evaluate(
        kind(base), images, labels, attacks=["natural", "pgd10", "cw10"], step_size=None, **COMMON
    )
    told = trust_warnings(results)
    assert any(re.search(message, text) for text in told), told
    for name in ("pgd10", "cw10"):
        assert any(re.search(message, text) for text in results[name].warnings)
        assert not results[name].reliable
    unstable = kind in (Noisy, BatchStatistics)
    assert results["natural"].reliable is not unstable


def test_a_masked_model_looks_robust_and_is_called_so(linear, data):
    """What the warning is for: PGD finds nothing, though the model is exactly the broken one."""
    base = linear()
    images, labels = data(base)
    true = int(base.robust(images, labels, 0.05).sum())
    plain = evaluate(base, images, labels, attacks=["cw25"], step_size=None, **COMMON)["cw25"]
    masked = evaluate(Detached(base), images, labels, attacks=["cw25"], step_size=None, **COMMON)
    assert true <= plain.correct < 12 and plain.reliable
    assert masked["cw25"].correct > 20 and not masked["cw25"].reliable


def test_a_sound_evaluation_has_no_warning(conv_net, data):
    model = conv_net(4)
    images, labels = data(model, 40, wrong=5)
    results = evaluate(
        model,
        images,
        labels,
        attacks=["natural", "fgsm", "pgd10", "pgd20", "pgd40", "cw40"],
        step_size=None,
        **COMMON,
    )
    assert trust_warnings(results) == []
    assert all(r.reliable and r.warnings == () for r in results.values())
    assert 0 < results["pgd40"].correct < results["natural"].correct == 35


@pytest.mark.parametrize(
    ("attack", "step_size", "message"),
    [
        ("pgd5", 0.005, "5 steps of 0.005 do not reach eps 0.05"),
        ("cw3", 0.001, "3 steps of 0.001 do not reach eps 0.05"),
        ("pgd10", 0.2, "a step of 0.2 crosses the whole ball of eps 0.05"),
    ],
)
def test_steps_of_the_wrong_length_are_told(linear, data, attack, step_size, message):
    model = linear()
    images, labels = data(model)
    result = evaluate(model, images, labels, attacks=[attack], step_size=step_size, **COMMON)
    assert result[attack].warnings == (message,) and not result[attack].reliable


def result(attack, correct, count=1000, **more):
    steps = int(re.sub("[a-z]", "", attack) or 1)
    return AttackResult(
        attack=attack,
        correct=correct,
        count=count,
        seconds=1.0,
        settings={"eps": 0.03, "steps": steps, "step_size": 0.003} | more.pop("settings", {}),
        **more,
    )


def by_name(*results):
    return {r.attack: r for r in results}


SOUND = by_name(
    result("natural", 850, settings={}),
    result("fgsm", 600),
    result("pgd10", 551),
    result("pgd20", 549),
    result("pgd100", 552),
    result("cw20", 525),
    result("aa", 500),
)


def test_results_in_order_have_no_sign():
    assert trust_warnings(SOUND) == []
    assert trust_warnings({}) == []


@pytest.mark.parametrize(
    ("worse", "start"),
    [
        (result("pgd20", 560), "PGD-20: accuracy 56.0 % is above that of the weaker PGD-10"),
        (result("aa", 540), "AutoAttack: accuracy 54.0 % is above that of the weaker C&W-20"),
        (result("pgd20", 640), "PGD-20: accuracy 64.0 % is above that of the weaker FGSM"),
        (result("pgd10", 851), "PGD-10: more images right (851) than without an attack"),
        (result("aa", 380), "PGD-100: AutoAttack is 17.2 points lower"),
        (
            result("aa", 70, count=100),
            "AutoAttack: accuracy 70.0 % is above",
        ),
    ],
)
def test_results_out_of_order_are_told(worse, start):
    told = trust_warnings(SOUND | by_name(worse))
    assert any(text.startswith(start) for text in told), told


def test_fgsm_may_beat_steps_that_do_not_cross_the_ball():
    # 10 steps of 0.003 end on the near side from half of the starts in a ball of 0.03.
    assert trust_warnings(by_name(result("fgsm", 500), result("pgd10", 560))) == []
    assert len(trust_warnings(by_name(result("fgsm", 500), result("pgd20", 560)))) == 1


def test_fewer_images_leave_room_for_chance():
    assert trust_warnings(SOUND | by_name(result("aa", 57, count=100))) == []


def test_order_of_steps_is_by_number():
    told = trust_warnings(by_name(result("pgd100", 500), result("pgd20", 560), result("pgd9", 600)))
    assert told == []


def test_eps_zero_must_be_natural():
    natural = result("natural", 850, settings={})
    same = result("pgd20", 850, settings={"eps": 0.0})
    assert trust_warnings(by_name(natural, same)) == []
    (told,) = trust_warnings(by_name(natural, result("pgd20", 849, settings={"eps": 0.0})))
    assert told == "PGD-20: eps is 0, yet the accuracy is not the natural one"


def test_a_warning_of_several_attacks_is_told_once():
    told = trust_warnings(
        by_name(
            result("pgd20", 500, warnings=("masked", "weak"), reliable=False),
            result("cw20", 500, warnings=("masked",), reliable=False),
        )
    )
    assert told == ["PGD-20, C&W-20: masked", "PGD-20: weak"]
