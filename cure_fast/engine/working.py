"""Networks computed with other tensors in place of their weights, such as bf16 copies of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cure_fast.models import ImageClassifier

# Layers that autocast computes in half precision, whose weights are worth a copy.
HALF_LAYERS = (nn.Conv2d, nn.Linear)


def working_copies(model: nn.Module, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Return copies in ``dtype``, by name, of the weights that autocast would cast in each pass.

    Empty where ``dtype`` is None. BatchNorms have none: they compute with float32 weights.
    """
    if dtype is None:
        return {}
    chosen = {
        f"{prefix}.{name}".lstrip("."): parameter.detach().to(dtype)
        for prefix, module in model.named_modules()
        if isinstance(module, HALF_LAYERS)
        for name, parameter in module.named_parameters(recurse=False)
    }
    return {name: chosen[name] for name, _ in model.named_parameters() if name in chosen}


class WorkingNetwork:
    """A network's own layers, computed with the tensors of ``weights``.

    The result is that of autocast, whose casts are done here once for all passes.

    Args:
        model: whose layers, modes and buffers are used.
        weights: by parameter name; the others are the network's own.
        dtype: of the images that enter the layers; None leaves them as they are.
    """

    def __init__(
        self, model: ImageClassifier, weights: Mapping[str, Tensor], dtype: torch.dtype | None
    ) -> None:
        self.layers = _Layers(model, dtype)
        self.weights = {f"model.{name}": weight for name, weight in weights.items()}

    def __call__(self, x: Tensor) -> Tensor:
        """Return logits [N, K], float32 or wider, of images [N, C, H, W] in [0, 1]."""
        return functional_call(self.layers, self.weights, (x,))


class _Layers(nn.Module):
    def __init__(self, model: ImageClassifier, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.model = model
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        x = self.model.normalize(x)
        logits = self.model.logits(x if self.dtype is None else x.to(self.dtype))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))
