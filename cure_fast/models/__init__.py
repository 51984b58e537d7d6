"""The models by name, and the one function that builds them."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from cure_fast.classifier import ImageClassifier, Normalize
from cure_fast.errors import InputError
from cure_fast.plugins.lookup import installed, is_outside

from .own import call_factory
from .pointwise import protect_pointwise
from .preact_resnet import PreActResNet, WideResNet
from .resnet import BasicBlock, Bottleneck, ResNet
from .small_stems import DenseNet121, MobileNetV2
from .vit import VisionTransformer


@dataclass(frozen=True)
class ModelInfo:
    """An architecture, and the width that is published (see :attr:`ImageClassifier.width`).

    ``build`` takes ``num_classes``, ``width``, where ``stems`` has several, ``stem``, and, where
    the network is ``sized``, for images of one size, ``image_size``.
    """

    title: str
    build: Callable[..., ImageClassifier]
    default_width: int
    stems: tuple[str, ...] = ("cifar",)
    sized: bool = False


def _resnet(layers: int, block: type[BasicBlock | Bottleneck], *depths: int) -> ModelInfo:
    build = partial(ResNet, block, depths)
    return ModelInfo(f"ResNet-{layers}, CIFAR stem", build, 64, ("cifar", "imagenet"))


def _transformer(title: str, width: int, depth: int, heads: int, **options: bool) -> ModelInfo:
    build = partial(VisionTransformer, depth, heads, **options)
    return ModelInfo(f"{title}, patches of 4x4 (needs timm)", build, width, sized=True)


MODELS: dict[str, ModelInfo] = {
    "resnet18": _resnet(18, BasicBlock, 2, 2, 2, 2),
    "resnet34": _resnet(34, BasicBlock, 3, 4, 6, 3),
    "resnet50": _resnet(50, Bottleneck, 3, 4, 6, 3),
    "resnet101": _resnet(101, Bottleneck, 3, 4, 23, 3),
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
    "densenet121": ModelInfo("DenseNet-121, CIFAR stem", DenseNet121, 32),
    "mobilenetv2": ModelInfo("MobileNetV2, CIFAR stem", MobileNetV2, 32),
    "vit-base": _transformer("ViT-B", 768, 12, 12),
    "deit-small": _transformer("DeiT-S", 384, 12, 6),
    "convit-base": _transformer("ConViT-B", 768, 12, 16, convolutional=True),
    "vit-tiny": _transformer("ViT of four blocks for CPUs, images from 8x8", 64, 4, 4),
}


def build_model(
    name: str,
    *,
    num_classes: int,
    width: int | None = None,
    stem: str = "cifar",
    normalize: tuple[Sequence[float], Sequence[float]] | None = None,
    image_size: int = 32,
) -> ImageClassifier:
    """Return the model with fresh float32 weights from torch's generator, in channels-last layout.

    Args:
        name: a key of :data:`MODELS`, or ``package.module:function`` or a plug-in for what that
            makes (:func:`.own.call_factory`).
        num_classes: number of logits, at least 2.
        width: channels of the first stage, or widening factor of a wide ResNet; ``None`` takes the
            published.
        stem: first layer; ``imagenet`` is for the ResNets alone.
        normalize: mean and deviation of the three channels in [0, 1] units, for a normalising first
            layer; ``None`` takes images as they are.
        image_size: height and width of the images in pixels, which vision transformers are built
            for; others take any.

    Raises:
        InputError: for an unknown name, a function that makes no network, a stem the model does not
            have, or a value out of range.
    """
    own = name not in MODELS and is_outside("models", name)
    info = ModelInfo(name, partial(call_factory, name), 1) if own else MODELS.get(name)
    if own and width is not None:
        raise InputError(f"--width: expected none for {name}, got {width!r}. Leave it out.")
    if info is None:
        close = difflib.get_close_matches(name.lower(), MODELS, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        known = ", ".join([*MODELS, *installed("models")])
        raise InputError(f"--model: expected one of {known}, got {name!r}.{hint}")
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
    options = {"width": width, "stem": stem, "image_size": image_size}
    taken = {"width": not own, "stem": len(info.stems) > 1, "image_size": info.sized}
    chosen = {option: value for option, value in options.items() if taken[option]}
    model = info.build(num_classes=num_classes, **chosen)
    if normalize is not None:
        mean, std = map(list, normalize)
        positive = all(map(math.isfinite, mean + std)) and all(value > 0 for value in std)
        if not (len(mean) == len(std) == 3 and positive):
            raise InputError(
                "normalisation: expected three finite means and three positive deviations, "
                f"got {mean} and {std}."
            )
        model.normalize = Normalize(mean, std)
    protect_pointwise(model)
    return model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
