"""FAWA: which epochs its average takes in, and how."""

from __future__ import annotations

import pytest
import torch

import tiny_step
from cure_fast.policies.fawa import FawaSettings
from cure_fast.step.train_step import train_step


def fawa_run(**settings):
    return tiny_step.tiny_run(
        "trades", model=tiny_step.Normalised(), policies={"fawa": FawaSettings(**settings)}
    )


def epoch(run, *by_class):
    """Train two steps and validate with these accuracies of classes; return copies of weights."""
    for number in range(2):
        train_step(run, run.loader.batch(number))
    found = {"natural": 90.0, "robust": sum(by_class) / 3, "robust_by_class": list(by_class)}
    run.policies[0].on_validation(run, found)
    return {name: value.clone() for name, value in run.model.state_dict().items()}


def assert_average(run, expected):
    for name, value in run.networks["fawa"].state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12, msg=name)


def test_the_first_accepted_epoch_is_copied_and_those_below_are_left_out():
    run = fawa_run(fawa_decay=0.75, fawa_threshold=30.0)
    assert run.result == "fawa"
    # Nothing is accepted yet: it follows.
    assert_average(run, epoch(run, 60.0, 29.9, 60.0))
    first = epoch(run, 30.0, 40.0, 50.0)
    assert_average(run, first)
    left_out = epoch(run, 99.0, 29.9, 99.0)
    assert_average(run, first)
    assert not torch.equal(left_out["conv1.weight"], first["conv1.weight"])
    third = epoch(run, 30.0, 30.0, 30.0)
    averaged = {
        name: 0.75 * first[name] + 0.25 * value if value.is_floating_point() else value
        for name, value in third.items()
    }
    assert_average(run, averaged)
    assert int(averaged["norm.num_batches_tracked"]) == 4 * 2 * 2
    assert run.policies[0].epoch_metrics(run) == {"fawa_accepted": 2}


def test_the_count_of_accepted_epochs_is_in_checkpoints():
    run, resumed = fawa_run(), fawa_run()
    first = epoch(run, 50.0)
    resumed.load_state_dict(run.state_dict())
    epoch(resumed, 1.0)
    # Another epoch is not copied any more.
    assert_average(resumed, first)


@pytest.mark.parametrize("natural", [10.0, 90.0])
def test_a_method_without_attack_is_judged_by_its_natural_accuracy(natural):
    run = fawa_run()
    run.policies[0].on_validation(
        run, {"natural": natural, "robust": None, "robust_by_class": None}
    )
    assert run.policies[0].epoch_metrics(run) == {"fawa_accepted": int(natural > 20)}
