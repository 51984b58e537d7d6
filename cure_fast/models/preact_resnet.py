"""Pre-activation ResNets (He et al., Identity Mappings in Deep Residual Networks, ECCV 2016).

Two layouts are published for CIFAR. This is the one with a BatchNorm ``bn`` and a ReLU before the
pooling and with shortcuts that take the block's activated input: 107 state-dict keys for depth
18, used by the public CURE code. The other one has no ``bn`` (102 keys, RobustBench's default
class) and shortcuts of the raw input: another network, whose weights are refused here for the
missing ``bn``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from .base import ImageClassifier, global_average


class PreActBlock(nn.Module):
    """BatchNorm, ReLU and a 3x3 convolution, twice, and a shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.shortcut: nn.Sequential | None = None
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return features [N, channels, H/stride, W/stride] of features [N, in_channels, H, W]."""
        activated = F.relu(self.bn1(x))
        skipped = x if self.shortcut is None else self.shortcut(activated)
        out = self.conv1(activated)
        out = self.conv2(F.relu(self.bn2(out)))
        return out + skipped


class PreActResNet(ImageClassifier):
    """A 3x3 stem, four stages of :class:`PreActBlock`, BatchNorm, ReLU, global average, linear.

    Args:
        depths: blocks of the four stages, which have width, 2, 4 and 8 times width channels.
        num_classes: number of logits.
        width: channels of the stem and of the first stage.
    """

    stem_names = ("conv1",)
    classifier_name = "linear"

    def __init__(self, depths: Sequence[int], *, num_classes: int, width: int) -> None:
        super().__init__(width)
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        first, second, third, fourth = depths
        self.layer1 = _stage(first, width, width, stride=1)
        self.layer2 = _stage(second, width, 2 * width, stride=2)
        self.layer3 = _stage(third, 2 * width, 4 * width, stride=2)
        self.layer4 = _stage(fourth, 4 * width, 8 * width, stride=2)
        self.bn = nn.BatchNorm2d(8 * width)
        self.linear = nn.Linear(8 * width, num_classes)

    def logits(self, x: Tensor) -> Tensor:
        """Return logits [N, K] of normalised images [N, 3, H, W]."""
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        return self.linear(global_average(F.relu(self.bn(x))))


def _stage(depth: int, in_channels: int, channels: int, *, stride: int) -> nn.Sequential:
    later = (PreActBlock(channels, channels, 1) for _ in range(depth - 1))
    return nn.Sequential(PreActBlock(in_channels, channels, stride), *later)
