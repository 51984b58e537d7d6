"""Resuming with another configuration, an older or newer format, and files that are not theirs."""

from __future__ import annotations

import json
import math
import shutil
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch

from cure_fast.cli.main import main
from cure_fast.errors import InputError
from cure_fast.files import locked
from cure_fast.models.weights import read_metadata, read_weights
from cure_fast.runs.checkpoint import check_checkpoint, load_checkpoint, save_checkpoint
from cure_fast.runs.environment import environment
from cure_fast.runs.folder import check_position, check_same_run, load_config, start_record
from cure_fast.runs.log import read_rows
from cure_fast.step.state import TrainState
from cure_fast.training import job, stages

# A run of the code that wrote format 1, stopped in the middle of its second epoch of two.
FORMAT_1 = Path(__file__).parent / "data" / "run-format-1"


pytestmark = pytest.mark.usefixtures("short_pictures")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A copy of the stopped run, in the current folder."""
    monkeypatch.chdir(tmp_path)
    folder = Path(shutil.copytree(FORMAT_1, tmp_path / "run")).relative_to(tmp_path)
    # Two threads wait for one another longer than its layers take.
    change_environment(folder, threads=1)
    return folder


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """The stopped run and what it becomes when it is finished: code, output and error."""
    folder = Path(shutil.copytree(FORMAT_1, tmp_path_factory.mktemp("ended") / "run"))
    change_environment(folder, threads=1)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as output:
        patch.chdir(folder.parent)
        with redirect_stderr(StringIO()) as error:
            code = resume()
    return folder, code, output.getvalue(), error.getvalue()


@pytest.fixture
def finished(ended, tmp_path, monkeypatch):
    """A copy of the run that has been finished, in the current folder."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(ended[0], tmp_path / "run", symlinks=True)).relative_to(tmp_path)


@pytest.fixture
def no_steps(monkeypatch):
    """End each training where its first step would be, when it has been taken up and recorded."""

    def enough(*_arguments, **_settings):
        raise InputError("far enough")

    monkeypatch.setattr(stages, "fit", enough)


def resume(*words):
    return main(["train", "run", "--resume", "--device", "cpu", *words])


def record_of(run):
    return [(run / name).read_bytes() for name in ("config.json", "environment.json")]


def epochs(run):
    rows = read_rows(run / "metrics.jsonl")
    return [r["epoch"] for r in rows if r["event"] == "epoch" and r["stage"] == "train"]


def test_a_run_of_the_first_format_is_finished_by_resume(ended):
    run, code, output, error = ended
    assert code == 0
    before = read_weights(run / "start.safetensors")
    assert "resumed after step 3" in output and "skipped" not in output + error and "2/2" in output
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


def test_an_older_checkpoint_is_taken_where_the_newest_is_of_a_newer_format(run, capsys, no_steps):
    path = run / "checkpoints/checkpoint-000000003/manifest.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 99'))
    assert resume() == 2
    output, error = capsys.readouterr()
    assert "far enough" in error
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
    from cure_fast.cli.configure import read_config

    config, _ = read_config("run", flags.split(), "x", {})
    assert config != load_config(run) and check_same_run(run, config) == {}


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
    assert check_same_run(run, config) == {}
    start_record(run, config, "x", device=torch.device("cpu"), changes=[])
    assert "changes" not in json.loads((run / "environment.json").read_text())["resumed"][-1]


def test_overridden_settings_of_the_optimiser_take_effect(run, monkeypatch, no_steps):
    seen = []
    real = TrainState.load_state_dict

    def load(self, state):
        real(self, state)
        seen.append({k: v for k, v in self.optimizer.param_groups[0].items() if k != "params"})

    monkeypatch.setattr(TrainState, "load_state_dict", load)
    assert resume("--override", "--momentum", "0.5", "--weight-decay", "0.25") == 2
    assert (seen[0]["momentum"], seen[0]["weight_decay"]) == (0.5, 0.25)


FIXED = ["--width 2", "--model resnet18", "--optimizer adam", "--normalize dataset", "--amp fp16"]
FIXED += ["--method trades", "--no-revision", "--no-rgp", "--natural-share 0.5"]
FIXED += ["--policies piat", "--policies awp,ema"]


@pytest.mark.parametrize("flags", FIXED)
def test_override_cannot_change_what_the_state_is_made_of(run, capsys, flags):
    before = record_of(run)
    assert resume("--override", *flags.split()) == 2
    error = capsys.readouterr().err
    assert "a checkpoint cannot follow" in error and "--out" in error and error.count("\n") == 1
    assert record_of(run) == before


