"""Configuration files: what ``show --toml`` writes gives the same run, and flags come after it."""

from __future__ import annotations

import json

import pytest

from cure_fast.cli.config_file import as_toml, expanded
from cure_fast.cli.configure import read_config
from cure_fast.cli.main import main
from cure_fast.config.values import to_dict
from cure_fast.errors import InputError
from cure_fast.recipes import RECIPES, published_recipes


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(path, *words):
    recipe, rest = expanded(str(path), words)
    return read_config(recipe, rest, "cure-fast train", {})[0]


@pytest.mark.parametrize("recipe", [*RECIPES, *published_recipes()])
def test_what_is_written_is_read_again(recipe, here):
    config, _ = read_config(recipe, ["--lr", "0.123456789012", "--seed", "7"], "x", {})
    (here / "my.toml").write_text(as_toml(config, ""))
    assert read("my.toml") == config


@pytest.mark.parametrize("policies", ["piat,awp", "none"])
def test_policies_and_what_none_takes_away(policies, here, capsys):
    words = ["quickstart", "--method", "trades", "--policies", policies, "--width", "None"]
    assert main(["show", *words, "--toml"]) == 0
    (here / "my.toml").write_text(capsys.readouterr().out)
    config = read("my.toml")
    assert config == read_config(words[0], words[1:], "x", {})[0]
    assert list(config.policies) == (["piat", "awp"] if policies != "none" else [])
    assert config.model.width is None


def test_flags_come_after_the_file_and_the_file_after_its_recipe(here):
    (here / "my.toml").write_text('recipe = "quickstart"\nepochs = 3\neps = "8/255"\nflip = true\n')
    config = read("my.toml", "--epochs", "4")
    assert (config.name, config.optim.epochs, config.attack.eps) == ("quickstart", 4, 8 / 255)
    assert config.data.flip and config.optim.lr == 0.1


def test_the_configuration_of_a_run_is_such_a_file(here):
    config, _ = read_config("quickstart", ["--method", "mart", "--policies", "awp"], "x", {})
    (here / "config.json").write_text(json.dumps(to_dict(config)))
    assert read("config.json") == config


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("epochs = [", "not valid TOML"),
        ("epochs = 'many'", "--epochs: expected a whole number"),
        ("epochz = 3", "Perhaps you meant --epochs"),
        ("recipe = 3", "the name of a recipe"),
        ("recipe = 'quikstart'", "Perhaps you meant quickstart"),
        ("epochs = 2026-01-01", "a text, a number"),
        ("attacks = [['natural']]", "a text, a number"),
        ("[optim]\nepochs = 0", "at least 1"),
    ],
)
def test_what_is_wrong_in_a_file_is_said(text, told, here, capsys):
    (here / "my.toml").write_text(text)
    assert main(["train", "my.toml"]) == 2
    errors = capsys.readouterr().err
    assert told in errors and errors.count("\n") == 1 and list(here.iterdir()) == [here / "my.toml"]


def test_a_file_that_is_not_there_is_refused():
    with pytest.raises(InputError, match="--toml"):
        expanded("missing.toml", [])
