"""Networks that have learnt nothing, or lost by their training, are told; others are not."""

from __future__ import annotations

import re
from typing import Any

import pytest

from cure_fast.evaluation.chance import beats_chance, below_chance, chance_warnings
from cure_fast.evaluation.record import record_warnings
from cure_fast.evaluation.results import print_results

CLASSES = [f"class {k}" for k in range(10)]


def attack(name: str, correct: int, count: int = 1000, by_class: tuple = ()) -> dict[str, Any]:
    return {
        "attack": name,
        "correct": correct,
        "count": count,
        "accuracy": 100 * correct / count,
        "seconds": 1.0,
        "settings": {"eps": 0.03, "steps": 20, "step_size": 0.003},
        "warnings": [],
        "reliable": True,
        "precision": "float32",
        "by_class": by_class,
    }


def record(method: str = "cure", network: str | None = "model", **models: Any) -> dict[str, Any]:
    """A record of models, each given by its attacks."""
    entries = {
        key: {"title": key, "attacks": {each["attack"]: each for each in attacks}}
        for key, attacks in models.items()
    }
    of_run = {} if network is None else {"network": network}
    return {"method": method, "classes": CLASSES, "models": entries, **of_run}


SOUND: dict[str, Any] = {
    "trained": [attack("natural", 800), attack("pgd20", 450), attack("cw20", 101)],
    "start": [attack("natural", 900), attack("pgd20", 3), attack("cw20", 0)],
}


def test_networks_that_have_learnt_are_left_alone():
    assert chance_warnings(record(**SOUND)) == {"trained": [], "start": []}
    assert record_warnings(record(**SOUND)) == []
    # A natural start has no robustness to lose, and natural training is to give none.
    natural = record("natural", trained=SOUND["start"], start=SOUND["trained"])
    assert record_warnings(natural) == []
    # 57 of 500 in 10 classes: 50 by guessing, with a deviation of 6.7; too few to tell.
    assert not beats_chance(57, 500, 0.1) and beats_chance(71, 500, 0.1)
    assert not below_chance(43, 500, 0.1) and below_chance(29, 500, 0.1)
    # By chance alone 99 of 1000 are as good as 100.
    guessing = record(trained=[attack("natural", 800), attack("aa", 99)])
    assert record_warnings(guessing) == []


CONSTANT = tuple(100.0 if k == 3 else 0.0 for k in range(10))


@pytest.mark.parametrize(
    ("key", "attacks", "message"),
    [
        ("trained", [attack("natural", 128)], r"natural: 128 of 1000 .* about 100: .*--lr, "),
        ("trained", [attack("natural", 0)], "natural: 0 of 1000 images .* no better than chance"),
        ("start", [attack("natural", 90)], "no better than chance; look at --pretrain-lr"),
        (
            "last",
            [attack("natural", 99, by_class=CONSTANT)],
            "every image of class class 3 is right and none of any other",
        ),
        # Of an uneven set, where the commonest class is far above an even share.
        (
            "trained",
            [attack("natural", 400, by_class=CONSTANT)],
            "that class is answered whatever is shown",
        ),
        (
            "trained",
            [attack("natural", 800), attack("pgd20", 200), attack("cw20", 120)],
            r"less robust than the start .*: pgd20 20.0 % after 30.0 %; look at --eps",
        ),
        (
            "trained",
            [attack("natural", 800), attack("cw20", 110), attack("aa", 60)],
            "aa: 6.0 % are right, fewer than the 10.0 % of guessing",
        ),
    ],
)
def test_what_a_network_has_not_learnt_is_told(key, attacks, message):
    start = [attack("natural", 900), attack("pgd20", 300), attack("cw20", 100)]
    models = {"trained": SOUND["trained"], "start": start, key: attacks}
    (told,) = record_warnings(record(**models))
    called = {"trained": "CURE: ", "start": "before CURE: ", "last": "CURE after the last epoch: "}
    assert told.startswith(called[key]) and re.search(message, told), told


def test_few_images_and_one_class_say_nothing():
    few = [attack("natural", 6, 63), attack("pgd20", 0, 63)]
    assert record_warnings(record(trained=few, start=[attack("pgd20", 60, 63)])) == []
    alone = (None,) * 9 + (100.0,)
    assert record_warnings(record(trained=[attack("natural", 64, 64, alone)])) == []


def test_a_file_is_told_what_it_is_to_be_described_by():
    told = record_warnings(record("", None, model=[attack("natural", 100), attack("pgd20", 0)]))
    assert len(told) == 1 and "look at --data, --model and --normalize" in told[0]


def test_the_result_is_called_as_everywhere():
    (told,) = record_warnings(record(network="ema", trained=[attack("natural", 100)]))
    assert told.startswith("CURE, ema network: natural: ")


def test_networks_are_told_by_the_attack_that_is_quoted_of_the_result(capsys):
    # At the start both leave none, and the first of them is no more than the first.
    start = [attack("natural", 900), attack("pgd20", 0), attack("cw20", 0)]
    models = record(trained=SOUND["trained"], start=start)
    told = {"eps": 0.03, "data": "digits", "model": "tiny", "paper": None, "warnings": []}
    told |= {"test_images": 1000, "policies": []}
    print_results(models | told)
    lines = [line for line in capsys.readouterr().out.splitlines() if "% of natural" in line]
    assert len(lines) == 2 and all("under C&W-20" in line for line in lines), lines
