"""Numbers that differ from tensor to tensor, as kernels take them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..tables import is_capturing, upload


def one_or_on_device(
    name: str, value: float | Sequence[float] | Tensor, device: torch.device
) -> float | Tensor:
    """Return one number where all are equal, else float32 [L] on the device, without strides.

    Args:
        name: what errors call it.
        value: a number, L numbers, or float32 [L] on the device.
        device: where the tensors are.

    Raises:
        RuntimeError: for numbers that would have to be sent while a CUDA graph is captured.
    """
    if isinstance(value, Tensor):
        return value.contiguous()
    if not isinstance(value, Sequence):
        return value
    if len(set(value)) == 1:
        return value[0]
    if is_capturing(device):
        raise RuntimeError(
            f"{name}: numbers of different tensors cannot be sent while a CUDA graph is captured. "
            f"Pass a float32 tensor [{len(value)}] on {device}, made before the capture."
        )
    return upload(value, torch.float32, device)
