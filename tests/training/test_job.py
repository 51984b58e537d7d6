"""The main job end to end on the digits: record, reproducibility, resumption, stages, faults."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import tiny_step
from cure_fast.engine import eager
from cure_fast.errors import DivergedError, InputError, StoppedError
from cure_fast.files import locked
from cure_fast.methods import METHODS
from cure_fast.models.weights import read_weights
from cure_fast.policies import POLICIES, select_policies
from cure_fast.policies.average import Average
from cure_fast.runs.checkpoint import save_checkpoint
from cure_fast.runs.folder import load_config
from cure_fast.runs.log import read_rows
from cure_fast.signals import StopSignals
from cure_fast.step.policy import Policy
from cure_fast.training import job, plan, stages
from cure_fast.training.job import train
from cure_fast.training.opening import opening
from killing import same_end
from moments import hold_at
from processes import start
from tiny_command import checkpoints, differences
from tiny_job import same_weights, stable_rows, tiny


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Finished runs of one epoch and of two, and their cache, to be copied."""
    folder = tmp_path_factory.mktemp("made")
    for epochs in (1, 2):
        train(tiny(folder, out=str(epochs), epochs=epochs))
    return folder


@pytest.fixture
def finished(made, tmp_path):
    """Return a config and its finished run, by the number of epochs."""

    def copied(epochs, out="run"):
        for source, target in (("cache", "cache"), (str(epochs), out)):
            shutil.copytree(made / source, tmp_path / target, symlinks=True, dirs_exist_ok=True)
        return tiny(tmp_path, out=out, epochs=epochs), tmp_path / out

    return copied


def test_a_run_leaves_the_whole_record(tmp_path, capsys):
    config = tiny(tmp_path, eval={"networks": ("revision",)})
    folder = train(config)
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "checkpoints",
        "config.json",
        "console.log",
        "environment.json",
        "evaluation",
        "examples.npz",
        "metrics.csv",
        "metrics.jsonl",
        "model.safetensors",
        "report.html",
        "results.json",
        "run.lock",
        "revision.safetensors",
        "start.safetensors",
    }
    assert load_config(folder) == config
    results = json.loads((folder / "results.json").read_text())
    assert list(results["models"]) == ["trained", "start", "revision"]
    for entry in results["models"].values():
        assert {a["count"] for a in entry["attacks"].values()} == {24}
    rows = read_rows(folder / "metrics.jsonl")
    assert [(r["stage"], r["epoch"]) for r in rows if r["event"] == "epoch"] == [
        ("pretrain", 1),
        ("train", 1),
        ("train", 2),
    ]
    last = rows[-1]
    terms = {"total", "natural_ce", "adversarial_ce", "kl", "consistency"}
    measured = {"natural_accuracy", "adversarial_accuracy", "gradient_norm"}
    assert set(last["terms"]) == terms | measured
    assert last["validation_seconds"] > 0 and last["terms"]["gradient_norm"] > 0
    assert "linear.weight" not in last["movement"] and "conv1.weight" in last["movement"]
    with np.load(folder / "examples.npz") as arrays:
        assert arrays["natural"].shape == arrays["trained_adversarial"].shape
    output = capsys.readouterr().out
    assert "train epoch   2/2" in output and "report:" in output
    assert "CURE: " in output and "before CURE: " in output and "% under PGD-2 (" in output
    kept = (folder / "console.log").read_text()
    opened, rest = kept.split("\n", 1)
    assert opened == opening(config) and rest == output


def test_the_same_seed_gives_the_same_run_and_another_gives_another(tmp_path, finished):
    _, a = finished(1, "a")
    # Another natural start, not that of the cache.
    b = train(tiny(tmp_path, out="b", epochs=1, run={"cache": str(tmp_path / "other")}))
    assert same_weights(a, b) and stable_rows(a)[1:] == stable_rows(b)[1:]
    c = train(tiny(tmp_path, out="c", epochs=1, run={"seed": 1}))
    assert not same_weights(a, c)


