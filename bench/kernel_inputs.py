"""What the kernel benchmarks work on: gradients of real shapes, images, logits, convolutions.

Gradients are normal numbers times a scale per tensor between 1e-5 and 1e-2, as layers differ by
such factors in training. Tensors lie channels-last, as the trainer's do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from cure_fast.models import build_model

Item = TypeVar("Item")
# Of a model: the name, shape and strides of each parameter, and whether the mask may touch it.
Layout = list[tuple[str, torch.Size, tuple[int, ...], bool]]


def model_layout(name: str) -> Layout:
    """Return the parameters of a model with ten classes; its classifier is exempt."""
    with torch.device("meta"):
        model = build_model(name, num_classes=10)
    exempt = model.classifier_name
    return [
        (key, p.shape, p.stride(), key.split(".", 1)[0] != exempt)
        for key, p in model.named_parameters()
    ]


def plain_layout(shapes: Sequence[Sequence[int]], *, exempt: int = 0) -> Layout:
    """Return tensors of these shapes, channels-last where they have four dimensions.

    Args:
        shapes: one per tensor.
        exempt: how many of the last ones the mask may not touch.
    """
    layout: Layout = []
    for i, shape in enumerate(shapes):
        tensor = torch.empty(tuple(shape), device="meta")
        if tensor.ndim == 4:
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        name = f"layer{i}.weight"
        layout.append((name, tensor.shape, tensor.stride(), i < len(shapes) - exempt))
    return layout


LAYOUTS = {
    "resnet18": lambda: model_layout("resnet18"),
    "preactresnet18": lambda: model_layout("preactresnet18"),
    "wrn34-10": lambda: model_layout("wrn34-10"),
    # One tensor above torch.quantile's limit of 2**24 elements.
    "100M": lambda: plain_layout([(5000, 4000), *[(2000, 2000)] * 20]),
    # Small enough for Triton's interpreter: a convolution, two vectors and a classifier.
    "rehearsal": lambda: plain_layout([(8, 4, 3, 3), (8,), (33,), (10, 8)], exempt=1),
}


@dataclass
class ModelTensors:
    """A model's weights and all that its update reads and writes, one tensor each per parameter.

    Attributes:
        names: of the parameters.
        masked: whether the mask may touch each.
        params: weights, float32.
        nat: gradients of the natural loss.
        adv: gradients of the adversarial loss.
        grads: gradients of the whole loss, which are masked.
        momentum: momentum buffers, float32.
        averages: the revision model's weights, float32.
    """

    names: list[str]
    masked: list[bool]
    params: list[Tensor]
    nat: list[Tensor]
    adv: list[Tensor]
    grads: list[Tensor]
    momentum: list[Tensor]
    averages: list[Tensor]
    initial: list[list[Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.initial = [[t.clone() for t in tensors] for tensors in self._changed()]

    def _changed(self) -> tuple[list[Tensor], ...]:
        return self.params, self.grads, self.momentum, self.averages

    def restore(self) -> None:
        """Bring back the initial values, at the same addresses."""
        for tensors, initial in zip(self._changed(), self.initial, strict=True):
            torch._foreach_copy_(tensors, initial)  # pyright: ignore[reportPrivateImportUsage]

    def of_masked(self, items: Sequence[Item]) -> list[Item]:
        """Return those of ``items``, one per parameter, whose parameter the mask may touch."""
        return [item for item, masked in zip(items, self.masked, strict=True) if masked]

    def elements(self, *, masked: bool) -> int:
        """Return how many weights the mask may touch, or may not."""
        pairs = zip(self.params, self.masked, strict=True)
        return sum(p.numel() for p, is_masked in pairs if is_masked == masked)


def model_tensors(layout: Layout, device: torch.device, grad_dtype: torch.dtype) -> ModelTensors:
    """Return random tensors of this layout, the same at each call."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(scales: Sequence[float], dtype: torch.dtype = torch.float32) -> list[Tensor]:
        return [
            torch.empty_strided(shape, strides, device=device)
            .normal_(0, scale, generator=generator)
            .to(dtype)
            for (_, shape, strides, _), scale in zip(layout, scales, strict=True)
        ]

    exponents = torch.rand(len(layout), generator=torch.Generator().manual_seed(1)) * 3 - 5
    grad_scales = (10.0**exponents).tolist()
    weight_scales = [0.05] * len(layout)
    return ModelTensors(
        names=[name for name, *_ in layout],
        masked=[masked for *_, masked in layout],
        params=draw(weight_scales),
        nat=draw(grad_scales, grad_dtype),
        adv=draw(grad_scales, grad_dtype),
        grads=draw(grad_scales, grad_dtype),
        momentum=draw(grad_scales),
        averages=draw(weight_scales),
    )


def in_memory_order(tensor: Tensor) -> Tensor:
    """Return a dense tensor as a vector [n] over the same memory, in the order of addresses."""
    return tensor.as_strided((tensor.numel(),), (1,))
