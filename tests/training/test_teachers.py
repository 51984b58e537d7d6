"""Teachers: read once, kept in the run folder, frozen, in no checkpoint."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cure_fast.errors import InputError, StoppedError
from cure_fast.losses import cross_entropy, kl_divergence
from cure_fast.methods import METHODS
from cure_fast.methods.pgd_at import PGD_AT
from cure_fast.models.building import load_model
from cure_fast.models.weights import read_weights, save_weights
from cure_fast.runs.checkpoint import load_checkpoint
from cure_fast.training import stages
from cure_fast.training.job import train
from tiny_job import same_weights, teacher_file, tiny

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
        loss=loss,
        teachers=("guide",),
    )
    monkeypatch.setitem(METHODS, "taught", method)
    SEEN.clear()


def config(tmp_path, source, out="run"):
    sections = {"model": {"teacher": (f"guide:{source}",)}, "pretrain": {"pretrain_epochs": 0}}
    return tiny(tmp_path, "taught", out=out, **sections)


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


def test_a_teachers_file_that_became_another_is_refused(tmp_path):
    source = teacher_file(tmp_path / "teacher.safetensors")
    train(config(tmp_path, source))
    teacher_file(source, seed=2)
    with pytest.raises(InputError, match=r"not the guide teacher that the run has learned from"):
        train(config(tmp_path, source), resume=True)


def test_a_teacher_may_be_a_run_folder(tmp_path):
    made = train(tiny(tmp_path, "natural", out="made", epochs=1))
    folder = train(config(tmp_path, made))
    given, kept = (read_weights(f) for f in (made / "model.safetensors", *folder.glob("teacher-*")))
    assert all(torch.equal(given[k], kept[k]) for k in kept)


@pytest.mark.parametrize(
    ("method", "words", "message"),
    [
        ("taught", (), r"learns from a guide teacher, got none\. Train one: cure-fast train"),
        ("taught", ("other:x",), r"NAME:RUN or NAME:FILE, one for each of guide"),
        ("taught", ("guide:x", "guide:y"), r"one for each of guide"),
        ("taught", ("guide",), r"NAME:RUN or NAME:FILE"),
        ("pgd_at", ("robust:x",), r"--method pgd_at has none\), got 'robust:x'"),
    ],
)
def test_teachers_that_a_method_does_not_learn_from_are_refused(tmp_path, method, words, message):
    with pytest.raises(InputError, match=message):
        train(tiny(tmp_path, method, model={"teacher": words}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("case", ["absent", "not ours", "other classes"])
def test_a_wrong_teacher_is_refused_before_anything_is_written(tmp_path, case):
    path = tmp_path / "teacher.safetensors"
    if case == "not ours":
        save_weights(torch.nn.Linear(2, 2), path, {})
    elif case == "other classes":
        teacher_file(path, classes=7)
    with pytest.raises(InputError, match=r"teacher guide: .*--method pgd_at") as raised:
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
