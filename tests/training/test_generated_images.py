"""A run with generated images: recorded, resumed as if never stopped, and refused other files."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from cure_fast.errors import InputError, StoppedError
from cure_fast.loaders import generated_hash
from cure_fast.training import trainer
from cure_fast.training.job import train
from cure_fast.training.stages import natural_stage
from tiny_job import same_weights, stable_rows, tiny


def made(path, seed=0, count=60):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    np.savez(path, image=images, label=rng.integers(0, 10, count))
    return f"npz:{path}"


class StopAfter:
    """Says stop when it has been asked so often."""

    def __init__(self, number):
        self.left = number

    def __call__(self):
        self.left -= 1
        return self.left < 0


@pytest.mark.parametrize("method", ["te", "fgsm_pgi"])
def test_a_resumed_run_is_that_of_an_unbroken_one(tmp_path, monkeypatch, method):
    """With methods that remember something of each image, generated ones too."""
    name = made(tmp_path / "made.npz")
    options = {"data": {"aux": name}, "pretrain": {"pretrain_epochs": 0}}
    whole, cut = (tiny(tmp_path, method, out=out, **options) for out in ("whole", "cut"))
    train(whole)
    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        # In the middle of the second epoch of three steps each.
        steps, epoch = StopAfter(4), trainer.train_epoch
        patch.setattr(trainer, "train_epoch", lambda run, log, stop: epoch(run, log, steps))
        train(cut)
    # Moved, it is the same file.
    moved = tmp_path / "moved.npz"
    (tmp_path / "made.npz").rename(moved)
    cut = replace(cut, data=replace(cut.data, aux=f"npz:{moved}"))
    made(tmp_path / "made.npz", seed=1)
    other = replace(cut, data=replace(cut.data, aux=name))
    with pytest.raises(InputError, match=r"data\.aux_hash"):
        train(other, resume=True)
    train(cut, resume=True)
    assert same_weights(tmp_path / "whole", tmp_path / "cut")
    assert stable_rows(tmp_path / "whole") == stable_rows(tmp_path / "cut")


def test_a_run_says_what_was_mixed_in(tmp_path, capsys):
    name = made(tmp_path / "made.npz")
    folder = train(tiny(tmp_path, "pgd_at", epochs=1, data={"aux": name}))
    stored = json.loads((folder / "config.json").read_text())["data"]
    assert stored["aux"] == name and stored["aux_hash"] == generated_hash(name)
    told = "22 of the 32 images of a batch are of 60 generated ones"
    assert told in capsys.readouterr().out
    assert told in json.loads((folder / "environment.json").read_text())["loader"]
    page = (folder / "report.html").read_text()
    assert (
        "npz:\N{HORIZONTAL ELLIPSIS}/made.npz" in page
        and generated_hash(name) in page
        and told in page
    )
    assert str(tmp_path) not in page


def test_the_natural_start_is_that_of_runs_without(tmp_path):
    config = tiny(tmp_path)
    mixed = replace(config, data=replace(config.data, aux="npz:made.npz", aux_hash="0"))
    assert natural_stage(mixed) == natural_stage(config)
