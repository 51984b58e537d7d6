"""Resuming with another configuration, an older or newer format, and files that are not theirs."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from cure_fast.checkpoint import check_checkpoint, load_checkpoint, save_checkpoint
from cure_fast.cli import main
from cure_fast.errors import InputError
from cure_fast.log import read_rows
from cure_fast.runs import check_same_run, load_config, start_record
from cure_fast.trainer import Run
from cure_fast.weights import read_weights

# A run of the code that wrote format 1, stopped in the middle of its second epoch of two.
FORMAT_1 = Path(__file__).parent / "data" / "run-format-1"
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A copy of the stopped run, in the current folder."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(FORMAT_1, tmp_path / "run")).relative_to(tmp_path)


def resume(*words):
    return main(["train", "run", "--resume", "--device", "cpu", *words])


def epochs(run):
    rows = read_rows(run / "metrics.jsonl")
    return [r["epoch"] for r in rows if r["event"] == "epoch" and r["stage"] == "train"]


def test_a_run_of_the_first_format_is_finished_by_resume(run, capsys):
    before = read_weights(run / "start.safetensors")
    assert resume() == 0
    output = capsys.readouterr().out
    assert "resumed after step 3" in output and "skipped" not in output and "2/2" in output
    assert epochs(run) == [1, 2] and (run / "report.html").exists()
    newest = run / "checkpoints/checkpoint-000000004"
    assert check_checkpoint(newest) == "" and (newest / "weights.safetensors").exists()
    state = load_checkpoint(run / "checkpoints")[0]
    assert state["step"] == 4 and state["random"] is not None
    assert any(not torch.equal(before[k], v) for k, v in state["model"].items())


def test_the_state_of_the_first_format_gets_what_it_lacks():
    state, skipped = load_checkpoint(FORMAT_1 / "checkpoints")
    assert skipped == [] and (state["epoch"], state["batch"], state["step"]) == (1, 1, 3)
    lacking = ("random", "pending", "skipped", "skipped_in_row", "micro_batch_size", "counted")
    assert [state[name] for name in lacking] == [None, None, 0, 0, None, 1]
    stored = torch.load(FORMAT_1 / "checkpoints/checkpoint-000000003/state.pt", weights_only=True)
    assert state["epoch"] == stored["epoch"] and set(lacking).isdisjoint(stored)
    assert set(state) == set(stored) | {*lacking, "micro_batch_asked"}
    assert all(torch.equal(state["model"][k], v) for k, v in stored["model"].items())


def test_a_newer_format_is_skipped_with_the_way_out(run, capsys):
    for step in (2, 3):
        path = run / f"checkpoints/checkpoint-{step:09d}/manifest.json"
        path.write_text(path.read_text().replace('"format": 1', '"format": 3'))
    assert resume() == 2
    error = capsys.readouterr().err
    told = "format 3, written by a newer cure-fast; this one reads 1 to 2: update it"
    assert error.count(told) == 2 and error.count("\n") == 1


def test_an_older_checkpoint_is_taken_where_the_newest_is_of_a_newer_format(run, capsys):
    path = run / "checkpoints/checkpoint-000000003/manifest.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 99'))
    assert resume() == 0
    output = capsys.readouterr().out
    assert "skipped checkpoint-000000003: format 99" in output and "after step 2" in output


CHANGES = {
    "--lr 0.2": "optim.lr: 0.1 in the run, 0.2 asked for",
    "--eps 8/255": "attack.eps: 0.15 in the run, 0.031",
    "--width 2": "model.width: 1 in the run, 2 asked for",
    "--model resnet18": "model.model: 'resnet-small' in the run, 'resnet18' asked for",
    "--batch-size 10": "optim.batch_size: 20 in the run, 10 asked for",
    "--epochs 3": "optim.epochs: 2 in the run, 3 asked for",
    "--beta 1": "settings.beta: 5.0 in the run, 1.0 asked for",
    "--train-images 60": "data.train_images: 40 in the run, 60 asked for",
    "--amp bf16": "run.amp: 'auto' in the run, 'bf16' asked for",
    "--method trades": "method: 'cure' in the run, 'trades' asked for",
}


@pytest.mark.parametrize("flags", CHANGES)
def test_another_configuration_is_refused_with_a_diff(run, capsys, flags):
    config = (run / "config.json").read_bytes()
    seed = ["--seed", "7"]
    assert resume(*flags.split(), *seed) == 2
    error = capsys.readouterr().err
    assert CHANGES[flags] in error and "run.seed: 0 in the run, 7 asked for" in error
    assert error.count("\n") == 1 and error.rstrip().endswith(
        "add --override to go on with the changed one."
    )
    assert (run / "config.json").read_bytes() == config
    assert not (run / "checkpoints/checkpoint-000000004").exists()


@pytest.mark.parametrize("flags", ["--loader torch", "--limit 5", "--tensorboard", "--workers 1"])
def test_how_and_what_is_measured_may_change(run, flags):
    from cure_fast.flag_config import read_config

    config, _ = read_config("run", flags.split(), "x", {})
    assert config != load_config(run) and check_same_run(run, config) == []


def test_override_goes_on_with_the_changed_configuration_and_records_it(run, capsys):
    assert resume("--override", "--epochs", "3", "--lr", "0.05") == 0
    output = capsys.readouterr().out
    changes = [
        "optim.epochs: 2 in the run, 3 asked for",
        "optim.lr: 0.1 in the run, 0.05 asked for",
    ]
    assert all(f"--override: {line}\n" in output for line in changes)
    assert epochs(run) == [1, 2, 3]
    config = load_config(run)
    assert (config.optim.epochs, config.optim.lr) == (3, 0.05)
    assert json.loads((run / "environment.json").read_text())["resumed"][0]["changes"] == changes
    # Later on the changed configuration is the run's own.
    assert check_same_run(run, config) == []
    start_record(run, config, "x", changes=[])
    assert "changes" not in json.loads((run / "environment.json").read_text())["resumed"][-1]


def test_overridden_settings_of_the_optimiser_take_effect(run, monkeypatch):
    seen = []
    real = Run.load_state_dict

    def load(self, state):
        real(self, state)
        seen.append({k: v for k, v in self.optimizer.param_groups[0].items() if k != "params"})

    monkeypatch.setattr(Run, "load_state_dict", load)
    assert resume("--override", "--momentum", "0.5", "--weight-decay", "0.25") == 0
    assert (seen[0]["momentum"], seen[0]["weight_decay"]) == (0.5, 0.25)


@pytest.mark.parametrize("flags", ["--width 2", "--model resnet18", "--optimizer adam"])
def test_override_cannot_change_what_the_state_is_made_of(run, capsys, flags):
    assert resume("--override", *flags.split()) == 2
    error = capsys.readouterr().err
    assert "a checkpoint cannot follow" in error and "--out" in error and error.count("\n") == 1


def test_override_of_the_networks_is_refused_when_loading(run, capsys):
    """A run without a revision model has no place for it, and the reverse has none to give."""
    config = load_config(run)
    (run / "config.json").unlink()
    values = replace(config, settings=replace(config.settings, revision=False))
    from cure_fast.config_json import to_dict

    (run / "config.json").write_text(json.dumps(to_dict(values)))
    state = load_checkpoint(run / "checkpoints")[0] | {"networks": {}, "policies": []}
    save_checkpoint(run / "checkpoints", 5, state, {})
    assert resume("--override", "--revision") == 2
    error = capsys.readouterr().err
    assert "another run or version" in error and "--out" in error and error.count("\n") == 1


@pytest.mark.parametrize("words", [["quickstart", "--override"], ["--override", "quickstart"]])
def test_override_needs_resume(tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *words]) == 2
    error = capsys.readouterr().err
    assert "--override" in error and "--resume" in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '{"resumed": 3}', "\u00e9", "[" * 100_000], ids=range(7)
)
def test_a_damaged_record_of_the_environment(run, capsys, text):
    (run / "environment.json").write_text(text, encoding="latin-1")
    assert resume() == 2
    error = capsys.readouterr().err
    assert "environment.json" in error and "Delete the file" in error and error.count("\n") == 1


def places(values, path=()):
    """The path of every value in nested tables and lists."""
    items = values.items() if isinstance(values, dict) else enumerate(values)
    for key, value in items:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


def put(values, path, value):
    *parents, last = path
    for key in parents:
        values = values[key]
    values[last] = value


CONFIG = json.loads((FORMAT_1 / "config.json").read_text())
MANIFEST = json.loads((FORMAT_1 / "checkpoints/checkpoint-000000003/manifest.json").read_text())


@given(data=st.data(), value=JSON)
def test_any_value_in_any_place_of_a_configuration(tmp_path_factory, data, value):
    values = copy.deepcopy(CONFIG)
    put(values, data.draw(st.sampled_from(list(places(CONFIG)))), value)
    expect_config_or_input_error(tmp_path_factory, json.dumps(values))


@given(text=st.one_of(JSON.map(json.dumps), st.text(), st.just("[" * 50_000 + "]" * 50_000)))
def test_any_text_as_a_configuration(tmp_path_factory, text):
    expect_config_or_input_error(tmp_path_factory, text)


def expect_config_or_input_error(tmp_path_factory, text):
    folder = tmp_path_factory.getbasetemp() / "configs"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        config = load_config(folder)
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000
    else:
        assert load_config(folder) == config or "NaN" in text


@given(data=st.data(), value=JSON)
def test_any_value_in_any_place_of_a_manifest(tmp_path_factory, data, value):
    folder = checkpoint_for_fuzzing(tmp_path_factory)
    original = json.loads((folder / "written.json").read_text())
    values = copy.deepcopy(original)
    put(values, data.draw(st.sampled_from(list(places(original)))), value)
    assume(json.dumps(values) != json.dumps(original))
    expect_reason(folder, json.dumps(values, indent=2) + "\n")


@given(text=st.one_of(JSON.map(json.dumps), st.text(), st.just("[" * 50_000 + "]" * 50_000)))
def test_any_text_as_a_manifest(tmp_path_factory, text):
    expect_reason(checkpoint_for_fuzzing(tmp_path_factory), text)


@given(data=st.data(), value=JSON)
def test_any_value_in_a_manifest_of_the_first_format(tmp_path_factory, data, value):
    folder = tmp_path_factory.getbasetemp() / "first" / "checkpoint-000000003"
    if not folder.exists():
        shutil.copytree(FORMAT_1 / "checkpoints/checkpoint-000000003", folder)
    values = copy.deepcopy(MANIFEST)
    name = data.draw(st.sampled_from(["format", "step", "bytes", "sha256"]))
    assume(json.dumps(value) != json.dumps(values[name]))
    expect_reason(folder, json.dumps(values | {name: value}))


def checkpoint_for_fuzzing(tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "second"
    if not folder.exists():
        folder.mkdir()
        path = save_checkpoint(folder, 1, {"model": {"w": torch.ones(3)}}, CONFIG)
        shutil.copy(path / "manifest.json", path / "written.json")
    return folder / "checkpoint-000000001"


def expect_reason(path, text):
    (path / "manifest.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    problem = check_checkpoint(path)
    assert problem and "\n" not in problem and len(problem) < 500
    output = io.StringIO()
    with (
        contextlib.redirect_stdout(output),
        pytest.raises(InputError, match="no valid checkpoint"),
    ):
        load_checkpoint(path.parent)
