"""Wide ResNets (Zagoruyko & Komodakis, BMVC 2016) in the layout of TRADES and the codes after it.

Parameter names: ``conv1``, ``block1.layer.0.bn1``, ..., ``block1.layer.0.convShortcut``, ...,
``bn1`` (before the pooling), ``fc``.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from .base import ImageClassifier, global_average


class WideBlock(nn.Module):
    """BatchNorm, ReLU and a 3x3 convolution, twice, and a shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.convShortcut: nn.Conv2d | None = None
        if stride != 1 or in_channels != channels:
            self.convShortcut = nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return features [N, channels, H/stride, W/stride] of features [N, in_channels, H, W]."""
        activated = F.relu(self.bn1(x))
        skipped = x if self.convShortcut is None else self.convShortcut(activated)
        out = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        return out + skipped


class WideGroup(nn.Module):
    """Blocks of one width, the first of which changes the channels and the image size."""

    def __init__(self, depth: int, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        later = (WideBlock(channels, channels, 1) for _ in range(depth - 1))
        self.layer = nn.Sequential(WideBlock(in_channels, channels, stride), *later)

    def forward(self, x: Tensor) -> Tensor:
        """Return features [N, channels, H/stride, W/stride] of features [N, in_channels, H, W]."""
        return self.layer(x)


class WideResNet(ImageClassifier):
    """A 3x3 stem of 16 channels, three groups of blocks, BatchNorm, ReLU, global average, linear.

    Args:
        depth: blocks per group: 5 in WRN-34 ((34 - 4) / 6, stem and shortcuts counted) and in what
            Madry-style codes call WRN-32 ((32 - 2) / 6), 4 in WRN-28.
        num_classes: number of logits.
        width: widening factor; the groups have 16, 32 and 64 times as many channels.
    """

    stem_names = ("conv1",)
    classifier_name = "fc"
    # TRADES and its descendants register a second first group that their forward never calls.
    unused_modules = ("sub_block1",)

    def __init__(self, depth: int, *, num_classes: int, width: int) -> None:
        super().__init__(width)
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.block1 = WideGroup(depth, 16, 16 * width, 1)
        self.block2 = WideGroup(depth, 16 * width, 32 * width, 2)
        self.block3 = WideGroup(depth, 32 * width, 64 * width, 2)
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.fc = nn.Linear(64 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = math.prod(module.kernel_size) * module.out_channels
                nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))
        nn.init.zeros_(self.fc.bias)

    def logits(self, x: Tensor) -> Tensor:
        """Return logits [N, K] of normalised images [N, 3, H, W]."""
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(global_average(F.relu(self.bn1(x))))
