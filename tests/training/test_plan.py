"""What is timed before a job on the CPU, and what is said of bfloat16 then."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from cure_fast.config import Config, ModelConfig, RunConfig
from cure_fast.models import build_model
from cure_fast.progress import Part, Progress
from cure_fast.training import plan
from cure_fast.training.plan import time_passes

TINY = build_model("resnet-small", num_classes=10, width=4)


@pytest.fixture
def passes(monkeypatch):
    """Passes of which a float32 one takes a second and a bfloat16 one half of that."""
    timed: list[torch.dtype | None] = []

    def pace(*_: Any, dtype: torch.dtype | None = None, **__: Any) -> float:
        timed.append(dtype)
        return 0.5 if dtype is torch.bfloat16 else 1.0

    monkeypatch.setattr(plan, "pace", pace)
    monkeypatch.setattr(plan, "multiplies_bf16", lambda: True)
    return timed


def told(capsys, *, count: int = 1000, amp: Any = "auto", model="resnet-small", resume=False):
    """Return the paces, and what is printed of a job with so many passes of training."""
    progress = Progress()
    progress.plan("train", Part("train", [1.0], count))
    config = replace(Config(), model=ModelConfig(model=model), run=RunConfig(amp=amp))
    time_passes(progress, config, TINY, 1, 32, resume)
    return progress.paces, capsys.readouterr().out


def test_a_long_run_on_a_processor_with_bfloat16_is_told_of_it(passes, capsys):
    paces, said = told(capsys)
    assert said == (
        "precision: float32; with --amp bf16, as on GPUs, a pass would take 0.50 times as long on "
        "this processor\n"
    )
    assert paces == {"train": 1.0, "attack": 1.0}


@pytest.mark.parametrize(
    "run", [{"count": 500}, {"amp": "off"}, {"model": "my:network"}, {"resume": True}], ids=str
)
def test_others_are_not_and_time_nothing_for_it(passes, capsys, run):
    assert told(capsys, **run) == ({"train": 1.0, "attack": 1.0}, "")
    assert passes == [None]


def test_nor_is_one_on_a_processor_without(passes, capsys, monkeypatch):
    for answer in (None, False):
        monkeypatch.setattr(plan, "multiplies_bf16", lambda answer=answer: answer)
        assert told(capsys)[1] == ""
    assert passes == [None, None]


def test_nor_one_whose_network_gains_nothing(passes, capsys, monkeypatch):
    monkeypatch.setattr(plan, "pace", lambda *_, dtype=None, **__: 2.0 if dtype else 1.0)
    assert told(capsys)[1] == ""


def test_processes_share_the_passes(passes, capsys, monkeypatch):
    monkeypatch.setattr(plan.distributed, "processes", lambda: 2)
    assert told(capsys) == ({"train": 0.5, "attack": 0.5}, "")
    assert "0.50 times as long" in told(capsys, count=2000)[1]


def test_training_in_bfloat16_is_timed_so_and_evaluation_in_float32(passes, capsys):
    assert told(capsys, amp="bf16") == ({"train": 0.5, "attack": 1.0}, "")


def test_a_pass_is_timed_in_the_precision_asked_for():
    seen = []
    hook = TINY.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    plan.pace(TINY, 1, image_size=32, batch_size=2, dtype=torch.bfloat16)
    assert seen and all(seen)
    seen.clear()
    assert plan.pace(TINY, 1, image_size=32, batch_size=2) > 0
    assert seen and not any(seen)
    hook.remove()