@pytest.fixture
def with_policies(tmp_path, monkeypatch):
    """A finished run of one epoch with two policies, as ``run`` in the current folder."""
    monkeypatch.chdir(tmp_path)
    words = "--method pgd_at --policies piat,awp --awp-gamma 0.01 --pretrain-epochs 0 --epochs 1 "
    words += "--train-images 40 --val-images 20 --width 4 --batch-size 20 --attack-steps 1 "
    words += "--attacks natural --limit 10 --loader resident --device cpu --no-tensorboard"
    assert main(["train", "quickstart", "--out", "run", *words.split()]) == 0
    return Path("run")


def test_a_checkpoint_follows_no_other_set_of_policies(with_policies, capsys):
    before = record_of(with_policies)
    for words in ("none", "piat", "awp,piat", "piat,awp,ema"):
        assert resume("--override", "--epochs", "2", "--policies", words) == 2
        error = capsys.readouterr().err
        assert "a checkpoint cannot follow policies: ['piat', 'awp'] in the run" in error
        assert error.count("\n") == 1
    assert resume("--override", "--epochs", "2", "--piat-buffers", "keep") == 2
    assert "cannot follow policies.piat_buffers: 'interpolate'" in capsys.readouterr().err
    assert record_of(with_policies) == before


def test_settings_of_a_policy_change_with_override_alone(with_policies, capsys):
    words = ["--epochs", "2", "--awp-gamma", "0.02"]
    assert resume(*words) == 2
    assert "policies.awp_gamma: 0.01 in the run, 0.02 asked for" in capsys.readouterr().err
    assert resume("--override", *words) == 0
    assert "--override: policies.awp_gamma: 0.01 in the run" in capsys.readouterr().out
    config = load_config(with_policies)
    assert list(config.policies) == ["piat", "awp"] and config.policies["awp"].awp_gamma == 0.02
    assert epochs(with_policies) == [1, 2]


MID_EPOCH = ["--batch-size 10", "--train-images 60", "--val-images 10", "--seed 1"]


@pytest.mark.parametrize("flags", [*MID_EPOCH, "--split-seed 1"])
def test_batches_cannot_change_in_the_middle_of_an_epoch(run, capsys, flags):
    before = record_of(run)
    assert resume("--override", *flags.split()) == 2
    error = capsys.readouterr().err
    name = flags.split()[0].removeprefix("--").replace("-", "_")
    assert f".{name} can change only between two epochs" in error and error.count("\n") == 1
    assert "after batch 1 of one" in error and record_of(run) == before


def test_a_refused_override_leaves_a_run_that_can_be_resumed(run, capsys):
    before = record_of(run)
    assert resume("--override", "--batch-size", "10", "--lr", "0.2") == 2
    assert record_of(run) == before and not (run / "results.json").exists()
    capsys.readouterr()
    assert resume() == 0
    assert "resumed after step 3" in capsys.readouterr().out and epochs(run) == [1, 2]
    values = json.loads(before[0])
    assert load_config(run).optim.lr == values["optim"]["lr"]
    assert "changes" not in json.loads((run / "environment.json").read_text())["resumed"][0]


def test_an_override_before_the_first_checkpoint_is_recorded_at_once(run, monkeypatch):
    """A run that ends before its first checkpoint is resumed with what was asked for last."""
    shutil.rmtree(run / "checkpoints")
    seen = []

    def killed(stage, model):
        seen.append(load_config(run).optim.lr)
        raise InputError("ended")

    monkeypatch.setattr(job, "take_start", killed)
    assert resume("--override", "--lr", "0.2") == 2
    assert seen == [0.2] and load_config(run).optim.lr == 0.2


def test_a_run_with_other_batches_between_two_epochs_keeps_its_schedule(finished):
    """Four epochs of four smaller steps each, two of them behind it after only four large steps."""
    run = finished
    flags = ["--epochs", "4", "--batch-size", "10", "--schedule", "cosine", "--log-every", "1"]
    assert resume("--override", *flags) == 0
    rows = [r for r in read_rows(run / "metrics.jsonl") if r["stage"] == "train"]
    rates = [r["lr"] for r in rows if r["event"] == "step" and r["step"] >= 4]
    expected = [0.1 * (1 + math.cos(math.pi * step / 16)) / 2 for step in range(8, 16)]
    assert rates == pytest.approx(expected, rel=1e-12)
    assert [r["epoch"] for r in rows if r["event"] == "step"][-1] == pytest.approx(3.75)
    assert epochs(run) == [1, 2, 3, 4]


