"""A disk that is full while a run trains: it goes on or stops, and loses nothing it had."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from functools import partial

import pytest

import strange
from cure_fast.errors import InputError, StoppedError
from cure_fast.signals import StopSignals
from cure_fast.training import saving
from cure_fast.training.job import train
from processes import start
from tiny_job import same_weights, stable_rows, tiny

pytestmark = pytest.mark.usefixtures("short_pictures")


def full_disk(*_arguments, **_settings):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def failing(monkeypatch, name, calls):
    """Let the ``calls``, counted from 1, of one of the saver's functions find the disk full."""
    real, seen = getattr(saving, name), []

    def sometimes(*arguments, **settings):
        seen.append(arguments)
        return (full_disk if len(seen) in calls else real)(*arguments, **settings)

    monkeypatch.setattr(saving, name, sometimes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An unbroken run, from scratch so that its stage alone is what saves."""
    return train(plain(tmp_path_factory.mktemp("unbroken"), "whole"))


def plain(tmp_path, out, **sections):
    small = {
        "pretrain": {"pretrain_epochs": 0},
        "model": {"width": 4},
        "eval": {"attacks": ("natural",), "limit": 2},
    }
    return tiny(tmp_path, out=out, epochs=3, **small, **sections)


def test_training_goes_on_when_a_checkpoint_cannot_be_written(tmp_path, whole, monkeypatch, capsys):
    failing(monkeypatch, "save_checkpoint", {2})
    folder = train(plain(tmp_path, "run"))
    error = capsys.readouterr().err
    assert "No space left on device" in error and "checkpoint-000000003" in error
    assert error.count("warning") == 1 and "Training goes on." in error
    assert same_weights(whole, folder) and stable_rows(whole) == stable_rows(folder)


def test_training_stops_where_that_is_asked_for_and_can_be_resumed(tmp_path, whole, monkeypatch):
    config = plain(tmp_path, "run", run={"on_save_failure": "stop"})
    with monkeypatch.context() as patch:
        failing(patch, "save_checkpoint", {2})
        with pytest.raises(InputError, match=r"No space left.*000000003.*--resume"):
            train(config)
    assert same_weights(whole, train(config, resume=True))


@pytest.mark.parametrize("calls", [{1}, {1, 2, 3}])
def test_best_weights_that_were_not_written_are_written_later(tmp_path, whole, monkeypatch, calls):
    failing(monkeypatch, "save_weights", calls)
    folder = train(plain(tmp_path, "run"))
    assert same_weights(whole, folder)
    assert (folder / "revision.safetensors").read_bytes() == (
        whole / "revision.safetensors"
    ).read_bytes()


def test_a_run_whose_best_weights_cannot_be_written_does_not_pass_for_done(tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "save_weights", full_disk)
    with pytest.raises(InputError, match="cannot save"):
        train(plain(tmp_path, "run"))
    assert not (tmp_path / "run/results.json").exists()


def test_a_stop_on_a_full_disk_is_still_a_stop(tmp_path, whole, monkeypatch, capsys):
    class Poll(StopSignals):
        count = 9

        def __call__(self):
            self.count -= 1
            return self.count <= 0

    config = plain(tmp_path, "run")
    with monkeypatch.context() as patch:
        patch.setattr(saving, "save_checkpoint", full_disk)
        with pytest.raises(StoppedError, match="continue with"):
            train(config, stop=Poll())
    assert "cannot save" in capsys.readouterr().err
    assert same_weights(whole, train(config, resume=True))


def test_a_run_folder_that_vanishes_is_named(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    real = saving.Saver.__call__

    def vanishing(self, run, best):
        if run.epoch == 2:
            shutil.rmtree(folder)
        return real(self, run, best)

    monkeypatch.setattr(saving.Saver, "__call__", vanishing)
    with pytest.raises((InputError, OSError), match="No such file or directory"):
        train(plain(tmp_path, "run"))
    assert f"cannot save to {folder}" in capsys.readouterr().err
    assert not folder.exists()


def may_mount():
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return shutil.which("unshare") and not subprocess.run(command, capture_output=True).returncode


@pytest.mark.skipif(not may_mount(), reason="this machine lets no process mount a file system")
def test_a_really_full_disk(tmp_path):
    """Room for a checkpoint and the rest of a run, some 450 KiB, not for a second checkpoint."""
    disk = tmp_path / "disk"
    disk.mkdir()
    words = (
        "train quickstart --train-images 96 --val-images 20 --width 6 --pretrain-epochs 0 "
        "--epochs 3 --attack-steps 1 --step-size 0.15 --attacks natural --limit 20 "
        f"--loader resident --no-tensorboard --device cpu --batch-size 32 --cache {tmp_path} "
        f"--out {disk}/run"
    )
    script = "cd run/checkpoints && ls -A && sha256sum checkpoint-*/state.pt && "
    script += "cat checkpoint-*/manifest.json"
    done = start(
        words.split(), tmp_path, prepare=partial(strange.on_a_small_disk, disk, "492k", script)
    )
    assert done.wait() == 0, done.output()
    output, error = done.stdout(), done.stderr()
    assert "No space left on device" in error and "Traceback" not in error
    assert "exit 0" in output and ".tmp" not in output
    digest = output.split("  checkpoint-")[0].split()[-1]
    assert output.count(digest) == 2
