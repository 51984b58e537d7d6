"""A finished run with normalisation, and files of weights whose every tensor counts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from cure_fast.export.source import Source
from cure_fast.files import file_hash
from cure_fast.models import ImageClassifier, build_model
from cure_fast.models.weights import save_weights
from cure_fast.training.job import train
from tiny_job import tiny


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny run on digits, with normalisation in the network. Not to be changed."""
    config = tiny(tmp_path_factory.mktemp("exported"), epochs=1, model={"normalize": "dataset"})
    train(config)
    return Path(str(config.run.out))


def stirred(name: str, **options) -> ImageClassifier:
    """A network of which no tensor, running statistics included, is at its first value."""
    generator = torch.Generator().manual_seed(0)
    model = build_model(name, num_classes=10, **options).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                tensor.data.copy_(torch.rand(tensor.shape, generator=generator) * 0.5 + 0.75)
    return model


@pytest.fixture
def make_source(tmp_path: Path):
    """From an architecture to a file of stirred weights, as what is exported."""

    def make(name: str, *, results=None, config=None, told=None, **options) -> Source:
        model = stirred(name, **options)
        metadata = {
            "model": name,
            "width": str(model.width),
            "data": "cifar10",
            "num_classes": "10",
            "eps": repr(8 / 255),
            "method": "cure",
            "stem": options.get("stem", "cifar"),
            **(told or {}),
        }
        path = tmp_path / "model.safetensors"
        save_weights(model, path, metadata)
        return Source(path, file_hash(path), model, metadata, config, results)

    return make
