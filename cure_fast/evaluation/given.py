"""What Python code hands over, images, labels and numbers, made into what evaluation takes."""

from __future__ import annotations

from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cure_fast.config.checks import shown
from cure_fast.config.values import convert
from cure_fast.errors import InputError

TAKEN = "an array or tensor of floats in [0, 1], [N, C, H, W] or of uint8 [N, H, W, C], C 1 or 3"


def as_number(name: str, value: Any) -> Any:
    """Return a number, which may be written as ``8/255``; all else as it is."""
    return convert(name, float, value) if isinstance(value, str) else value


def as_images(images: Any) -> Tensor:
    """Return images as evaluation takes them: on the CPU, [N, H, W, C], uint8 or floating."""
    if not isinstance(images, np.ndarray | Tensor):
        raise InputError(f"images: expected {TAKEN}, got {type(images).__name__}.")
    try:
        pixels = torch.as_tensor(images).detach().cpu()
    except TypeError as error:
        raise InputError(f"images: expected {TAKEN}, got {images.dtype}.") from error
    floating = pixels.is_floating_point()
    channels = pixels.shape[1 if floating else 3] if pixels.ndim == 4 else 0
    if channels not in (1, 3) or not (floating or pixels.dtype == torch.uint8):
        came = f"{str(pixels.dtype).removeprefix('torch.')} {list(pixels.shape)}"
        raise InputError(f"images: expected {TAKEN}, got {came}.")
    return pixels.permute(0, 2, 3, 1) if floating else pixels


def as_labels(labels: Any) -> Tensor:
    """Return labels as int64 on the CPU."""
    try:
        numbers = torch.as_tensor(labels).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"labels: expected whole numbers [N], got {shown(labels)}.") from error
    kind = numbers.dtype
    if kind.is_floating_point or kind.is_complex or kind == torch.bool:
        raise InputError(f"labels: expected whole numbers [N], got {kind}.")
    return numbers.long()


def device_of(model: nn.Module) -> torch.device:
    """Return where a model computes."""
    tensor = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device
