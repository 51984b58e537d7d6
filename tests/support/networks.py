"""Tiny networks of kinds that the models here do not have."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cure_fast.models import ImageClassifier

CLASSES = 10


class Plain(ImageClassifier):
    """Two convolutions, each with a BatchNorm, which record fast."""

    stem_names = ("conv1", "bn1")
    classifier_name = "linear"

    def __init__(self) -> None:
        super().__init__(6)
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.layer1 = nn.ModuleDict({"conv1": nn.Conv2d(6, 6, 3, bias=False)})
        self.bn2 = nn.BatchNorm2d(6)
        self.linear = nn.Linear(6, CLASSES)

    def logits(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.layer1["conv1"](x)))
        return self.linear(x.mean(dim=(2, 3)))


class Dense(ImageClassifier):
    """Layers that read all before them, as in a DenseNet, and pooling between two blocks."""

    stem_names = ("conv1",)
    classifier_name = "linear"

    def __init__(self) -> None:
        super().__init__(4)
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4 * n) for n in (1, 2, 3))
        self.convs = nn.ModuleList(nn.Conv2d(4 * n, 4, 3, padding=1) for n in (1, 2, 3))
        self.linear = nn.Linear(16, CLASSES)

    def logits(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = torch.cat([x, conv(torch.relu(norm(x)))], dim=1)
            x = nn.functional.avg_pool2d(x, 2) if x.shape[1] == 12 else x
        return self.linear(x.mean(dim=(2, 3)))


class Odd(ImageClassifier):
    """What is in none of the models here, with operations in place."""

    stem_names = ("conv1",)
    classifier_name = "linear"

    def __init__(self) -> None:
        super().__init__(4)
        self.conv1 = nn.Conv2d(3, 4, (3, 2), stride=(1, 2), padding=(2, 0), dilation=(2, 1))
        self.bn1 = nn.BatchNorm2d(4, momentum=0.3, eps=1e-3)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d((3, 2), padding=(1, 0), ceil_mode=True)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.norm = nn.GroupNorm(2, 4)
        self.scale = nn.Parameter(torch.ones(4, 1, 1))
        self.hidden = nn.Linear(4, 6, bias=False)
        self.linear = nn.Linear(6, CLASSES)

    def logits(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.bn1(self.conv1(x))))
        out = self.norm(self.conv2(x)) * self.scale
        out += x
        x = nn.functional.silu(out, inplace=True)
        return self.linear(torch.sigmoid(self.hidden(x.mean(dim=(2, 3)))))


class Attention(nn.Module):
    """Tokens [N, T, D] that look at one another, by two heads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        found = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(found.transpose(1, 2).flatten(2))


class Transformer(ImageClassifier):
    """A vision transformer of one block."""

    stem_names = ("conv1",)
    classifier_name = "head"
    patch = 4

    def __init__(self) -> None:
        super().__init__(8)
        self.conv1 = nn.Conv2d(3, 8, 4, stride=4)
        self.norm1, self.norm2, self.norm = (nn.LayerNorm(8) for _ in range(3))
        self.attn = Attention(8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.head = nn.Linear(8, CLASSES)

    @property
    def attention_branches(self) -> list[nn.Module]:
        return [self.attn]

    def logits(self, x: Tensor) -> Tensor:
        x = self.conv1(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1)
        x = x + self.attn(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return self.head(self.norm(x)[:, 0])


def network(kind: type[ImageClassifier]) -> ImageClassifier:
    """Return a network with the same weights each time."""
    torch.manual_seed(1)
    return kind().to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def dense(num_classes: int) -> ImageClassifier:
    """Return a network as ``--model networks:dense`` asks for it."""
    assert num_classes == CLASSES
    return Dense()
