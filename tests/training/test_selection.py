"""The best epoch: judged on held-out images alone, by robust accuracy, and its weights kept."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import tiny_step
from cure_fast.cli.evaluate import evaluate_folder
from cure_fast.config import MethodSettings
from cure_fast.config.arguments import EvalArgs
from cure_fast.errors import InputError, StoppedError
from cure_fast.files import file_hash
from cure_fast.loaders import read_dataset, split_train
from cure_fast.methods import METHODS
from cure_fast.models.weights import read_metadata, read_weights
from cure_fast.policies import POLICIES
from cure_fast.policies.average import EMA, frozen_copy
from cure_fast.runs.checkpoint import load_checkpoint
from cure_fast.runs.log import read_rows
from cure_fast.step.policy import Policy, PolicyInfo
from cure_fast.training import stages
from cure_fast.training.data import read_data
from cure_fast.training.job import train
from cure_fast.training.trainer import note_best
from tiny_job import stable_rows, tiny


def test_validation_sees_the_held_out_images_and_no_others(tmp_path, monkeypatch):
    real, seen = stages.evaluate, []

    def spy(model, images, labels, **options):
        seen.append((images.numpy().copy(), labels.numpy().copy()))
        return real(model, images, labels, **options)

    monkeypatch.setattr(stages, "evaluate", spy)
    config = tiny(tmp_path, data={"split_seed": 5})
    train(config)
    root = tmp_path / "data"
    whole = read_dataset("digits", root, "train", download=False)
    held_out = split_train(whole, train_images=96, val_images=20, seed=5)[1]
    assert len(seen) == 3  # one epoch of pre-training and two of CURE
    for images, labels in seen:
        assert np.array_equal(images, held_out.images) and np.array_equal(labels, held_out.labels)


def test_training_never_sees_a_held_out_or_test_image(tmp_path):
    data = read_data(tiny(tmp_path))
    train_set, val, test = (
        {image.tobytes() for image in part.images} for part in (data.train, data.val, data.test)
    )
    assert (len(data.train), len(data.val)) == (96, 20)
    assert not train_set & val and not train_set & test and not val & test


@pytest.mark.parametrize(
    ("method", "scores", "best"),
    [
        ("cure", [(90, 10), (80, 20), (70, 30)], 3),  # (natural, robust): robust decides
        ("trades", [(80, 30), (90, 20), (95, 10)], 1),
        ("pgd_at", [(80, 30), (85, 30), (82, 30)], 2),  # natural decides where robust is equal
        ("cure", [(80, 30), (80, 30), (80, 30)], 1),  # the first of equals stays
        ("natural", [(80, None), (90, None), (85, None)], 2),
        ("natural", [(90, None), (90, None), (85, None)], 1),
    ],
)
def test_the_best_epoch_of_scores(method, scores, best):
    run = SimpleNamespace(method=METHODS[method], best={}, epoch=0)
    improved = []
    for run.epoch, (natural, robust) in enumerate(scores, 1):
        if note_best(run, {"natural": natural, "robust": robust}):
            improved.append(run.epoch)
    natural, robust = scores[best - 1]
    assert run.best == {"model": (natural if robust is None else robust, natural, best)}
    assert improved[0] == 1 and improved[-1] == best


def test_each_network_has_a_best_epoch_of_its_own():
    run = SimpleNamespace(method=METHODS["trades"], best={}, epoch=0)
    found = []
    for run.epoch, (ours, raw) in enumerate([(10, 40), (30, 20), (20, 50), (30, 50)], 1):
        others = {"raw": {"natural": 60, "robust": raw}}
        found.append(note_best(run, {"natural": 50, "robust": ours, "networks": others}))
    assert found == [{"model", "raw"}, {"model"}, {"raw"}, set()]
    assert run.best == {"model": (30, 50, 2), "raw": (50, 60, 3)}


def scripted(monkeypatch, scores):
    """Let validation return the scores by epoch; return the weights it was shown, by epoch.

    Of networks beside the trained one the robust accuracies are mirrored around 50 percent.
    """
    shown = {}

    def validate(run, network, stage):
        shown[run.epoch] = {
            name: {k: v.detach().clone() for k, v in net.state_dict().items()}
            for name, net in run.all_networks.items()
        }
        natural, robust = scores.get((network, run.epoch)) or scores[run.epoch]
        return {"natural": natural, "robust": robust, "attack": "pgd1", "count": 20}

    monkeypatch.setattr(stages, "validate", validate)
    return shown


def same(path, state):
    saved = read_weights(path)
    assert saved.keys() == state.keys()
    return all(torch.equal(saved[name], state[name]) for name in saved)


@pytest.mark.parametrize(
    ("method", "scores", "best"),
    [
        ("cure", {1: (50.0, 10.0), 2: (60.0, 30.0), 3: (60.0, 30.0), 4: (90.0, 20.0)}, 2),
        ("cure", {1: (50.0, 10.0), 2: (60.0, 20.0), 3: (60.0, 30.0), 4: (55.0, 40.0)}, 4),
        ("natural", {1: (50.0, None), 2: (60.0, None), 3: (80.0, None), 4: (70.0, None)}, 3),
    ],
)
def test_the_saved_weights_are_the_best_epochs(tmp_path, monkeypatch, method, scores, best):
    shown = scripted(monkeypatch, scores)
    folder = train(tiny(tmp_path, method, epochs=4, pretrain={"pretrain_epochs": 0}))
    assert list(shown) == [1, 2, 3, 4]
    for epoch, state in shown.items():
        assert same(folder / "model.safetensors", state["model"]) is (epoch == best)
        if method == "cure":
            assert same(folder / "revision.safetensors", state["revision"]) is (epoch == best)
    results = json.loads((folder / "results.json").read_text())
    assert f"best epoch {best} of 4" in results["models"]["trained"]["title"]


def test_epochs_without_validation_cannot_be_the_best(tmp_path, monkeypatch):
    shown = scripted(monkeypatch, {2: (50.0, 40.0), 4: (50.0, 30.0), 5: (50.0, 20.0)})
    config = tiny(tmp_path, epochs=5, pretrain={"pretrain_epochs": 0}, eval={"val_every": 2})
    folder = train(config)
    assert list(shown) == [2, 4, 5]
    assert same(folder / "model.safetensors", shown[2]["model"])
    rows = [r for r in read_rows(folder / "metrics.jsonl") if r["event"] == "epoch"]
    assert [row["validation"] is not None for row in rows] == [False, True, False, True, True]


def test_the_best_survives_a_resumption(tmp_path, monkeypatch):
    config = tiny(tmp_path, epochs=3, pretrain={"pretrain_epochs": 0})
    shown = scripted(monkeypatch, {1: (50.0, 40.0), 2: (50.0, 30.0), 3: (50.0, 20.0)})
    real = stages.fit

    def stopped(run, log, *, validate, save, stop):
        # An epoch has three steps, 96 images in batches of 32, so the fifth is in the second.
        real(run, log, validate=validate, save=save, stop=lambda: run.step == 5)

    with monkeypatch.context() as patch:
        patch.setattr(stages, "fit", stopped)
        with pytest.raises(StoppedError):
            train(config)
    folder = train(config, resume=True)
    assert same(folder / "model.safetensors", shown[1]["model"])


def averaged(config, **evaluation):
    """The configuration with an average as its result."""
    return replace(config, policies={"ema": EMA.settings}, eval=replace(config.eval, **evaluation))


def test_an_average_that_is_the_result_decides_and_is_what_is_evaluated(
    tmp_path, monkeypatch, capsys
):
    robust = {"model": (40.0, 30.0, 20.0), "ema": (10.0, 25.0, 20.0)}
    scores = {(n, e): (50.0 + e, r) for n, rs in robust.items() for e, r in enumerate(rs, 1)}
    shown = scripted(monkeypatch, scores)
    config = tiny(tmp_path, "trades", epochs=3, pretrain={"pretrain_epochs": 0})
    folder = train(averaged(config, networks=("raw",)))
    assert same(folder / "model.safetensors", shown[2]["ema"])
    assert same(folder / "raw.safetensors", shown[1]["model"])
    assert not same(folder / "model.safetensors", shown[2]["model"])
    assert not (folder / "ema.safetensors").exists()
    rows = [r for r in read_rows(folder / "metrics.jsonl") if r["event"] == "epoch"]
    found = [(r["validation"]["network"], r["validation"]["robust"]) for r in rows]
    assert found == [("ema", 10.0), ("ema", 25.0), ("ema", 20.0)]
    raw = [r["validation"]["networks"]["raw"] for r in rows]
    assert [found["robust"] for found in raw] == [40.0, 30.0, 20.0]
    results = json.loads((folder / "results.json").read_text())
    titles = {name: entry["title"] for name, entry in results["models"].items()}
    assert titles == {
        "trained": "TRADES + EMA, ema network, best epoch 2 of 3",
        "raw": "raw network, best epoch 1 of 3",
    }
    of = {key: (entry["network"], entry["epoch"]) for key, entry in results["models"].items()}
    assert of == {"trained": ("ema", 2), "raw": ("raw", 1)}
    weights = {entry["weights"] for entry in results["models"].values()}
    assert weights == {file_hash(folder / f"{name}.safetensors") for name in ("model", "raw")}
    output = capsys.readouterr().out
    assert "ema natural 52.0 %  ema PGD-1 25.0 %  raw natural 52.0 %  raw PGD-1 30.0 %" in output
    lines = [
        line for line in output.splitlines() if "% under PGD-2 (" in line and "; float32" in line
    ]
    names = ["TRADES + EMA, ema network: ", "TRADES + EMA, raw network: "]
    assert [line.startswith(name) for line, name in zip(lines, names, strict=True)] == [True, True]


def test_a_network_that_is_evaluated_has_a_best_epoch_and_one_that_is_not_the_results(
    tmp_path, monkeypatch
):
    robust = {"model": (10.0, 30.0, 20.0), "revision": (50.0, 30.0, 40.0)}
    scores = {(n, e): (50.0, r) for n, rs in robust.items() for e, r in enumerate(rs, 1)}
    shown = scripted(monkeypatch, scores)
    config = tiny(tmp_path, epochs=3, pretrain={"pretrain_epochs": 0})
    own = train(replace(config, eval=replace(config.eval, networks=("revision",))))
    assert same(own / "model.safetensors", shown[2]["model"])
    assert same(own / "revision.safetensors", shown[1]["revision"])
    told = read_metadata(own / "revision.safetensors")
    assert (told["network"], told["epoch"]) == ("revision", "1")
    titles = [e["title"] for e in json.loads((own / "results.json").read_text())["models"].values()]
    assert titles == ["CURE, best epoch 2 of 3", "revision network, best epoch 1 of 3"]
    whole = train(replace(config, run=replace(config.run, out=str(tmp_path / "whole"))))
    assert same(whole / "revision.safetensors", shown[2]["revision"])
    evaluate_folder(whole, EvalArgs(networks=("revision",), attacks=("natural",)))
    entry = json.loads((whole / "results.json").read_text())["models"]["revision"]
    assert entry["title"] == "revision network, the result's best epoch 2 of 3"
    assert (entry["network"], entry["epoch"]) == ("revision", 2)


def test_a_checkpoint_of_an_earlier_version_knows_the_results_best_epoch_alone():
    for former, best in (((30.0, 50.0, 2), {"model": (30.0, 50.0, 2)}), (None, {})):
        run = tiny_step.tiny_run("trades", policies={"ema": EMA.settings})
        run.load_state_dict({**run.state_dict(), "best": former})
        assert run.best == best


class Acting(Policy):
    """Moves its average whenever the trained network was validated."""

    def __init__(self, run, settings):
        super().__init__()
        self.network = frozen_copy(run.model)
        self.networks = {"acting": self.network}
        self.state = {"acted": torch.zeros((), dtype=torch.int64)}

    def on_validation(self, run, found):
        # Of the ten classes, those that are among the twenty images.
        assert 5 < len(found["robust_by_class"]) <= 10
        self.state["acted"] += 1
        for own, trained in zip(self.network.parameters(), run.model.parameters(), strict=True):
            own.data.lerp_(trained.data, 0.5)


@pytest.mark.parametrize("at", ["acting", "revision"])
def test_a_stop_between_two_validations_lets_no_policy_act_twice(tmp_path, monkeypatch, at):
    info = PolicyInfo(
        name="acting",
        label="Acting",
        title="",
        paper="",
        settings=MethodSettings(),
        build=Acting,
        result="acting",
    )
    monkeypatch.setitem(POLICIES, "acting", info)

    def config(out):
        networks = {"networks": ("revision",)}
        chosen = tiny(tmp_path, "cure", out=out, pretrain={"pretrain_epochs": 0}, eval=networks)
        return replace(chosen, policies={"acting": info.settings})

    whole = train(config("whole"))
    real = stages.validate

    def stopped(run, network, stage):
        if (network, run.epoch) == (at, 1):
            raise StoppedError("between the two")
        return real(run, network, stage)

    with monkeypatch.context() as patch:
        patch.setattr(stages, "validate", stopped)
        with pytest.raises(StoppedError):
            train(config("broken"))
    broken = train(config("broken"), resume=True)
    for name in ("model", "raw", "revision"):
        assert same(broken / f"{name}.safetensors", read_weights(whole / f"{name}.safetensors"))
    assert stable_rows(broken) == stable_rows(whole)
    state, _ = load_checkpoint(broken / "checkpoints")
    assert state["policies"][-1]["acted"] == 2
    assert state["best"].keys() == {"model", "raw", "revision"}


def test_best_and_last_are_both_evaluated_with_their_difference(tmp_path, monkeypatch, capsys):
    shown = scripted(monkeypatch, {1: (50.0, 40.0), 2: (50.0, 30.0)})
    config = tiny(tmp_path, "trades", eval={"evaluate": ("best", "last")})
    folder = train(config)
    assert same(folder / "model.safetensors", shown[1]["model"])
    assert same(folder / "last.safetensors", shown[2]["model"])
    models = json.loads((folder / "results.json").read_text())["models"]
    assert {key: entry["title"] for key, entry in models.items()} == {
        "trained": "TRADES, best epoch 1 of 2",
        "start": "before TRADES (naturally trained)",
        "last": "TRADES, last epoch 2 of 2",
    }
    assert [models[key]["epoch"] for key in models] == [1, None, 2]
    best, last = (models[key]["attacks"]["pgd2"]["accuracy"] for key in ("trained", "last"))
    told = capsys.readouterr().out
    assert "last - best" in told and f"{last - best:+.1f}" in told
    # The start is no candidate, and the pre-training has no last epoch of interest.
    assert not [*(tmp_path / "cache").rglob("last.safetensors")]


def test_the_last_epoch_can_be_asked_for_once_a_run_has_ended(tmp_path, monkeypatch):
    shown = scripted(monkeypatch, {1: (50.0, 40.0), 2: (50.0, 30.0)})
    config = averaged(tiny(tmp_path, "trades", pretrain={"pretrain_epochs": 0}))
    folder = train(config)
    last = folder / "last.safetensors"
    assert not last.exists()
    evaluate_folder(folder, EvalArgs(evaluate=("last", "best"), attacks=("natural",)))
    assert same(last, shown[2]["ema"])
    record = json.loads((folder / "results.json").read_text())["models"]
    assert (record["last"]["network"], record["last"]["epoch"]) == ("ema", 2)
    assert record["trained"]["epoch"] == 1 and set(record["trained"]["attacks"]) > {"natural"}
    first = last.read_bytes()
    last.unlink()
    train(averaged(config, evaluate=("best", "last")), resume=True)
    assert same(last, shown[2]["ema"]) and read_metadata(last)["epoch"] == "2"
    # A file of before the run was made longer is not taken for that of its end.
    longer = replace(config, optim=replace(config.optim, epochs=3))
    shown = scripted(monkeypatch, {3: (50.0, 35.0)})
    train(averaged(longer), resume=True, override=True)
    assert last.read_bytes() == first
    evaluate_folder(folder, EvalArgs(evaluate=("best", "last"), attacks=("natural",)))
    assert same(last, shown[3]["ema"])


def test_the_last_epoch_alone_is_the_result_and_the_best_is_kept(tmp_path, monkeypatch):
    shown = scripted(monkeypatch, {1: (50.0, 40.0), 2: (50.0, 30.0)})
    config = tiny(tmp_path, "trades", pretrain={"pretrain_epochs": 0}, eval={"evaluate": ("last",)})
    folder = train(config)
    assert same(folder / "model.safetensors", shown[1]["model"])
    (entry,) = json.loads((folder / "results.json").read_text())["models"].values()
    assert entry["title"] == "TRADES, last epoch 2 of 2"
    assert entry["weights"] == file_hash(folder / "last.safetensors")


def test_a_run_that_has_not_ended_has_no_last_epoch(tmp_path, monkeypatch):
    config = tiny(tmp_path, "trades", pretrain={"pretrain_epochs": 0})
    real = stages.fit

    def stopped(run, log, *, validate, save, stop):
        real(run, log, validate=validate, save=save, stop=lambda: run.step == 5)

    monkeypatch.setattr(stages, "fit", stopped)
    with pytest.raises(StoppedError):
        train(config)
    with pytest.raises(InputError, match="--evaluate last: the newest checkpoint is in epoch 2 of"):
        evaluate_folder(tmp_path / "run", EvalArgs(evaluate=("last",)))
    assert not (tmp_path / "run/last.safetensors").exists()


@pytest.mark.parametrize(
    ("policies", "networks", "told"),
    [
        ((), ("raw",), "--networks: this run has no network 'raw'; it has no further one."),
        (
            ("ema",),
            ("raw", "ema"),
            "ema is the run's result, which is attacked anyway; leave it out.",
        ),
    ],
)
def test_networks_that_the_run_will_not_have_are_refused_before_anything_is_written(
    tmp_path, policies, networks, told
):
    config = tiny(tmp_path, "trades", eval={"networks": networks})
    config = replace(config, policies={name: POLICIES[name].settings for name in policies})
    with pytest.raises(InputError, match=re.escape(told)):
        train(config)
    assert not (tmp_path / "run").exists()
