"""The naturally trained CIFAR-10 ResNet-18 inside pyautoattack, on the real CIFAR-10."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from cure_fast.attacks import pgd
from cure_fast.losses import cross_entropy
from cure_fast.models import build_model
from cure_fast.models.weights import load_into, read_weights


@pytest.fixture(scope="module")
def model():
    # Found without importing the package, whose import loads much more.
    spec = importlib.util.find_spec("pyautoattack")
    assert spec is not None and spec.origin is not None
    file = Path(spec.origin).parent / "examples" / "model_test.pt"
    model = build_model("resnet18", num_classes=10)  # it was trained without normalisation
    load_into(model, read_weights(file), source=file.name)
    return model.eval().requires_grad_(False)


def first_images(cifar10_root, count):
    """Return the first ``count`` test images [count, 3, 32, 32] in [0, 1] and their labels."""
    from torchvision.datasets import CIFAR10

    data = CIFAR10(str(cifar10_root), train=False)
    images = torch.from_numpy(data.data[:count]).permute(0, 3, 1, 2).float().div(255)
    labels = torch.tensor(data.targets[:count])
    return images.contiguous(memory_format=torch.channels_last), labels


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("count", "correct"), [(60, 55), pytest.param(250, 235, marks=pytest.mark.slow)]
)
def test_natural_accuracy(model, cifar10_root, count, correct):
    images, labels = first_images(cifar10_root, count)
    with torch.no_grad():
        predictions = torch.cat([model(batch).argmax(1) for batch in images.split(125)])
    assert (predictions == labels).sum().item() == correct


@pytest.mark.real_data
@pytest.mark.parametrize("count", [4, pytest.param(100, marks=pytest.mark.slow)])
def test_no_image_survives_pgd20(model, cifar10_root, count):
    images, labels = first_images(cifar10_root, count)
    generator = torch.Generator().manual_seed(0)
    correct = 0
    for x, y in zip(images.split(50), labels.split(50), strict=True):
        x_adv = pgd(
            model,
            x,
            lambda logits, y=y: cross_entropy(logits, y).sum(),
            eps=8 / 255,
            step_size=2 / 255,
            steps=20,
            start="uniform",
            generator=generator,
        )
        assert (x_adv - x).abs().max() <= 8 / 255 + 1e-6
        correct += (model(x_adv).argmax(1) == y).sum().item()
    assert correct == 0
