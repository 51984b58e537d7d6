"""Networks computed with other tensors in place of their weights, such as bf16 copies of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cure_fast.models import ImageClassifier

# Layers that autocast computes in half precision, whose weights are worth a copy.
HALF_LAYERS = (nn.Conv2d, nn.Linear)


class WorkingCopies:
    """Copies of the weights that autocast would cast in each pass.

    BatchNorms have none: they compute with float32 weights.

    Args:
        network: whose weights are copied.
        dtype: of the copies; None makes none.

    Attributes:
        by_name: the copies by the parameter's name.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype | None) -> None:
        named = dict(network.named_parameters())
        halved = {
            f"{prefix}.{name}".lstrip(".")
            for prefix, module in network.named_modules()
            if isinstance(module, HALF_LAYERS) and dtype is not None
            for name, _ in module.named_parameters(recurse=False)
        }
        self.masters = [named[name].detach() for name in named if name in halved]
        copies = [master.to(dtype) for master in self.masters]
        self.by_name = dict(zip((name for name in named if name in halved), copies, strict=True))

    def refresh(self) -> None:
        """Take over the network's current weights."""
        if self.masters:
            with torch.no_grad():
                copies = list(self.by_name.values())
                torch._foreach_copy_(copies, self.masters)  # pyright: ignore[reportPrivateImportUsage]


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
