"""The best epoch: judged on held-out images alone, by robust accuracy, and its weights kept."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cure_fast.errors import StoppedError
from cure_fast.loaders import read_dataset, split_train
from cure_fast.methods import METHODS
from cure_fast.models.weights import read_weights
from cure_fast.runs.log import read_rows
from cure_fast.training import stages
from cure_fast.training.data import read_data
from cure_fast.training.job import train
from cure_fast.training.trainer import note_best
from tiny_job import tiny


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
    run = SimpleNamespace(method=METHODS[method], best=None, epoch=0)
    improved = []
    for run.epoch, (natural, robust) in enumerate(scores, 1):
        if note_best(run, {"natural": natural, "robust": robust}):
            improved.append(run.epoch)
    natural, robust = scores[best - 1]
    assert run.best == (natural if robust is None else robust, natural, best)
    assert improved[0] == 1 and improved[-1] == best


def scripted(monkeypatch, scores):
    """Let validation return the scores by epoch; return the weights it was shown, by epoch."""
    shown = {}

    def validate(run, val, stop):
        networks = {"model": run.model, **run.networks}
        shown[run.epoch] = {
            name: {k: v.detach().clone() for k, v in net.state_dict().items()}
            for name, net in networks.items()
        }
        natural, robust = scores[run.epoch]
        return {"natural": natural, "robust": robust, "attack": "pgd1", "count": len(val)}

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
