"""The models by name, and the one function that builds them."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from cure_fast.errors import InputError

from .base import ImageClassifier, Normalize, block_first_convs
from .pointwise import protect_pointwise, restore_pointwise, thin_first
from .preact_resnet import PreActResNet
from .resnet import BasicBlock, Bottleneck, ResNet
from .wide_resnet import WideResNet

__all__ = [
    "MODELS",
    "ImageClassifier",
    "ModelInfo",
    "Normalize",
    "block_first_convs",
    "build_model",
    "protect_pointwise",
    "restore_pointwise",
    "thin_first",
]


@dataclass(frozen=True)
class ModelInfo:
    """An architecture.

    Attributes:
        title: one line for lists.
        build: from ``num_classes``, ``width`` and, where ``stems`` has several, ``stem``, all by
            keyword, to the model with fresh weights.
        default_width: published width (see :attr:`ImageClassifier.width`).
        stems: first layers to choose from.
    """

    title: str
    build: Callable[..., ImageClassifier]
    default_width: int
    stems: tuple[str, ...] = ("cifar",)


BOTH_STEMS = ("cifar", "imagenet")

MODELS: dict[str, ModelInfo] = {
    "resnet18": ModelInfo(
        "ResNet-18, CIFAR stem", partial(ResNet, BasicBlock, (2, 2, 2, 2)), 64, BOTH_STEMS
    ),
    "resnet34": ModelInfo(
        "ResNet-34, CIFAR stem", partial(ResNet, BasicBlock, (3, 4, 6, 3)), 64, BOTH_STEMS
    ),
    "resnet50": ModelInfo(
        "ResNet-50, CIFAR stem", partial(ResNet, Bottleneck, (3, 4, 6, 3)), 64, BOTH_STEMS
    ),
    "resnet101": ModelInfo(
        "ResNet-101, CIFAR stem", partial(ResNet, Bottleneck, (3, 4, 23, 3)), 64, BOTH_STEMS
    ),
    "preactresnet18": ModelInfo(
        "PreActResNet-18, final BatchNorm and ReLU", partial(PreActResNet, (2, 2, 2, 2)), 64
    ),
    "wrn34-10": ModelInfo("WideResNet-34-10", partial(WideResNet, 5), 10),
    "wrn32-10": ModelInfo(
        "WideResNet-32-10 of Madry-style codes, the same network as wrn34-10",
        partial(WideResNet, 5),
        10,
    ),
    "wrn28-10": ModelInfo("WideResNet-28-10", partial(WideResNet, 4), 10),
    "resnet-small": ModelInfo(
        "three stages of one basic block, for CPUs and images from 8x8",
        partial(ResNet, BasicBlock, (1, 1, 1)),
        16,
    ),
}


def build_model(
    name: str,
    *,
    num_classes: int,
    width: int | None = None,
    stem: str = "cifar",
    normalize: tuple[Sequence[float], Sequence[float]] | None = None,
) -> ImageClassifier:
    """Return the model with fresh float32 weights from torch's generator, in channels-last layout.

    Args:
        name: a key of :data:`MODELS`.
        num_classes: number of logits, at least 2.
        width: channels of the first stage, or widening factor of a wide ResNet; ``None`` takes the
            published.
        stem: first layer; ``imagenet`` is for the ResNets alone.
        normalize: mean and deviation of the three channels in [0, 1] units, for a normalising first
            layer; ``None`` takes images as they are.

    Raises:
        InputError: for an unknown name, a stem the model does not have, or a value out of range.
    """
    info = MODELS.get(name)
    if info is None:
        close = difflib.get_close_matches(name.lower(), MODELS, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise InputError(f"--model: expected one of {', '.join(MODELS)}, got {name!r}.{hint}")
    if stem not in info.stems:
        having = [other for other, known in MODELS.items() if stem in known.stems]
        instead = f"; {stem} is for {', '.join(having)}" if having else ""
        raise InputError(
            f"--stem: expected {' or '.join(info.stems)} for {name}, got {stem!r}{instead}."
        )
    width = info.default_width if width is None else width
    if width < 1:
        raise InputError(f"--width: expected a whole number of at least 1, got {width!r}.")
    if num_classes < 2:
        raise InputError(f"number of classes: expected at least 2, got {num_classes!r}.")
    choice = {"stem": stem} if len(info.stems) > 1 else {}
    model = info.build(num_classes=num_classes, width=width, **choice)
    if normalize is not None:
        model.normalize = _normalization(*normalize)
    protect_pointwise(model)
    return model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def _normalization(mean: Sequence[float], std: Sequence[float]) -> Normalize:
    """Return the normalising layer, or raise :class:`InputError` for values that cannot be."""
    usable = (
        len(mean) == len(std) == 3
        and all(map(math.isfinite, mean))
        and all(math.isfinite(value) and value > 0 for value in std)
    )
    if not usable:
        raise InputError(
            "normalisation: expected three finite means and three positive deviations, "
            f"got {list(mean)} and {list(std)}."
        )
    return Normalize(mean, std)
