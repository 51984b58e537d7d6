"""Pre-activation ResNets (He et al., ECCV 2016) and wide ResNets (Zagoruyko, Komodakis, BMVC 2016).

Two layouts of PreActResNet are published for CIFAR. This is the one with a BatchNorm ``bn`` and a
ReLU before the pooling and with shortcuts that take the block's activated input: 107 state-dict
keys for depth 18, used by the public CURE code. The other one has no ``bn`` (102 keys,
RobustBench's default class) and shortcuts of the raw input: another network, whose weights are
refused here for the missing ``bn``.

The wide ResNets are in the layout of TRADES and the codes after it: ``block1.layer.0.bn1``, ...,
``block1.layer.0.convShortcut``, ..., ``bn1`` (before the pooling), ``fc``.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from cure_fast.classifier import ImageClassifier


class PreActBlock(nn.Module):
    """BatchNorm, ReLU and a 3x3 convolution, twice, and a shortcut of the activated input."""

    def __init__(self, in_channels: int, channels: int, stride: int, *, wide: bool) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        # As published weights name it.
        self.shortcut_name = "convShortcut" if wide else "shortcut"
        if stride != 1 or in_channels != channels:
            projection = nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False)
            self.add_module(self.shortcut_name, projection if wide else nn.Sequential(projection))

    def forward(self, x: Tensor) -> Tensor:
        """Return features [N, channels, H/stride, W/stride] of features [N, in_channels, H, W]."""
        activated = F.relu(self.bn1(x))
        shortcut = getattr(self, self.shortcut_name, None)
        skipped = x if shortcut is None else shortcut(activated)
        return self.conv2(F.relu(self.bn2(self.conv1(activated)))) + skipped


def _stage(
    depth: int, in_channels: int, channels: int, stride: int, *, wide: bool = False
) -> nn.Sequential:
    """Return blocks of one width, the first of which changes the channels and the image size."""
    later = (PreActBlock(channels, channels, 1, wide=wide) for _ in range(depth - 1))
    return nn.Sequential(PreActBlock(in_channels, channels, stride, wide=wide), *later)


class PreActResNet(ImageClassifier):
    """A 3x3 stem, four stages of :class:`PreActBlock`, BatchNorm, ReLU, global average, linear.

    The stages have ``depths`` blocks and width, 2, 4 and 8 times width channels.
    """

    stem_names = ("conv1",)
    classifier_name = "linear"

    def __init__(self, depths: Sequence[int], *, num_classes: int, width: int) -> None:
        super().__init__(width)
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        first, second, third, fourth = depths
        self.layer1 = _stage(first, width, width, 1)
        self.layer2 = _stage(second, width, 2 * width, 2)
        self.layer3 = _stage(third, 2 * width, 4 * width, 2)
        self.layer4 = _stage(fourth, 4 * width, 8 * width, 2)
        self.bn = nn.BatchNorm2d(8 * width)
        self.linear = nn.Linear(8 * width, num_classes)

    def logits(self, x: Tensor) -> Tensor:
        """Return logits [N, K] of normalised images [N, 3, H, W]."""
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        return self.linear(F.relu(self.bn(x)).mean((2, 3)))


class WideResNet(ImageClassifier):
    """A 3x3 stem of 16 channels, three groups of blocks, BatchNorm, ReLU, global average, linear.

    The groups have 16, 32 and 64 times ``width`` channels and ``depth`` blocks: 5 in WRN-34
    ((34 - 4) / 6, stem and shortcuts counted) and in what Madry-style codes call WRN-32
    ((32 - 2) / 6), 4 in WRN-28.
    """

    stem_names = ("conv1",)
    classifier_name = "fc"
    # TRADES and its descendants register a second first group that their forward never calls.
    unused_modules = ("sub_block1",)

    def __init__(self, depth: int, *, num_classes: int, width: int) -> None:
        super().__init__(width)
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.block1 = _group(depth, 16, 16 * width, 1)
        self.block2 = _group(depth, 16 * width, 32 * width, 2)
        self.block3 = _group(depth, 32 * width, 64 * width, 2)
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
        return self.fc(F.relu(self.bn1(x)).mean((2, 3)))


def _group(depth: int, in_channels: int, channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layer=_stage(depth, in_channels, channels, stride, wide=True)))
