"""The natural start of one network is never another's, whatever both are called."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from cure_fast.config import Config, DataConfig, ModelConfig, PretrainConfig
from cure_fast.models import MODELS
from cure_fast.training.data import read_data
from cure_fast.training.stages import natural_stage, new_model, pretrain_key

NETS = """
from torch import nn
from {name}_blocks import Block

def small(num_classes):
    return nn.Sequential(nn.Conv2d(3, 4, 3), Block(), nn.Flatten(), nn.Linear(144, num_classes))
"""
BLOCKS = """
from torch import nn

class Block(nn.Module):
    def forward(self, x):
        return x.relu()
"""
CONFIG = Config(data=DataConfig(data="digits"), pretrain=PretrainConfig(pretrain_epochs=1))


@pytest.fixture(scope="module")
def images():
    return read_data(CONFIG)


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Two files, of a function and of a class that it uses, and the name of the first."""
    name = f"nets_{abs(hash(str(tmp_path)))}"
    (tmp_path / f"{name}.py").write_text(NETS.format(name=name), encoding="utf-8")
    (tmp_path / f"{name}_blocks.py").write_text(BLOCKS, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def key(images, model: str) -> str:
    staged = natural_stage(replace(CONFIG, model=ModelConfig(model=model)))
    return pretrain_key(staged, new_model(staged, 10, 8), images, torch.device("cpu"))


def test_the_same_network_has_the_same_start(images, own):
    for model in ("resnet-small", "vit-tiny", f"{own}:small"):
        assert key(images, model) == key(images, model)


@pytest.mark.parametrize("file", ["", "_blocks"])
def test_an_edited_file_makes_a_new_start(images, own, tmp_path, file):
    before = key(images, f"{own}:small")
    path = tmp_path / f"{own}{file}.py"
    path.write_text(path.read_text(encoding="utf-8").replace("4, 3)", "4, 3, bias=True)") + "\n")
    for name in (f"{own}_blocks", own):
        importlib.reload(sys.modules[name])
    assert key(images, f"{own}:small") != before


def registered(monkeypatch, network):
    """Register what makes the network as the model ``resnet-small``."""

    def build(num_classes, width):
        return network

    monkeypatch.setitem(MODELS, "resnet-small", replace(MODELS["resnet-small"], build=build))


def test_another_class_of_the_same_name_and_shapes_has_its_own(images, monkeypatch):
    network = new_model(natural_stage(replace(CONFIG, model=ModelConfig(model="resnet-small"))), 10)
    registered(monkeypatch, network)
    keys = {key(images, "resnet-small")}
    # A setting that no shape tells.
    next(m for m in network.modules() if isinstance(m, torch.nn.Conv2d)).stride = (2, 2)
    keys.add(key(images, "resnet-small"))
    # The tensors of the one, and code of another file.
    network.__class__ = type("ResNet", (type(network),), {"__module__": __name__})
    keys.add(key(images, "resnet-small"))
    assert len(keys) == 3


def test_a_class_without_a_file_is_never_taken_for_the_same(images, monkeypatch):
    monkeypatch.setitem(sys.modules, "notebook_cell", ModuleType("notebook_cell"))
    network = new_model(natural_stage(replace(CONFIG, model=ModelConfig(model="resnet-small"))), 10)
    network.__class__ = type("ResNet", (type(network),), {"__module__": "notebook_cell"})
    registered(monkeypatch, network)
    assert key(images, "resnet-small") != key(images, "resnet-small")
