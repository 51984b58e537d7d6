"""Tiny networks of any images, for analyses: their answers are known, or every layer is seen."""

from __future__ import annotations

import torch
from torch import nn

CLASSES = 3


class Linear(nn.Module):
    """Logits that are linear in the pixels: the distance to its boundary has a closed form."""

    def __init__(self, size: int = 4, classes: int = CLASSES, seed: int = 0) -> None:
        super().__init__()
        self.layer = nn.Linear(3 * size * size, classes)
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for each in self.layer.parameters():
                each.copy_(torch.randn(each.shape, generator=draw))

    def forward(self, x):
        return self.layer(x.flatten(1))


class Convolutional(nn.Module):
    """A stem, a block and a classifier, with BatchNorm and both kinds of ReLU."""

    def __init__(self, classes: int = CLASSES, seed: int = 0) -> None:
        super().__init__()
        state = torch.random.get_rng_state()
        torch.manual_seed(seed)
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        self.conv2, self.linear = nn.Conv2d(4, 4, 3), nn.Linear(4, classes)
        torch.random.set_rng_state(state)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        return self.linear(torch.relu(self.conv2(x)).mean(dim=(2, 3)))
