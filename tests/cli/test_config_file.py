"""Configuration files: what ``show --toml`` writes gives the same run, and flags come after it."""

from __future__ import annotations

import json

import pytest

import cure_fast
from cure_fast.cli.configure import read_config
from cure_fast.cli.main import main
from cure_fast.config.values import to_dict
from cure_fast.errors import InputError
from cure_fast.recipes import RECIPES, published_recipes
from cure_fast.training.choices import starting_point
from cure_fast.training.config_file import as_toml


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(path, *words):
    return read_config(str(path), words, "cure-fast train", {})[0]


@pytest.mark.parametrize("recipe", [*RECIPES, *published_recipes()])
@pytest.mark.parametrize("alone", [True, False])
def test_what_is_written_is_read_again(recipe, alone, here):
    config, _ = read_config(recipe, ["--lr", "0.123456789012", "--seed", "7"], "x", {})
    base = "" if alone else recipe
    text = as_toml(config, starting_point(base), base)
    (here / "my.toml").write_text(text)
    assert read("my.toml") == config
    assert as_toml(read("my.toml"), starting_point(base), base) == text


@pytest.mark.parametrize("policies", ["piat,awp", "none"])
def test_policies_and_what_none_takes_away(policies, here, capsys):
    words = ["quickstart", "--method", "trades", "--policies", policies, "--width", "none"]
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


def test_another_method_than_the_files_starts_from_its_own_settings(here, capsys):
    assert main(["show", "quickstart", "--method", "trades", "--toml"]) == 0
    (here / "my.toml").write_text(capsys.readouterr().out)
    config = read("my.toml", "--method", "cure", "--percentile", "20")
    assert (config.method, config.settings.percentile) == ("cure", 20)


def test_a_runs_folder_gives_a_file_that_stands_by_itself(here, capsys):
    (here / "run").mkdir()
    config, _ = read_config("quickstart", ["--method", "mart"], "x", {})
    (here / "run" / "config.json").write_text(json.dumps(to_dict(config)))
    assert main(["show", "run", "--toml"]) == 0
    (here / "my.toml").write_text(capsys.readouterr().out)
    (here / "run" / "config.json").unlink()
    assert read("my.toml") == config and config.run.out is None


def test_python_takes_a_file_too(here):
    (here / "my.toml").write_text('recipe = "quickstart"\nepochs = 3\n')
    assert cure_fast.recipe("my.toml", seed=4).optim.epochs == 3


def test_the_configuration_of_a_run_is_such_a_file(here):
    config, _ = read_config("quickstart", ["--method", "mart", "--policies", "awp"], "x", {})
    (here / "config.json").write_text(json.dumps(to_dict(config)))
    assert read("config.json") == config


def test_as_json_it_is_one_too_and_says_what_is_used(here, capsys):
    assert main(["show", "quickstart", "--eps", "8/255", "--device", "cpu", "--json"]) == 0
    text = capsys.readouterr().out
    (here / "my.json").write_text(text)
    assert read("my.json") == read("quickstart", "--eps", "8/255", "--device", "cpu")
    used = json.loads(text)["used"]
    assert used["engine"] == "eager" and "device" not in used
    assert (used["eval_eps"], used["step_size"]) == (8 / 255, 2 / 255)
    # The digits are few.
    assert used["loader"] == "resident"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("epochs = [", "not valid TOML"),
        ("epochs = 'many'", "my.toml: --epochs: expected a value of type int"),
        ("[optimiser]\nepochs = 3", "expected one of the tables settings, data"),
        ("[data]\nepochs = 3", "expected in the table [optim]"),
        ("epochs = 3\n[optim]\nepochs = 5", "expected once, got it twice"),
        ("recipe = 'my.toml'", "the name of a recipe, or a run folder"),
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
        starting_point("missing.toml")


def test_one_form_at_a_time(capsys):
    assert main(["show", "quickstart", "--toml", "--json"]) == 2
    assert "Leave one out" in capsys.readouterr().err
