"""Seeds that are functions of (seed, purpose, epoch, batch), so that resuming needs no state."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

ORDER: Final = 1
AUGMENTATION: Final = 2
GENERATED: Final = 3

_MASK = (1 << 64) - 1


def derive_seed(*parts: int) -> int:
    """Return a seed in [0, 2^63) that depends on every part and on their order.

    SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) over the parts: the state is xored with each
    part and then stepped once. Neighbouring epochs and batches get unrelated seeds, on every
    machine and Python version. (torch's CPU generator keeps the lowest 32 bits.)

    Args:
        parts: integers; taken modulo 2^64.
    """
    state = 0
    for part in parts:
        state = _step(state ^ (part & _MASK))
    return state >> 1


def _step(state: int) -> int:
    """Return the first output of SplitMix64 started at ``state``, in [0, 2^64)."""
    z = (state + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def generator_of(*parts: int) -> torch.Generator:
    """Return a CPU generator seeded by :func:`derive_seed` of the parts."""
    return torch.Generator().manual_seed(derive_seed(*parts))


def epoch_order(count: int, *, seed: int, epoch: int) -> Tensor:
    """Return the order of ``count`` images in an epoch, int64 [count] on the CPU."""
    return torch.randperm(count, generator=generator_of(seed, ORDER, epoch))