def test_another_loader_trains_the_same_weights(tmp_path, finished):
    _, resident = finished(1)
    other = train(tiny(tmp_path, out="torch", epochs=1, data={"loader": "torch", "workers": 1}))
    assert same_weights(resident, other)


class StopAfter(StopSignals):
    """Asks for a stop once the step ``number``, from 1, of a stage is done."""

    def __init__(self, number, monkeypatch):
        super().__init__()
        self.came = False
        real = eager.train_step

        def watched(run, batch):
            self.came = run.step + 1 == number
            return real(run, batch)

        monkeypatch.setattr(eager, "train_step", watched)

    def __call__(self):
        return self.came


def train_in_two_parts(config, monkeypatch, *, stop_in=4, ends=(4, 6)):
    """Stop a run of two epochs in the middle of the second one, and resume it."""
    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        train(config, stop=StopAfter(stop_in, patch))
    folder = train(config, resume=True)
    assert checkpoints(folder)[-2:] == [*ends]
    return folder


def assert_resumes(tmp_path, method, policies, monkeypatch):
    """Compare weights, metrics and the last state of a run with those of one in two parts.

    Two steps an epoch, and nothing besides training: estimates, attacks and pages are the same for
    all methods.
    """
    monkeypatch.setattr(plan, "epoch_costs", lambda config: [1.0] * config.optim.epochs)
    for name in ("time_passes", "tell_end"):
        monkeypatch.setattr(job, name, lambda *_, **__: None)
    monkeypatch.setattr(job, "measure_run", lambda *_: ({}, {}))
    monkeypatch.setattr(job, "keep_results", lambda *_: SimpleNamespace(record=None))
    small = {"data": {"train_images": 32}, "model": {"width": 4}, "optim": {"batch_size": 16}}
    whole, broken = (
        select_policies(tiny(tmp_path, method, out=out, **small), policies)
        for out in ("whole", "broken")
    )
    whole = train(whole)
    resumed = train_in_two_parts(broken, monkeypatch, stop_in=3, ends=(3, 4))
    assert same_weights(whole, resumed) and same_end(whole, resumed)
    # The broken run took its natural start from the cache, as the whole one had made it.
    assert stable_rows(whole) == stable_rows(resumed)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_resumes_to_the_same_weights(tmp_path, method, monkeypatch):
    assert_resumes(tmp_path, method, tiny(tmp_path, method).policies, monkeypatch)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_trains_and_resumes_to_the_same_weights(tmp_path, policy, monkeypatch):
    assert_resumes(tmp_path, "trades", [policy], monkeypatch)


def test_every_policy_is_resumed_above():
    runs = [
        *(tiny_step.tiny_run(method) for method in METHODS),
        *(tiny_step.tiny_run("natural", policies={n: i.settings}) for n, i in POLICIES.items()),
    ]
    used = {type(policy) for run in runs for policy in run.policies}
    kinds = [*Policy.__subclasses__(), *Average.__subclasses__()]
    assert used == {kind for kind in kinds if kind.__module__.startswith("cure_fast")}


RESUMED = {
    "revision before the loss": {
        "revision_order": "before",
        "revision_buffers": "average",
        "revision_mode": "eval",
        "revision_rate": 0.7,
        "freeze": "hard",
    },
    "prominence": {
        "mask_scope": "global",
        "update": "prominence",
        "score_loss": "kl",
        "revision_rate": 0.7,
        "revision_rate_decay": "halve",
    },
}
# Their state is another, or is only there with them.
RESUMED_OPTIMISERS = {"adam": {"optimizer": "adam", "lr": 0.01}, "loss scale": {}}


