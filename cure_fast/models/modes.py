"""Modes that networks are put into for a while, and out of again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def attack_mode(model: nn.Module, mode: str) -> Iterator[None]:
    """Put ``model`` into eval or train mode without parameter gradients, and restore both after.

    Each module gets its own former mode back, so a frozen BatchNorm stays frozen, and each
    parameter its own ``requires_grad``.
    """
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        if mode == "eval":
            model.eval()
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)
