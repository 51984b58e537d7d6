"""What the words of ``compare`` mean: entries, their flags, what all share, and their folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from cure_fast.cli.compare import read_comparison, split_entries
from cure_fast.cli.main import main
from cure_fast.errors import InputError

SWITCHES = {"methods": str, "seeds": int, "jobs": int}


def read(*words):
    return read_comparison("quickstart", words, SWITCHES)


def test_an_entry_is_a_method_with_policies_and_flags_of_its_own():
    methods = "cure,mart+piat+awp --awp-gamma 0.01,trades --beta 5 --epochs 7"
    comparison = read("--methods", methods, "--epochs", "3", "--seeds=2")
    cure, mart, trades = (entry.config for entry in comparison.entries)
    assert [entry.name for entry in comparison.entries] == methods.split(",")
    assert (cure.method, mart.method, trades.method) == ("cure", "mart", "trades")
    assert list(mart.policies) == ["piat", "awp"] and not cure.policies
    assert mart.policies["awp"].awp_gamma == 0.01 and trades.settings.beta == 5
    # What is given for all, unless the entry says otherwise.
    assert [c.optim.epochs for c in (cure, mart, trades)] == [3, 3, 7]
    assert comparison.seeds == range(2) and comparison.folder == Path("runs/compare-quickstart")


def test_seeds_and_folders_are_the_comparisons():
    comparison = read("--methods", "cure+piat,trades --pretrain-epochs 0", "--out", "kept")
    configs = [comparison.config(*run) for run in comparison.runs()]
    assert [(c.run.seed, c.run.out) for c in configs] == [
        (seed, f"kept/{slug}-s{seed}")
        for seed in (0, 1, 2)
        for slug in ("cure+piat", "trades-pretrain-epochs-0")
    ]


@pytest.mark.parametrize(
    ("text", "entries"),
    [
        ("cure", [["cure"]]),
        (" cure , trades ", [["cure"], ["trades"]]),
        (
            "trades --lr-factors '0.1,0.01' --epochs 3,cure",
            [["trades", "--lr-factors", "0.1,0.01", "--epochs", "3"], ["cure"]],
        ),
        ('ard --teacher "robust:a b,c"', [["ard", "--teacher", "robust:a b,c"]]),
    ],
)
def test_commas_separate_entries_but_for_those_in_quotes(text, entries):
    assert split_entries(text) == entries


@pytest.mark.parametrize("text", ["", ",", "cure,", ",cure", "cure,,trades", "cure 'x", " "])
def test_entries_that_are_none_are_refused(text):
    with pytest.raises(InputError, match="expected entries with commas between"):
        split_entries(text)


def test_help_explains_methods_and_seeds_and_with_a_recipe_its_flags(capsys):
    for words, told in (["--help"], "--seeds"), (["quickstart", "--help"], "--attack-steps"):
        assert main(["compare", *words]) == 0
        text = capsys.readouterr().out
        assert told in text and "--methods" in text
