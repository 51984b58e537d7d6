"""Networks, images and oracles for the tests of the tape."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from cure_fast.models import MODELS, ImageClassifier, build_model

# Relative to the largest entry of a gradient. float64 rounds to 1e-16, and sums over at most a few
# thousand products in another order, through at most a hundred layers, stay far below.
BOUND = 1e-10
CLASSES = 5
STATISTICS = ((0.4, 0.5, 0.6), (0.2, 0.3, 0.25))

NETWORKS = [(name, stem) for name, info in MODELS.items() for stem in info.stems]


class Casting(nn.Module):
    """The model as the tape computes it: normalised in the images' dtype, then cast."""

    def __init__(self, model: ImageClassifier, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        logits = self.model.logits(self.model.normalize(x).to(self.dtype))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


class Counting(TorchDispatchMode):
    """Keeps every ATen call with its positional arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[object, tuple]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append((func, args))
        return func(*args, **(kwargs or {}))

    def of(self, operation: object) -> list[tuple]:
        return [args for func, args in self.calls if func.overloadpacket is operation]


def network(name: str = "resnet-small", stem: str = "cifar", **options) -> ImageClassifier:
    """A narrow network in float64 whose BatchNorms have weights of their own."""
    width = 1 if name.startswith("wrn") else 3
    model = build_model(name, num_classes=CLASSES, width=width, stem=stem, **options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.double()


def images(count: int = 4, height: int = 12, width: int = 16) -> Tensor:
    x = torch.rand(count, 3, height, width, dtype=torch.float64)
    return x.contiguous(memory_format=torch.channels_last)


def own(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters())


def autograd(
    model: ImageClassifier,
    weights: Mapping[str, Tensor],
    x: Tensor,
    cotangents: Tensor,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Logits, and for each cotangent all gradients, by one sweep each; moves the statistics."""
    leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
    named = {f"model.{name}": leaf for name, leaf in leaves.items()}
    logits = functional_call(Casting(model, dtype), named, (x,))
    sweeps = [
        torch.autograd.grad(
            logits, list(leaves.values()), cotangent, retain_graph=True, allow_unused=True
        )
        for cotangent in cotangents
    ]
    return logits.detach(), [
        {name: grad for name, grad in zip(leaves, sweep, strict=True) if grad is not None}
        for sweep in sweeps
    ]


def off(actual: Tensor, expected: Tensor) -> float:
    """Largest difference in units of the largest entry."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-300))


def assert_same(
    actual: Sequence[Mapping[str, Tensor]],
    expected: Sequence[Mapping[str, Tensor]],
    wanted: Sequence[Collection[str] | None],
    bound: float = BOUND,
) -> None:
    assert len(actual) == len(expected) == len(wanted)
    for ours, theirs, names in zip(actual, expected, wanted, strict=True):
        assert set(ours) == set(theirs if names is None else names)
        assert {name: off(ours[name], theirs[name]) for name in ours} == pytest.approx(
            dict.fromkeys(ours, 0), abs=bound
        )


def assert_same_buffers(model: nn.Module, other: nn.Module) -> None:
    pairs = zip(model.named_buffers(), other.buffers(), strict=True)
    assert [name for (name, ours), theirs in pairs if not torch.equal(ours, theirs)] == []


def assert_close_buffers(model: nn.Module, other: nn.Module, bound: float = 1e-13) -> None:
    for (name, ours), theirs in zip(model.named_buffers(), other.buffers(), strict=True):
        if ours.is_floating_point():
            assert off(ours, theirs) <= bound, name
        else:
            assert torch.equal(ours, theirs), name


def low(model: ImageClassifier, dtype: torch.dtype) -> dict[str, Tensor]:
    """Copies of convolutions and linear layers in ``dtype``, BatchNorms' own in float32."""
    norms = {
        f"{name}.{part}"
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d)
        for part in ("weight", "bias")
    }
    model.float()
    return {
        name: weight.detach().to(torch.float32 if name in norms else dtype)
        for name, weight in model.named_parameters()
    }


class Odd(ImageClassifier):
    """What the models here do not have, but a traced network may."""

    stem_names = ("conv1",)
    classifier_name = "linear"

    def __init__(self) -> None:
        super().__init__(4)
        self.conv1 = nn.Conv2d(3, 4, (3, 2), stride=(1, 2), padding=(2, 0), dilation=(2, 1))
        self.bn1 = nn.BatchNorm2d(4, momentum=0.3, eps=1e-3)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d((3, 2), padding=(1, 0), ceil_mode=True)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.unused = nn.Linear(2, 2)
        self.aside = nn.BatchNorm2d(4)
        self.same = nn.Identity()
        self.hidden = nn.Linear(4, 6, bias=False)
        self.linear = nn.Linear(6, CLASSES)

    def logits(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.same(self.pool(x))
        self.aside(x)
        out = self.conv2(x)
        out += x
        x = torch.add(out, out)
        return self.linear(torch.relu(self.hidden(x.mean(dim=(2, 3)))))
