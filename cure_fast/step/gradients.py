"""What the gradients of some layers were like in an epoch's last step, for any method and engine.

CURE shows means of gradients and shares of updated weights (Gowda et al., ICLR 2024, Figs. 6 and
10). A step copies the gradients that move the weights, as a captured step can do no more than that
without cost; at an epoch's end they are summed up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cure_fast.step.run import Run

# Layers whose gradients are recorded: those of every block up to WRN-34-10 and ResNet-50.
MOST = 16
# What is recorded of each.
NUMBERS = ("mean", "abs_mean", "norm", "nonzero")


class LastGradients:
    """The gradients of :func:`watched_layers` in the last step, as they moved the weights.

    Tensors stay where they are, and :meth:`keep` reads nothing back: a CUDA graph may hold it.
    """

    def __init__(self, run: Run) -> None:
        self.layers = watched_layers(run.model)
        self.kept = {name: torch.zeros_like(p) for name, p in self.layers.items()}
        # Whether the last step moved nothing, 0-d.
        self.skipped = torch.ones((), dtype=torch.bool, device=run.device)
        # What a checkpoint between an epoch's last step and its row had of that step.
        self.stored: dict[str, dict[str, float]] | None = None

    def keep(self, skip: Tensor | bool = False) -> None:
        """Copy ``.grad``, which is complete but perhaps for the mask of policies."""
        self.stored = None
        # What a loss has nothing to do with has no gradient.
        pairs = [(self.kept[name], p.grad) for name, p in self.layers.items()]
        own = [(kept, grad) for kept, grad in pairs if grad is not None]
        if own:
            kept, grads = zip(*own, strict=True)
            torch._foreach_copy_(kept, grads)  # pyright: ignore[reportPrivateImportUsage]
        for kept, grad in pairs:
            if grad is None:
                kept.zero_()
        self.leave_out(skip)

    def leave_out(self, skip: Tensor | bool = True) -> None:
        """Note whether the step moved nothing."""
        if isinstance(skip, Tensor):
            self.skipped.copy_(skip)
        else:
            self.skipped.fill_(skip)

    @torch.no_grad()
    def statistics(self, run: Run) -> dict[str, dict[str, float]]:
        """Return numbers of the last step by layer; empty where it moved nothing.

        They are ``mean``, ``abs_mean`` and ``norm`` (L2) of the gradient, and ``nonzero``, the
        share of its entries in [0, 1] that move their weight.
        """
        if self.stored is not None:
            return self.stored
        if self.skipped:
            return {}
        masks = {place: mask for p in run.policies for place, mask in p.masks(run).items()}
        found = {}
        for name, parameter in self.layers.items():
            grad = self.kept[name].double()
            if (mask := masks.get(id(parameter))) is not None:
                grad.masked_fill_(mask, 0)
            size, moved = grad.abs(), grad.count_nonzero().double() / grad.numel()
            numbers = torch.stack([grad.mean(), size.mean(), grad.norm(), moved]).tolist()
            found[name] = dict(zip(NUMBERS, numbers, strict=True))
        return found

    def state_dict(self, run: Run) -> Any:
        """Return what a checkpoint holds: the numbers behind an epoch's last step, else None."""
        return self.statistics(run) if run.batch == run.loader.batches_per_epoch else None


def watched_layers(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights whose gradients are recorded, by name, in the model's order.

    They are the last 3x3 convolution of each block, ``*.conv2.weight``; of a network without such
    names all convolutions, and without any all weights of two dimensions or more. Of more than
    :data:`MOST` every so many of them.
    """
    weights = {n: p for n, p in model.named_parameters() if p.requires_grad and p.ndim > 1}
    convolutions = {n: p for n, p in weights.items() if p.ndim == 4}
    blocks = {n: p for n, p in convolutions.items() if n.endswith(".conv2.weight")}
    found = [*(blocks or convolutions or weights).items()]
    if len(found) > MOST:
        found = [found[round(k * (len(found) - 1) / (MOST - 1))] for k in range(MOST)]
    return dict(found)
