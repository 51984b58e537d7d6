"""How much a method computes, counted by running it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cure_fast.methods import METHODS
from cure_fast.policies import POLICIES
from cure_fast.training import passes
from cure_fast.training.passes import Passes, counted, try_method
from tiny_step import CHANNELS, Tiny

STORED = Path(passes.__file__).with_suffix(".json")


def counted_of(name):
    """What ``cure-fast list`` says of METHOD or METHOD+POLICY."""
    method, *policies = name.split("+")
    trial = try_method(method, policies)
    costs = {epoch: round(getattr(trial, epoch).cost, 6) for epoch in ("first", "last")}
    return {**costs, "networks": list(trial.networks)}


@pytest.mark.parametrize(
    ("method", "policies", "forward", "backward", "cost"),
    [
        ("natural", (), 1, 1, 3),
        ("pgd_at", (), 11, 11, 33),
        # The natural image once more, for the attack's target and for the loss.
        ("trades", (), 13, 12, 37),
        # Revision sees both images; each of the two losses of the score has a backward pass.
        ("cure", (), 15, 14, 43),
        # The loss of PGD-AT twice, once to perturb the weights.
        ("pgd_at", ("awp",), 12, 12, 36),
        ("pgd_at", ("ema",), 11, 11, 33),
        # The revision model sees both images; TRADES has passed them through the trained one.
        ("trades", ("revision",), 15, 12, 39),
        # PGD-AT has not the natural one.
        ("pgd_at", ("revision",), 14, 12, 38),
    ],
)
def test_passes_of_a_step(method, policies, forward, backward, cost):
    trial = try_method(method, policies)
    assert trial.first == trial.last == Passes(forward, backward)
    assert trial.first.cost == cost and trial.model == "resnet-small"


def test_a_method_that_changes_with_the_epoch_has_two_counts():
    trial = try_method("cure_eff")
    assert (trial.first.cost, trial.last.cost) == (3, 43) and trial.networks == ("revision",)


@pytest.mark.parametrize("name", [*METHODS, *(f"pgd_at+{policy}" for policy in POLICIES)])
def test_what_is_listed_was_counted(name):
    assert counted_of(name) == json.loads(STORED.read_text())[name], "run this file as a script"


def test_passes_over_a_part_count_by_their_share_and_backward_passes_where_they_go():
    first, second = Tiny(), Tiny()
    x = torch.ones(8, CHANNELS, 1, 1)
    with counted(8) as passes:
        kept = first(x)
        second(x[:2])
        kept.sum().backward()
    assert passes == Passes(1.25, 1.0)
    first(x).sum().backward()
    assert passes == Passes(1.25, 1.0)


@pytest.mark.parametrize("choice", [*METHODS.values(), *POLICIES.values()], ids=lambda c: c.name)
def test_every_paper_names_its_year(choice):
    if choice.name == "natural":
        assert choice.year is None
    else:
        assert choice.year is not None and 2010 < choice.year < 2100


if __name__ == "__main__":
    names = [*METHODS, *(f"pgd_at+{policy}" for policy in POLICIES)]
    STORED.write_text(json.dumps({name: counted_of(name) for name in names}, indent=1) + "\n")
