"""A network that was not written for this package: one of the user's own, or another library's."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cure_fast.classifier import ImageClassifier
from cure_fast.errors import InputError
from cure_fast.plugins.lookup import first_line, load

PREFIX = "net."


class Wrapped(ImageClassifier):
    """A network ``net`` from images [N, C, H, W] to logits [N, K], as it is.

    Its first ``nn.Conv2d`` or ``nn.Linear`` counts as stem, its last ``nn.Linear`` as classifier,
    in the order in which it registers them.
    """

    def __init__(self, net: nn.Module, *, width: int = 0) -> None:
        super().__init__(width)
        self.net = net
        layers = {n: m for n, m in self.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
        self.stem_names = tuple(layers)[:1]
        linear = [name for name, layer in layers.items() if isinstance(layer, nn.Linear)]
        self.classifier_name = linear[-1] if linear else ""

    def logits(self, x: Tensor) -> Tensor:
        """Return logits [N, K] of normalised images [N, C, H, W]."""
        return self.net(x)

    def adapted(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return weights of ``net`` by itself under this network's names."""
        own = any(name.startswith(PREFIX) for name in weights)
        return {name if own else PREFIX + name: tensor for name, tensor in weights.items()}


def call_factory(name: str, *, num_classes: int) -> ImageClassifier:
    """Return the network that a function makes, with real weights on the CPU.

    ``name`` is ``package.module:function``, or that of a plug-in. The function is called as
    ``function(num_classes=...)``. What it returns maps images in [0, 1] to logits; what is no
    :class:`ImageClassifier` is wrapped into one.

    Raises:
        InputError: if it cannot be imported or called, or returns no module.
    """
    factory, problem = load("models", name)
    if problem:
        raise InputError(f"--model {name}: {problem}")
    try:
        # Also where what can be built is only looked at: code of others may read its weights.
        with torch.device("cpu"):
            net = factory(num_classes=num_classes)
    except Exception as error:  # code of the user's own: whatever it throws is told in one line
        raise InputError(
            f"--model {name}: the call with num_classes={num_classes} failed ({first_line(error)})."
        ) from error
    if not isinstance(net, nn.Module):
        raise InputError(
            f"--model {name}: expected the call with num_classes={num_classes} to return a "
            f"torch.nn.Module, got {type(net).__name__}."
        )
    return net if isinstance(net, ImageClassifier) else Wrapped(net)