@pytest.mark.parametrize("case", [*RESUMED, *RESUMED_OPTIMISERS])
def test_settings_that_change_state_or_order_resume_to_the_same_weights(
    tmp_path, case, monkeypatch
):
    real = stages.build_run

    def scaled(*arguments):
        run = real(*arguments)
        # Factors that are no powers of two: another scale rounds otherwise, and so is seen.
        run.scaler = torch.amp.GradScaler(
            "cpu", init_scale=777.0, growth_factor=1.7, growth_interval=2
        )
        return run

    if case == "loss scale":
        monkeypatch.setattr(stages, "build_run", scaled)
    sections = {
        "settings": RESUMED.get(case, {}),
        "optim": RESUMED_OPTIMISERS.get(case, {}),
        "pretrain": {"pretrain_epochs": 0},
    }
    whole = train(tiny(tmp_path, out="whole", **sections))
    resumed = train_in_two_parts(tiny(tmp_path, out="broken", **sections), monkeypatch)
    assert differences(whole, resumed) == [] and same_end(whole, resumed)


def test_a_signal_saves_and_stops(tmp_path, monkeypatch):
    real = stages.build_run

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    config = tiny(tmp_path, pretrain={"pretrain_epochs": 0})
    monkeypatch.setattr(stages, "build_run", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StoppedError):
        train(config)
    assert signal.getsignal(signal.SIGTERM) is before
    names = {p.name for p in (tmp_path / "run/checkpoints").iterdir()}
    assert "checkpoint-000000001" in names


def test_pre_training_is_taken_from_the_cache(tmp_path, finished, capsys):
    finished(1, "a")
    capsys.readouterr()
    train(tiny(tmp_path, "trades", out="b", epochs=1))
    assert "pre-trained earlier" in capsys.readouterr().out
    stages = [r["stage"] for r in read_rows(tmp_path / "b/metrics.jsonl")]
    assert stages[0] == "pretrain" and stages[-1] == "train"


def test_init_from_takes_the_place_of_pre_training(tmp_path, capsys):
    first = train(tiny(tmp_path, "natural", out="a", epochs=1))
    capsys.readouterr()
    config = tiny(tmp_path, out="b", model={"init_from": str(first / "model.safetensors")})
    second = train(config)
    start, given = (
        read_weights(p) for p in (second / "start.safetensors", first / "model.safetensors")
    )
    assert all(torch.equal(start[k], given[k]) for k in given)
    assert "pretrain epoch" not in capsys.readouterr().out


def test_given_weights_are_needed_once_and_may_lie_below_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    given = tmp_path / "given.safetensors"
    first = train(tiny(tmp_path, "natural", out="a", epochs=1))
    (first / "model.safetensors").rename(given)
    config = tiny(tmp_path, out="b", model={"init_from": "~/given.safetensors"})
    folder = train(config)
    given.unlink()
    assert train(config, resume=True) == folder


def test_training_from_scratch_has_no_start(tmp_path):
    folder = train(tiny(tmp_path, "trades", epochs=1, pretrain={"pretrain_epochs": 0}))
    results = json.loads((folder / "results.json").read_text())
    assert list(results["models"]) == ["trained"]


def test_another_configuration_cannot_resume(tmp_path, finished):
    finished(1)
    with pytest.raises(InputError, match=r"optim\.lr: 0\.1 in the run, 0\.2 asked for"):
        train(tiny(tmp_path, epochs=1, optim={"lr": 0.2}), resume=True)
    with pytest.raises(InputError, match=r"settings\.beta"):
        train(tiny(tmp_path, epochs=1, settings={"beta": 1.0}), resume=True)


def test_a_finished_run_resumes_to_its_results(tmp_path, finished):
    _, folder = finished(1)
    before = (folder / "model.safetensors").read_bytes()
    (folder / "report.html").unlink()
    assert train(tiny(tmp_path, epochs=1, data={"loader": "torch"}), resume=True) == folder
    assert (folder / "report.html").exists()
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_folder_with_a_run_is_not_written_over(finished):
    config, _ = finished(1)
    with pytest.raises(InputError, match="new or empty"):
        train(config)


