"""How many threads a run computes with: asked for, kept from before, or measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cure_fast.cli.main import main
from cure_fast.models import build_model
from cure_fast.runs import threads
from cure_fast.runs.threads import choose_threads, quickest, timed
from tiny_command import differences, tiny_words

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def two_threads(monkeypatch):
    """A process of two threads that nobody has asked for."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with threads.threads(2):
        yield


@pytest.fixture
def measured(monkeypatch):
    """What a trial finds, in place of one; empty says that there must be none."""
    found: dict[int, float] = {}

    def timed(model, numbers, **sizes):
        assert list(found) == numbers
        return found

    monkeypatch.setattr(threads, "timed", timed)
    return found


def choose(asked: int | str = "auto", device: torch.device = CPU, recorded: int | None = None):
    model = build_model("resnet-small", num_classes=10, width=4)
    return choose_threads(asked, model, device, image_size=8, batch_size=32, recorded=recorded)


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        ({1: 1.0, 2: 0.55}, 2),
        ({1: 1.0, 2: 0.9}, 1),
        ({1: 1.0, 2: 6.0}, 1),
        ({1: 1.0, 8: 0.2, 16: 0.11}, 16),
        ({1: 1.0, 8: 0.2, 16: 0.19}, 8),
        ({1: 1.0, 8: 0.9, 16: 0.7}, 16),
    ],
)
def test_threads_that_do_not_pay_are_left_to_others(seconds, best):
    assert quickest(seconds) == best


def test_what_is_known_is_not_measured(measured, monkeypatch, capsys):
    assert choose(3) == 3
    assert choose(3, recorded=1) == 3
    assert choose(recorded=1) == 1
    assert choose(device=torch.device("cuda")) == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert choose() == 2
    assert capsys.readouterr().out == ""


def test_what_is_measured_is_said(measured, capsys):
    measured |= {1: 0.02, 2: 0.05}
    assert choose() == 1
    told = "threads: 1, as a pass takes 20 ms with 1, 50 ms with 2 (--threads N sets the number)\n"
    assert capsys.readouterr().out == told


def test_a_trial_leaves_model_and_process_as_they_were():
    model = build_model("resnet-small", num_classes=10, width=4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    drawn = torch.random.get_rng_state()
    seconds = timed(model, [1, 2], image_size=8, batch_size=4)
    assert list(seconds) == [1, 2] and min(seconds.values()) > 0
    assert torch.get_num_threads() == 2 and torch.equal(torch.random.get_rng_state(), drawn)
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def recorded(folder: str) -> list[int]:
    """The number of threads at each start of a run."""
    first = json.loads((Path(folder) / "environment.json").read_text(encoding="utf-8"))
    return [start["threads"] for start in (first, *first.get("resumed", []))]


# A step an epoch, and eight images to attack: two threads on busy cores take ten times as long.
ONE_STEP = ("--train-images", "32", "--val-images", "10", "--pretrain-epochs", "0", "--limit", "8")


def test_a_resumed_run_keeps_its_number_unless_another_is_named(
    measured, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    measured |= {1: 0.05, 2: 0.02}
    flat = (*ONE_STEP, "--attacks", "natural", "--schedule", "constant")
    assert main(tiny_words(*flat, "--epochs", "2", out="broken")) == 0
    assert main(tiny_words(*flat, "--epochs", "3", "--threads", "2", out="whole")) == 0
    # Whatever the cores are busy with now.
    measured.clear()
    assert main(["train", "broken", "--resume", "--override", "--epochs", "3"]) == 0
    assert recorded("broken") == [2, 2] and not differences(Path("broken"), Path("whole"))
    assert "threads" not in capsys.readouterr().err
    assert main(["train", "broken", "--resume", "--threads", "1"]) == 0
    assert recorded("broken") == [2, 2, 1] and torch.get_num_threads() == 2
    assert "goes on with threads 2 then and 1 now" in capsys.readouterr().err
    # One that the machine does not have is no number to keep.
    text = Path("broken/environment.json").read_text(encoding="utf-8")
    Path("broken/environment.json").write_text(text.replace('"threads": 1', '"threads": 9999'))
    measured |= {1: 0.02, 2: 0.05}
    assert main(["train", "broken", "--resume", "--threads", "auto"]) == 0
    assert recorded("broken")[-1] == 1


def test_an_evaluation_measures_for_itself(measured, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(tiny_words(*ONE_STEP, "--threads", "2", "--epochs", "1")) == 0
    measured |= {1: 0.02, 2: 0.05}
    for target in ("run", "run/model.safetensors"):
        capsys.readouterr()
        assert main(["eval", target, "--attacks", "natural", "--limit", "8"]) == 0
        assert "threads: 1" in capsys.readouterr().out
        assert main(["eval", target, "--attacks", "natural", "--limit", "8", "--threads", "2"]) == 0
        assert "threads:" not in capsys.readouterr().out
