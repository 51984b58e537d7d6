"""DenseNet-121 and MobileNetV2 of torchvision, with first layers for images of 32x32 pixels.

Neither shrinks the image before the first block: the first convolution is 3x3 with stride 1, and
there is no pooling (DenseNet). MobileNetV2's second stage has stride 1 too, as in the networks that
adversarial distillation trains on CIFAR; those of some public codes also project the shortcuts of
blocks that change the number of channels, which the paper's and torchvision's do not.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from cure_fast.classifier import ImageClassifier


class DenseNet121(ImageClassifier):
    """Four blocks of 6, 12, 24 and 16 layers (Huang et al., CVPR 2017); width = growth rate.

    Names are torchvision's: ``features.conv0``, ..., ``features.denseblock1.denselayer1.norm1``,
    ..., ``features.norm5``, ``classifier``.
    """

    stem_names = ("features.conv0", "features.norm0")
    classifier_name = "classifier"

    def __init__(self, *, num_classes: int, width: int) -> None:
        super().__init__(width)
        from torchvision.models import DenseNet

        net = DenseNet(width, (6, 12, 24, 16), 2 * width, num_classes=num_classes)
        self.features, self.classifier = net.features, net.classifier
        self.features.conv0 = nn.Conv2d(3, 2 * width, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(self.features.conv0.weight)
        del self.features.pool0

    def logits(self, x: Tensor) -> Tensor:
        """Return logits [N, K] of normalised images [N, 3, H, W]."""
        return self.classifier(F.relu(self.features(x)).mean((2, 3)))


class MobileNetV2(ImageClassifier):
    """Inverted residual blocks (Sandler et al., CVPR 2018); width = channels of the first layer.

    Names are torchvision's but for the classifier's: ``features.0.0``, ..., ``classifier``. There
    is no dropout.
    """

    stem_names = ("features.0.0", "features.0.1")
    classifier_name = "classifier"

    def __init__(self, *, num_classes: int, width: int) -> None:
        super().__init__(width)
        from torchvision.models import MobileNetV2 as Net

        # Expansion, channels, blocks, stride; the published one has stride 2 in the second stage.
        stages = [
            *([1, 16, 1, 1], [6, 24, 2, 1], [6, 32, 3, 2], [6, 64, 4, 2]),
            *([6, 96, 3, 1], [6, 160, 3, 2], [6, 320, 1, 1]),
        ]
        net: Any = Net(num_classes, width / 32, stages)
        net.features[0][0].stride = (1, 1)
        self.features, self.classifier = net.features, net.classifier[1]

    def logits(self, x: Tensor) -> Tensor:
        """Return logits [N, K] of normalised images [N, 3, H, W]."""
        return self.classifier(self.features(x).mean((2, 3)))
