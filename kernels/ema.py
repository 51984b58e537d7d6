"""Stochastic momentum update of a revision model (CURE, ICLR 2024, Eq. 7)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def ema_update_(
    averages: Sequence[Tensor],
    params: Sequence[Tensor],
    *,
    decay: float,
    rate: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Move all ``averages`` towards ``params`` with probability ``rate``; return whether so.

    A move is ``average = decay * average + (1 - decay) * param`` for floating tensors and a copy
    for integer ones (such as BatchNorm's count of batches). One coin decides for the whole set, on
    the tensors' device: nothing is read back to the host.

    Args:
        averages: tensors to move, changed in place.
        params: tensors to move towards, same shapes.
        decay: share of the old average that stays, in [0, 1].
        rate: probability of a move, in [0, 1]; 1 is a plain exponential moving average.
        generator: source of the coin, on the device of ``averages``; None takes torch's default.

    Returns:
        0-d bool tensor on the device of ``averages``.

    Raises:
        ValueError: for a number out of range or lists that do not match.
    """
    if not 0 <= decay <= 1 or not 0 <= rate <= 1:
        raise ValueError(f"decay and rate: expected numbers in [0, 1], got {decay} and {rate}.")
    if [a.shape for a in averages] != [p.shape for p in params]:
        raise ValueError("averages and params: expected the same number of tensors and shapes.")
    device = averages[0].device if averages else torch.device("cpu")
    moved = torch.rand((), device=device, generator=generator) < rate
    weight = moved.double() * (1 - decay)
    with torch.no_grad():
        for average, param in zip(averages, params, strict=True):
            if average.is_floating_point():
                average.lerp_(param.to(average.dtype), weight.to(average.dtype))
            else:
                average.copy_(torch.where(moved, param, average))
    return moved