@pytest.mark.parametrize("flags", ["--val-every 2", "--val-attack-steps 5", "--deterministic"])
def test_what_decides_the_best_epoch_and_the_bits_is_bound(run, capsys, flags):
    assert resume(*flags.split()) == 2
    error = capsys.readouterr().err
    name = flags.split()[0].removeprefix("--").replace("-", "_")
    assert f".{name}: " in error and "add --override" in error and error.count("\n") == 1


def change_environment(run, **values):
    path = run / "environment.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_run_of_another_type_of_device_is_left_as_it_is(run, capsys, no_steps):
    change_environment(run, device="cuda")
    before = record_of(run)
    assert resume() == 2
    error = capsys.readouterr().err
    assert "this run was trained on cuda" in error and "there" in error and error.count("\n") == 1
    assert record_of(run) == before
    change_environment(run, resumed=[{"device": "cpu"}])
    assert resume() == 2
    assert "far enough" in capsys.readouterr().err


def test_another_version_is_told_of(run, capsys, no_steps):
    here = environment()
    change_environment(run, torch="0.0.1", cure_fast="0.0.2")
    change_environment(run, gpu="another, which this run does not use")
    assert resume() == 2
    error = capsys.readouterr().err
    for name, then in (("torch", "0.0.1"), ("cure_fast", "0.0.2")):
        assert f"{name} {then} then and {here[name]} now" in error
    assert "last bits" in error and error.count("goes on with") == 1 and "gpu" not in error
    # Recorded by now.
    assert resume() == 2
    error = capsys.readouterr().err
    assert "far enough" in error and "last bits" not in error


def test_batches_may_change_between_two_epochs_alone():
    check_position(["optim.batch_size"], batch=0)
    check_position(["optim.lr"], batch=1)
    with pytest.raises(InputError, match="after batch 1"):
        check_position(["optim.lr", "optim.batch_size"], batch=1)


COMMANDS = {
    "train run --resume --device cpu": (2, "running in it. Wait"),
    "eval run --device cpu": (2, "running in it. Wait"),
    "report run": (2, "running in it. It writes its report"),
    "export run": (0, ""),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_on_a_run_that_another_process_holds(run, capsys, command):
    shutil.copy(run / "start.safetensors", run / "model.safetensors")
    code, told = COMMANDS[command]
    with locked(run / "run.lock"):
        before = sorted(p for p in run.rglob("*") if "export" not in p.parts)
        record = record_of(run)
        assert main(command.split()) == code
        assert sorted(p for p in run.rglob("*") if "export" not in p.parts) == before
        assert record_of(run) == record
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == (code != 0)


@pytest.mark.parametrize("command", ["eval run --device cpu --limit 5", "report run"])
def test_commands_let_go_of_a_run(run, command):
    shutil.copy(run / "start.safetensors", run / "model.safetensors")
    for _ in range(2):
        assert main(command.split()) == 0
    with locked(run / "run.lock"):
        assert (run / "report.html").exists()


def test_an_override_is_not_recorded_where_the_checkpoint_does_not_fit(run, capsys):
    """A run with a revision model finds none in the checkpoint."""
    state = load_checkpoint(run / "checkpoints")[0] | {"networks": {}, "policies": []}
    save_checkpoint(run / "checkpoints", 5, state, {})
    before = record_of(run)
    assert resume("--override", "--lr", "0.2") == 2
    assert record_of(run) == before
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


def test_a_run_that_has_ended_takes_no_other_settings(finished, capsys):
    run = finished
    before = (run / "config.json").read_bytes()
    leftover = run / "checkpoints/.tmp-latest"
    leftover.symlink_to("checkpoint-000000001")
    assert resume("--override", "--lr", "0.05") == 2
    assert "nothing is left to train with optim.lr" in capsys.readouterr().err
    assert (run / "config.json").read_bytes() == before
    # A refused command changes nothing; one that goes on clears up.
    assert leftover.is_symlink()
    assert resume() == 0 and not leftover.is_symlink()


def test_another_radius_chooses_the_best_epoch_anew(finished, capsys):
    run = finished
    config = load_config(run)
    more = str(config.optim.epochs + 1)
    assert resume("--override", "--eps", "1e-6", "--step-size", "1e-6", "--epochs", more) == 0
    assert "chosen anew" in capsys.readouterr().out
    assert read_metadata(run / "model.safetensors")["epoch"] == more
