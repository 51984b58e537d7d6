"""Whatever logging throws, a run ends with the same weights and the same metrics, and one warning.

The service Weights & Biases is a module that stands for it: init, log and finish are called as the
real one's are, and raise where a test says so.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import sys
import types
from contextlib import contextmanager

import pytest
import torch

from cure_fast.errors import InputError
from cure_fast.runs import log
from cure_fast.runs.log import RowWriter, RunLog, read_rows
from cure_fast.runs.sinks import TensorBoard, WandB, new_events, open_sinks, wandb_id
from cure_fast.training.job import train
from tiny_job import same_weights, stable_rows, tiny

pytestmark = pytest.mark.usefixtures("short_pictures")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of all runs here: they share the cache, so only the first one pre-trains."""
    return tmp_path_factory.mktemp("logging")


def tiny_run(base, out, **run):
    """A run of one epoch: three steps and an epoch, so four calls of a receiver of numbers."""
    small = {"eval": {"attacks": ("natural",), "limit": 2}, "model": {"width": 4}}
    return train(tiny(base, "pgd_at", out=out, epochs=1, run=run, **small))


@pytest.fixture(scope="module")
def plain(base):
    return tiny_run(base, "plain")


def check_unaffected(folder, plain):
    assert same_weights(folder, plain) and stable_rows(folder) == stable_rows(plain)


class FakeWandB(types.ModuleType):
    """Stands for the package: counts calls and raises `error` at call `at` of `method`."""

    Image = staticmethod(lambda pixels: ("picture", pixels.shape, pixels.dtype.name))
    Html = staticmethod(lambda text: ("page", text))

    def __init__(self, method="", error=None, at=1, package="wandb"):
        super().__init__(package)
        self.method, self.error, self.at = method, error, at
        self.calls, self.settings, self.logged = dict.fromkeys(("init", "log", "finish"), 0), [], []

    def count(self, method):
        self.calls[method] += 1
        if method == self.method and self.calls[method] >= self.at:
            raise self.error

    def init(self, **settings):
        self.count("init")
        self.settings.append(settings)
        return self

    def log(self, values, step=None):
        self.count("log")
        self.logged.append((step, values))

    def finish(self):
        self.count("finish")


