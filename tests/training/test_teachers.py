"""Teachers: read once, kept in the run folder, frozen, in no checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from cure_fast.config import MethodSettings
from cure_fast.errors import InputError, StoppedError
from cure_fast.losses import cross_entropy, kl_divergence
from cure_fast.methods import METHODS
from cure_fast.methods.pgd_at import PGD_AT
from cure_fast.models.building import build_for_data, load_model
from cure_fast.models.weights import read_weights, save_weights
from cure_fast.runs.checkpoint import load_checkpoint
from cure_fast.training import stages
from cure_fast.training.job import train
from tiny_job import same_weights, tiny


@dataclass(frozen=True, kw_only=True)
class TaughtSettings(MethodSettings):
    """A method that learns from a teacher."""

    taught_by: str = ""


SEEN = []


def loss(run, batch):
    """Return CE(x', y) + KL(teacher(x) || p(x'))."""
    guide = run.teachers["guide"]
    SEEN.append(guide)
    with torch.no_grad():
        taught = guide(batch.x)
    logits = run.model(batch.x_adv)
    kl = kl_divergence(taught, logits).mean()
    return {"total": cross_entropy(logits, batch.y).mean() + kl, "kl": kl}


@pytest.fixture(autouse=True)
def taught(monkeypatch):
    method = replace(
        PGD_AT,
        name="taught",
        settings=TaughtSettings(),
        loss=loss,
        teachers=lambda config: {"guide": config.settings.taught_by},
    )
    monkeypatch.setitem(METHODS, "taught", method)
    SEEN.clear()


def teacher_file(path, *, width=8, classes=10, seed=1):
    """Write a network drawn at random, in words that rebuild it."""
    torch.manual_seed(seed)
    network = build_for_data(
        "resnet-small",
        data="digits",
        num_classes=classes,
        width=width,
        stem="cifar",
        normalize="none",
    )
    save_weights(network, path, network.description)
    return path


def config(tmp_path, source, out="run"):
    pretrain = {"pretrain_epochs": 0}
    return tiny(tmp_path, "taught", out=out, settings={"taught_by": str(source)}, pretrain=pretrain)


def test_a_teacher_is_kept_frozen_and_in_no_checkpoint(tmp_path):
    # Narrower than the student: the copy must say how to rebuild it.
    source = teacher_file(tmp_path / "teacher.safetensors")
    folder = train(config(tmp_path, source))
    kept = folder / "teacher-guide.safetensors"
    given = read_weights(source)
    assert all(torch.equal(given[k], v) for k, v in read_weights(kept).items())
    assert load_model(kept).width == 8
    guide = SEEN[-1]
    # Not even BatchNorm's statistics have moved.
    assert all(torch.equal(given[k], v) for k, v in guide.state_dict().items())
    assert not guide.training and not any(p.requires_grad for p in guide.parameters())
    state, _ = load_checkpoint(folder / "checkpoints")
    assert state["networks"] == {}


def test_a_resumed_run_takes_its_own_copy(tmp_path, monkeypatch):
    source = teacher_file(tmp_path / "teacher.safetensors")
    whole = train(config(tmp_path, source, "whole"))
    real = stages.fit

    def stopped(run, log, *, validate, save, stop):
        real(run, log, validate=validate, save=save, stop=lambda: run.step == 4)

    with monkeypatch.context() as patch:
        patch.setattr(stages, "fit", stopped)
        with pytest.raises(StoppedError):
            train(config(tmp_path, source, "broken"))
    source.unlink()
    assert same_weights(whole, train(config(tmp_path, source, "broken"), resume=True))


def test_a_teacher_that_was_changed_replaces_the_copy(tmp_path):
    first = teacher_file(tmp_path / "a.safetensors")
    folder = train(config(tmp_path, first))
    second = teacher_file(tmp_path / "b.safetensors", seed=2)
    changed = config(tmp_path, second)
    changed = replace(changed, optim=replace(changed.optim, epochs=3))
    train(changed, resume=True, override=True)
    given, kept = read_weights(second), read_weights(folder / "teacher-guide.safetensors")
    assert all(torch.equal(given[k], kept[k]) for k in kept)


@pytest.mark.parametrize("case", ["absent", "not ours", "other classes"])
def test_a_wrong_teacher_is_refused_before_anything_is_written(tmp_path, case):
    path = tmp_path / "teacher.safetensors"
    if case == "not ours":
        save_weights(torch.nn.Linear(2, 2), path, {})
    elif case == "other classes":
        teacher_file(path, classes=7)
    with pytest.raises(InputError, match=r"teacher guide: .*--method natural") as raised:
        train(config(tmp_path, path))
    assert "\n" not in str(raised.value) and not (tmp_path / "run").exists()
    if case == "other classes":
        assert "tells 7 classes apart, and digits has 10" in str(raised.value)


def test_teachers_compute_as_the_student_does(tmp_path):
    source = teacher_file(tmp_path / "teacher.safetensors")
    chosen = config(tmp_path, source)
    train(replace(chosen, run=replace(chosen.run, amp="bf16", engine="eager")))
    assert SEEN[-1].compute_dtype is torch.bfloat16
    assert SEEN[-1].conv1.weight.is_contiguous(memory_format=torch.channels_last)
