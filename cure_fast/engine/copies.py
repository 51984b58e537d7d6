"""Half-precision copies of a network's weights, which it computes with in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cure_fast.classifier import ImageClassifier

# Layers that autocast computes in half precision, whose weights are worth a copy.
HALF_LAYERS = (nn.Conv2d, nn.Linear)


class Copies:
    """Copies of the weights that autocast would cast in each pass.

    The other weights, such as a BatchNorm's, have none; without a dtype no weight has.
    """

    def __init__(self, network: ImageClassifier, dtype: torch.dtype | None) -> None:
        named = dict(network.named_parameters())
        halved = {
            f"{prefix}.{name}".lstrip(".")
            for prefix, module in network.named_modules()
            if isinstance(module, HALF_LAYERS) and dtype is not None
            for name, _ in module.named_parameters(recurse=False)
        }
        self.network = network
        self.own = _Own(network)
        self.weights = {name: named[name] for name in named if name in halved}
        self.by_name = {name: weight.detach().to(dtype) for name, weight in self.weights.items()}

    def refresh(self) -> None:
        """Take over the network's current weights."""
        if self.weights:
            with torch.no_grad():
                torch._foreach_copy_(list(self.by_name.values()), list(self.weights.values()))  # pyright: ignore[reportPrivateImportUsage]

    def logits(self, x: Tensor) -> Tensor:
        """Return the network's logits [N, K] of images, as autocast computes them."""
        named: dict[str, Tensor] = {}
        for name, copy in self.by_name.items():
            # Not of ``weights``: others may stand in their place.
            weight = self.network.get_parameter(name)
            # Anew in each pass, whose gradients are added up in float32.
            own = _Cast.apply(weight, copy) if weight.requires_grad else copy
            named[f"network.{name}"] = own  # pyright: ignore[reportArgumentType]
        return functional_call(self.own, named, (x,))


class _Own(nn.Module):
    """A network's own layers, whatever stands in for it."""

    def __init__(self, network: ImageClassifier) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network.own_logits(x)


class _Cast(torch.autograd.Function):
    """A weight's copy in its place; the gradient is the weight's, in float32."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, copy: Tensor) -> Tensor:
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad.float(), None


@contextmanager
def standing_in(network: ImageClassifier, other: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let ``other`` compute what calls of ``network`` return: [N, K] of images [N, C, H, W]."""
    former, network.stand_in = network.stand_in, other
    try:
        yield
    finally:
        network.stand_in = former