FAULTS = {
    "no login": ("init", RuntimeError("api_key not configured\n(no-tty)"), 1),
    "leaves the program": ("init", SystemExit(1), 1),
    "third call": ("log", OSError(errno.ENOSPC, "No space left on device"), 3),
    "each call": ("log", ValueError(), 1),
    "no pictures": ("log", ValueError("a picture"), 5),
    "at the end": ("finish", ConnectionError("no network"), 1),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_service_that_raises_costs_one_warning(base, plain, fault, monkeypatch, capsys):
    method, error, at = FAULTS[fault]
    service = FakeWandB(method, error, at)
    monkeypatch.setitem(sys.modules, "wandb", service)
    folder = tiny_run(base, fault, wandb="project")
    check_unaffected(folder, plain)
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(warnings) == 1 and "Weights & Biases failed" in warnings[0]
    assert type(error).__name__ in warnings[0]
    # Off from there: not called again.
    assert service.calls[method] == at


def test_a_package_that_is_absent_costs_one_warning(base, plain, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "tensorboard.summary.writer.record_writer", None)
    folder = tiny_run(base, "absent", wandb="project", tensorboard=True)
    check_unaffected(folder, plain)
    first, second = (line for line in capsys.readouterr().err.splitlines() if "warning" in line)
    assert "TensorBoard failed" in first and "pip install wandb" in second


@pytest.mark.parametrize("place", ["__init__", "scalars", "close"])
def test_a_tensorboard_that_raises_costs_one_warning(base, plain, place, monkeypatch, capsys):
    def raising(*_arguments, **_named):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(TensorBoard, place, raising)
    folder = tiny_run(base, f"events {place}", tensorboard=True)
    check_unaffected(folder, plain)
    assert capsys.readouterr().err.count("warning: TensorBoard failed") == 1


def test_a_full_disk_ends_the_events_alone(tmp_path, capsys):
    (sink,) = open_sinks(tmp_path, "train", tensorboard=True, wandb=None, start=0, known={})
    sink.scalars(0, {"a": 1.0})
    with file_size_limit(200):
        for step in range(1, 20):
            sink.scalars(step, {"a": 1.0})
    sink.close()
    output = capsys.readouterr().err
    assert output.count("\n") == 1 and "File too large" in output


def test_what_asks_the_program_to_stop_goes_through(tmp_path, monkeypatch):
    for error in (KeyboardInterrupt(), InputError("no")):
        monkeypatch.setitem(sys.modules, "wandb", FakeWandB("log", error))
        (sink,) = open_sinks(
            tmp_path, "train", tensorboard=False, wandb="project", start=0, known={}
        )
        with pytest.raises(type(error)):
            sink.scalars(1, {"a": 1.0})


def test_the_service_gets_the_run(base, plain, monkeypatch):
    service = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", service)
    folder = tiny_run(base, "Lauf Ä 1", wandb="project")
    check_unaffected(folder, plain)
    (settings,) = service.settings
    assert {key: settings[key] for key in ("project", "name", "dir", "resume")} == {
        "project": "project",
        "name": "Lauf Ä 1",
        "dir": str(folder),
        "resume": "allow",
    }
    assert settings["config"] == json.loads((folder / "config.json").read_text())
    assert settings["id"].startswith("Lauf-1-") and settings["id"].isascii()
    steps = [row["step"] for row in read_rows(folder / "metrics.jsonl") if row["stage"] == "train"]
    assert [step for step, _ in service.logged] == [*steps, None]
    check_results(service.logged[-1][1], folder)
    assert {"step/total", "epoch/total", "validation/robust"} <= {
        name for _, values in service.logged for name in values
    }
    assert service.calls["finish"] == 1


def check_results(sent, folder):
    """The accuracies of the run and of its start, pictures of both, and the page."""
    models = json.loads((folder / "results.json").read_text())["models"]
    assert sent["test/Natural"] == models["trained"]["attacks"]["natural"]["accuracy"]
    assert sent["test/start/Natural"] == models["start"]["attacks"]["natural"]["accuracy"]
    assert sent["report"] == ("page", (folder / "report.html").read_text())
    names = ("natural", "trained_adversarial", "start_adversarial")
    for name in names:
        assert sent[f"pictures/{name}"] == ("picture", (8, 8 * 8, 3), "uint8")


def test_trackio_is_a_receiver_of_the_same_interface(base, plain, monkeypatch):
    service = FakeWandB(package="trackio")
    monkeypatch.setitem(sys.modules, "trackio", service)
    folder = tiny_run(base, "trackio", trackio="project")
    check_unaffected(folder, plain)
    (settings,) = service.settings
    # It knows a run by its name: that of another folder of the same name is another.
    assert settings.keys() == {"project", "name", "config", "resume"}
    assert settings["name"] == wandb_id(folder) and settings["resume"] == "allow"
    assert service.calls == {"init": 1, "log": 5, "finish": 1}
    check_results(service.logged[-1][1], folder)


def test_trackio_that_is_absent_costs_one_warning(base, plain, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "trackio", None)
    check_unaffected(tiny_run(base, "no trackio", trackio="project"), plain)
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert "trackio failed" in warning and "leaving out --trackio goes without" in warning


def test_tensorboard_has_results_and_pictures(base, plain):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tiny_run(base, "results", tensorboard=True)
    check_unaffected(folder, plain)
    read = EventAccumulator(str(folder / "tensorboard" / "train")).Reload()
    result = json.loads((folder / "results.json").read_text())["models"]["start"]["attacks"]
    (event,) = read.Scalars("test/start/Natural")
    assert event.value == pytest.approx(result["natural"]["accuracy"]) and event.step == 3
    (picture,) = read.Images("pictures/start_adversarial")
    assert (picture.width, picture.height) == (64, 8)
    assert picture.encoded_image_string.startswith(b"\x89PNG")


def test_a_folder_keeps_its_name_at_the_service(tmp_path):
    first = wandb_id(tmp_path)
    assert wandb_id(tmp_path) == first
    (tmp_path / "wandb-run-id").unlink()
    assert wandb_id(tmp_path) != first
    odd = tmp_path / ("ß" * 80)
    odd.mkdir()
    assert wandb_id(odd).startswith("run-") and len(wandb_id(odd)) <= 64


def test_without_a_configuration_the_service_gets_none(tmp_path, monkeypatch):
    service = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", service)
    WandB(tmp_path, "project").close()
    assert service.settings[0]["config"] is None


def test_the_service_may_not_wait_for_ever(tmp_path, monkeypatch):
    service = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", service)
    for name in ("WANDB_INIT_TIMEOUT", "WANDB_LOGIN_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    WandB(tmp_path, "project")
    # The mode (online, offline, disabled) stays what the user's environment says.
    assert service.settings[-1]["settings"] is None and "mode" not in service.settings[-1]
    service.Settings = dict
    WandB(tmp_path, "project")
    assert service.settings[-1]["settings"] == {"init_timeout": 60, "login_timeout": 60}
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "600")
    WandB(tmp_path, "project")
    assert service.settings[-1]["settings"] == {"login_timeout": 60}

    def other_names(*, patience):
        raise AssertionError(patience)

    service.Settings = other_names
    WandB(tmp_path, "project")
    assert service.settings[-1]["settings"] is None


def test_the_natural_start_is_not_logged_into_the_shared_cache(base, plain, monkeypatch):
    service = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", service)
    # Another seed, so that it is not in the cache yet.
    folder = tiny_run(base, "logged start", wandb="project", tensorboard=True, seed=9)
    stages = {row["stage"] for row in read_rows(folder / "metrics.jsonl")}
    assert stages == {"pretrain", "train"} and service.calls["init"] == 1
    assert [path.name for path in (folder / "tensorboard").iterdir()] == ["train"]
    cached = [path.name for path in (base / "cache").rglob("*")]
    assert "done" in cached and "tensorboard" not in cached and "wandb-run-id" not in cached


def read_events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


@pytest.mark.parametrize("stop_at", [1, 3, 4])
def test_a_resumed_run_repeats_no_events(tmp_path, stop_at):
    """Rows up to step 5 and two epochs, of which a kill left a checkpoint of step `stop_at`."""

    def write(first, last, epochs_done):
        told = RunLog(
            tmp_path, "train", epochs=9, tensorboard=True, upto_step=first, upto_epoch=epochs_done
        )
        for step in range(first, last):
            told.step(step, step / 3, 0.1, {"total": torch.tensor(float(step))})
            if step % 3 == 2:
                told.epoch(epoch_row(step // 3 + 1, step + 1))
        told.close()

    write(0, 6, 0)
    write(stop_at, 8, stop_at // 3)
    events = read_events(tmp_path / "tensorboard/train")
    assert events["step/total"] == [(step, float(step)) for step in range(8)]
    assert events["epoch/total"] == [(3, 1.0), (6, 2.0)]
    # No epoch of this run was validated.
    assert "validation/natural" not in events


def epoch_row(epoch, step):
    return {
        "epoch": epoch,
        "step": step,
        "lr": 0.1,
        "terms": {"total": float(epoch)},
        "seconds": 1.0,
        "images_per_s": 1.0,
        "validation": None,
    }


def test_events_are_read_back_in_order_whatever_the_clock(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    times = iter([2e9, 1e9, 1e9])
    for start in (0, 2, 4):
        now = next(times)
        monkeypatch.setattr("cure_fast.runs.sinks.time.time", lambda now=now: now)
        writer = TensorBoard(tmp_path / "events", start, {})
        for step in (start, start + 1):
            writer.scalars(step, {"a": step / 2, "b": float("nan")})
        writer.close()
    read = EventAccumulator(str(tmp_path / "events")).Reload()
    assert [(e.step, e.value) for e in read.Scalars("a")] == [(n, n / 2) for n in range(6)]
    assert len(read.Scalars("b")) == 6
    assert new_events(tmp_path / "events").name.startswith("events.out.tfevents.2000000003")


# metrics.jsonl itself.


@contextmanager
def file_size_limit(size):
    """Let no file of this process grow beyond `size` bytes: writing more is an OSError."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def add(writer, step, durable=False):
    writer.add({"event": "step", "stage": "train", "step": step, "text": "x" * 90}, durable=durable)


def steps_in(path):
    assert path.read_bytes()[-1:] == b"\n"
    return [row["step"] for row in read_rows(path)]


def test_rows_wait_while_the_disk_is_full(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    writer = RowWriter(path)
    add(writer, 0)
    with file_size_limit(400):
        for step in range(1, 6):
            add(writer, step, durable=step == 4)
            # The third row fits in part, and is cut off again.
            assert steps_in(path) == [0, 1]
    add(writer, 6)
    assert steps_in(path) == list(range(7))
    writer.close()
    output = capsys.readouterr().err
    assert output.count("warning") == 1 and "File too large" in output and str(path) in output


def test_rows_that_never_fit_are_counted(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    writer = RowWriter(path)
    with file_size_limit(200):
        for step in range(5):
            add(writer, step)
        writer.close()
    writer.close()
    assert steps_in(path) == [0]
    first, second = capsys.readouterr().err.splitlines()
    assert "training goes on" in first and "4 rows could not be written" in second


def test_the_last_try_is_made_at_the_end(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    writer = RowWriter(path)
    with file_size_limit(200):
        for step in range(5):
            add(writer, step)
    writer.close()
    assert steps_in(path) == list(range(5)) and "lost" not in capsys.readouterr().err


def test_what_cannot_be_cut_off_at_once_is_cut_off_later(tmp_path, monkeypatch, capsys):
    path = tmp_path / "metrics.jsonl"
    writer = RowWriter(path)
    add(writer, 0)

    def no_space(_handle, _size):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch, file_size_limit(200):
        patch.setattr(log.os, "ftruncate", no_space)
        add(writer, 1)
    assert path.read_bytes()[-1:] != b"\n" and len(read_rows(path)) == 1
    add(writer, 2)
    writer.close()
    assert steps_in(path) == [0, 1, 2] and capsys.readouterr().err.count("warning") == 1


def test_a_folder_that_cannot_be_written_does_not_end_the_stage(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.mkdir()
    writer = RowWriter(path)
    add(writer, 0)
    path.rmdir()
    add(writer, 1)
    writer.close()
    assert steps_in(path) == [0, 1] and "Is a directory" in capsys.readouterr().err


def test_a_run_on_a_full_disk_ends_with_the_same_rows(base, plain, monkeypatch, capsys):
    real, calls = log.write_all, 0

    def full_for_a_while(handle, data):
        nonlocal calls
        calls += 1
        if 2 <= calls < 4:
            real(handle, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle, data)

    monkeypatch.setattr(log, "write_all", full_for_a_while)
    folder = tiny_run(base, "full")
    check_unaffected(folder, plain)
    assert calls == 4 and capsys.readouterr().err.count("warning") == 1


# Standard output and standard error.


def test_an_output_that_fails_costs_one_warning(tmp_path, monkeypatch, capfd):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as broken:
        monkeypatch.setattr(sys, "stdout", broken)
        told = RunLog(
            tmp_path, "train", epochs=3, tensorboard=False, wandb=None, upto_step=0, upto_epoch=0
        )
        for epoch in (1, 2, 3):
            told.step(epoch, 0.0, 0.1, {"total": torch.tensor(2.0)})
            told.epoch(epoch_row(epoch, epoch))
        told.close()
    output = capfd.readouterr().err
    assert output.count("\n") == 1 and "standard output failed (Broken pipe)" in output
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 6
