"""ResNets with post-activation blocks (He et al., Deep Residual Learning, CVPR 2016).

Parameter names and layout are those of the CIFAR ResNets that adversarial-training codes publish
weights for: ``conv1``, ``bn1``, ``layer1.0.conv1``, ..., ``layer2.0.shortcut.0``, ..., ``linear``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from cure_fast.classifier import ImageClassifier


def projection(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """Return a block's shortcut: empty where input and output agree, else 1x1 and BatchNorm."""
    if stride == 1 and in_channels == out_channels:
        return nn.Sequential()
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False),
        nn.BatchNorm2d(out_channels),
    )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion: ClassVar[int] = 1

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = projection(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return features [N, channels, H/stride, W/stride] of features [N, in_channels, H, W]."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, the last to four times the channels, and a shortcut."""

    expansion: ClassVar[int] = 4

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = self.expansion * channels
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut = projection(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return features [N, 4*channels, H/stride, W/stride] of [N, in_channels, H, W]."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(out + self.shortcut(x))


class ResNet(ImageClassifier):
    """A stem, stages that double the channels and halve the image, global average, linear.

    Stage ``i`` has ``depths[i]`` blocks of ``width * 2**i`` channels (times the expansion). The
    stem ``cifar`` is a 3x3 convolution of stride 1, ``imagenet`` a 7x7 convolution of stride 2 and
    a 3x3 max-pool of stride 2.
    """

    stem_names = ("conv1", "bn1")
    classifier_name = "linear"

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        depths: Sequence[int],
        *,
        num_classes: int,
        width: int,
        stem: str = "cifar",
    ) -> None:
        super().__init__(width)
        self.max_pool: nn.Module = nn.Identity()
        if stem == "imagenet":
            self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
            self.max_pool = nn.MaxPool2d(3, stride=2, padding=1)
        else:
            self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.stages = [f"layer{number}" for number in range(1, len(depths) + 1)]
        in_channels = width
        for index, (name, depth) in enumerate(zip(self.stages, depths, strict=True)):
            channels = width * 2**index
            stage = nn.Sequential()
            for stride in [1 if index == 0 else 2] + [1] * (depth - 1):
                stage.append(block(in_channels, channels, stride))
                in_channels = block.expansion * channels
            self.add_module(name, stage)
        self.linear = nn.Linear(in_channels, num_classes)

    def logits(self, x: Tensor) -> Tensor:
        """Return logits [N, K] of normalised images [N, 3, H, W]."""
        x = self.max_pool(F.relu(self.bn1(self.conv1(x))))
        for name in self.stages:
            x = self.get_submodule(name)(x)
        return self.linear(x.mean((2, 3)))
