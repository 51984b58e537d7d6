"""BatchNorm over the images of all processes, so that several train as one does.

``torch.nn.SyncBatchNorm`` is of GPUs alone, and no ``nn.BatchNorm2d``, which other code looks for.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cure_fast.distributed import DifferentiableSum


def synchronise(network: nn.Module) -> None:
    """Have every BatchNorm in training mode normalise by the images of all processes.

    Names, weights, buffers, types and settings of the layers stay as they are.
    """
    for layer in network.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.forward = partial(joint_norm, layer)  # pyright: ignore[reportAttributeAccessIssue]


def joint_norm(layer: Any, x: Tensor) -> Tensor:
    """Return features [n, C, ...] normalised as those [N, C, ...] of all processes would be.

    The variance is that of differences from the mean: a difference of two large sums would lose
    the digits that one process has.
    """
    if not layer.training:
        return type(layer).forward(layer, x)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    others = [0, *range(2, x.ndim)]
    shape = [1, -1] + [1] * (x.ndim - 2)
    number = wide.new_full((1,), x.numel() // x.shape[1])
    total: Tensor = DifferentiableSum.apply(torch.cat([wide.sum(others), number]))  # pyright: ignore[reportAssignmentType]
    count = total[-1].detach()
    mean = total[:-1] / count
    apart = wide - mean.view(shape)
    squares: Tensor = DifferentiableSum.apply(apart.square().sum(others))  # pyright: ignore[reportAssignmentType]
    variance = squares / count
    if layer.track_running_stats:
        with torch.no_grad():
            layer.num_batches_tracked.add_(1)
            # Without a momentum it is the mean of all batches so far.
            rate = 1 / layer.num_batches_tracked if layer.momentum is None else layer.momentum
            layer.running_mean.lerp_(mean.to(layer.running_mean.dtype), rate)
            unbiased = variance * (count / (count - 1))
            layer.running_var.lerp_(unbiased.to(layer.running_var.dtype), rate)
    scale = (variance + layer.eps).rsqrt()
    if layer.affine:
        scale = scale * layer.weight
    normalised = apart * scale.view(shape)
    if layer.affine:
        normalised = normalised + layer.bias.view(shape)
    return normalised.to(x.dtype)
