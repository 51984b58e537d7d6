"""Small networks whose answers are known, and images for them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from small import Convolutional, Linear


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def linear():
    return Linear().eval()


@pytest.fixture
def convolutional():
    return Convolutional().eval()


@pytest.fixture
def images():
    """Images away from the walls of [0, 1], uint8 [24, 4, 4, 3]."""
    return np.random.default_rng(0).integers(80, 176, (24, 4, 4, 3), np.uint8)


@pytest.fixture
def labels(linear, images):
    """What the linear network says: it is right on all images."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return linear(pixels).argmax(1).numpy()
