"""The examples of docs/adding_a_method.md: they train, and their flags count."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from cure_fast.cli.main import main
from cure_fast.methods import METHODS
from cure_fast.policies import POLICIES
from cure_fast.runs.folder import load_config
from cure_fast.runs.log import read_rows

PAGE = Path(__file__).resolve().parents[2] / "docs/adding_a_method.md"
WORDS = (
    "train quickstart --train-images 64 --val-images 20 --width 4 --pretrain-epochs 0 --epochs 2 "
    "--batch-size 32 --attack-steps 1 --attacks natural --limit 20 --loader resident --device cpu "
    "--no-tensorboard --method smoothed --smoothing 0.25 --policies still --still-epochs 1"
)


@pytest.fixture
def examples(monkeypatch):
    found = []
    for place, code in enumerate(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)):
        module = ModuleType(f"example_{place}")
        # Where a dataclass looks up the types of its fields.
        monkeypatch.setitem(sys.modules, module.__name__, module)
        exec(compile(code, str(PAGE), "exec"), module.__dict__)
        found.append(module)
    method, policy = found[0].SMOOTHED, found[1].STILL
    monkeypatch.setitem(METHODS, method.name, method)
    monkeypatch.setitem(POLICIES, policy.name, policy)


@pytest.mark.usefixtures("examples")
def test_the_examples_of_the_page_train_by_their_flags(tmp_path):
    folder = tmp_path / "run"
    assert main([*WORDS.split(), "--out", str(folder), "--cache", str(tmp_path / "cache")]) == 0
    config = load_config(folder)
    assert config.settings.smoothing == 0.25 and config.policies["still"].still_epochs == 1
    epochs = [
        row["epoch"] for row in read_rows(folder / "metrics.jsonl") if row["event"] == "epoch"
    ]
    assert epochs == [1, 2]
    assert main(["show", "smoothed-cifar10-resnet18"]) == 0
