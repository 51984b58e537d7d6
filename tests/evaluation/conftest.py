from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from short_attacks import shorten

# Images are small enough that an optimum is a sum over 48 pixels and an attack takes milliseconds.
SIDE = 4


class Linear(nn.Module):
    """Logits W x + b: the optimum is known in closed form."""

    def __init__(self, classes: int, seed: int, side: int = SIDE) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(classes, 3 * side * side, generator=generator))
        self.bias = nn.Parameter(0.1 * torch.randn(classes, generator=generator))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x.flatten(1) @ self.weight.T + self.bias

    def robust(self, images: Tensor, labels: Tensor, eps: float) -> Tensor:
        """Return which images no perturbation breaks, bool [N]: one corner decides per class."""
        x = images.permute(0, 3, 1, 2).double().flatten(1) / 255
        weight, bias = self.weight.detach().double(), self.bias.detach().double()
        robust = torch.ones(len(x), dtype=torch.bool)
        for row, own in enumerate(labels.tolist()):
            for other in range(len(bias)):
                if other != own:
                    slope = weight[other] - weight[own]
                    corner = (x[row] + eps * slope.sign()).clamp(0, 1)
                    robust[row] &= bool(slope @ corner + bias[other] - bias[own] < 0)
        return robust

    def l2_distances(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return how far each image is from another class in L2, float64 [N], without a box."""
        weight, bias = self.weight.detach().double(), self.bias.detach().double()
        logits = images.permute(0, 3, 1, 2).double().flatten(1) / 255 @ weight.T + bias
        lead = logits.gather(1, labels[:, None]) - logits
        slope = (weight[labels, None] - weight[None]).norm(dim=2)
        return (lead / slope).nan_to_num(nan=float("inf")).amin(dim=1)


class ConvNet(nn.Module):
    """A small network with BatchNorm, one of the two frozen."""

    def __init__(self, classes: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv = nn.Conv2d(3, 8, 3, padding=1)
            self.norm = nn.BatchNorm2d(8)
            self.frozen = nn.BatchNorm2d(8)
            self.head = nn.Linear(8 * SIDE * SIDE, classes)
        self.frozen.eval()
        self.frozen.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.frozen(self.norm(self.conv(x)))).flatten(1))


@pytest.fixture
def short_square(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Square stop after 50 of its 5,000 queries, where its strength is not the question."""
    monkeypatch.setattr("cure_fast.evaluation.autoattack.SQUARE_QUERIES", 50)


@pytest.fixture
def linear() -> Callable[..., Linear]:
    return lambda classes=4, seed=0, side=SIDE: Linear(classes, seed, side)


@pytest.fixture
def conv_net() -> Callable[..., ConvNet]:
    return lambda classes=10, seed=0: ConvNet(classes, seed)


@pytest.fixture
def data() -> Callable[..., tuple[Tensor, Tensor]]:
    def make(model: nn.Module, count: int = 24, wrong: int = 0) -> tuple[Tensor, Tensor]:
        """Return random images and the model's predictions, the first ``wrong`` of them changed."""
        generator = torch.Generator().manual_seed(1)
        shape = (count, SIDE, SIDE, 3)
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        modes = {module: module.training for module in model.modules()}
        with torch.no_grad():
            logits = model.eval()(images.permute(0, 3, 1, 2) / 255)
        for module, training in modes.items():
            module.training = training
        labels = logits.argmax(dim=1)
        labels[:wrong] = (labels[:wrong] + 1) % logits.shape[1]
        return images, labels

    return make


@pytest.fixture
def short_autoattack(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let all of AutoAttack be short, where its strength is not the question."""
    shorten(monkeypatch)