def test_divergence_is_named_with_advice(tmp_path):
    with pytest.raises(DivergedError, match=r"not finite.*--lr"):
        train(
            tiny(
                tmp_path,
                "pgd_at",
                optim={"lr": 1000.0, "schedule": "constant"},
                epochs=30,
                pretrain={"pretrain_epochs": 0},
            )
        )


def test_damaged_checkpoints_are_skipped_and_said(finished, capsys):
    config, folder = finished(2)
    newest = sorted((folder / "checkpoints").iterdir())[-1] / "state.pt"
    newest.write_bytes(newest.read_bytes()[:100])
    train(config, resume=True)
    assert "skipped checkpoint-000000006" in capsys.readouterr().out


def test_a_checkpoint_of_another_model_is_refused(finished):
    config, folder = finished(1)
    save_checkpoint(folder / "checkpoints", 99, {"model": {}}, {})
    with pytest.raises(InputError, match="another run or version"):
        train(config, resume=True)


def test_a_run_killed_before_its_first_checkpoint_resumes(finished):
    _, whole = finished(1, "whole")
    config, folder = finished(1)
    for path in (folder / "checkpoints").iterdir():
        path.rename(path.with_name(f".tmp-{path.name}"))
    assert same_weights(whole, train(config, resume=True))


def test_what_a_killed_run_left_unfinished_goes(tmp_path, finished):
    config, folder = finished(1)
    (cached,) = (tmp_path / "cache/pretrained").iterdir()
    (folder / "start.safetensors").unlink()
    left = [place / ".123.tmp-x" for place in (folder, folder / "evaluation/trained", cached)]
    others = [place / ".own.tmp-x" for place in (folder, cached)]
    for path in left + others:
        path.write_text("x")
    train(config, resume=True)
    assert not any(path.exists() for path in left) and all(path.exists() for path in others)


def test_a_cut_off_pre_training_starts_anew(tmp_path, finished):
    _, whole = finished(1, "whole")
    (cached,) = (tmp_path / "cache/pretrained").iterdir()
    (cached / "done").unlink()
    (cached / "checkpoints/.tmp-checkpoint-000000001").mkdir(parents=True)
    assert same_weights(whole, train(tiny(tmp_path, epochs=1)))


def test_a_folder_in_use_is_refused(finished):
    config, folder = finished(1)
    with (
        locked(folder / "run.lock"),
        pytest.raises(InputError, match="another process is running"),
    ):
        train(config, resume=True)


def test_two_runs_at_once_share_one_natural_start(tmp_path):
    words = (
        "train quickstart --train-images 96 --val-images 20 --width 4 --pretrain-epochs 2 "
        "--epochs 1 --attack-steps 1 --attacks natural --limit 20 --loader resident --cache cache "
        "--no-tensorboard --device cpu"
    ).split()
    # The first to pre-train waits until the other has asked for the same.
    prepare = partial(hold_at, "cure_fast.engine.eager:train_step", 1, tmp_path / "go")
    both = [start(words, tmp_path, prepare=prepare) for _ in range(2)]
    while not any("waiting for another run" in run.output() for run in both):
        assert not any(run.ended() for run in both), [run.output() for run in both]
        time.sleep(0.02)
    (tmp_path / "go").touch()
    codes = [run.wait() for run in both]
    assert codes == [0, 0], [run.output() for run in both]
    folders = sorted((tmp_path / "runs").iterdir())
    assert len(folders) == 2 and same_weights(*folders)
    for folder in folders:
        rows = [r for r in read_rows(folder / "metrics.jsonl") if r["event"] == "epoch"]
        assert [r["epoch"] for r in rows if r["stage"] == "pretrain"] == [1, 2]


def test_bad_weights_to_start_from_leave_no_folder(tmp_path):
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"no weights")
    with pytest.raises(InputError, match="bad"):
        train(tiny(tmp_path, model={"init_from": str(bad)}))
    assert not (tmp_path / "run").exists()
