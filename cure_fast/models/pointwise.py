"""Narrow 1x1 convolutions with a stride, kept from an implementation that writes out of bounds.

For the weight gradient of a 1x1 convolution with a stride, on channels_last features whose size the
stride divides, oneDNN gathers the positions that it reads, a stretch of them at a time, in a buffer
of positions times ``in_channels`` numbers. A stretch is put at its first position times the block
of channels (8 with AVX2, 16 with AVX-512), not times ``in_channels``. With fewer channels than a
block it ends behind the buffer: in other memory of the process, or in another thread's buffer. Seen
in oneDNN 3.10.2 (torch 2.11) and in the sources of 3.8; docs/log.md has the evidence.
"""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

# The widest block of channels, that of AVX-512, on every CPU: results do not depend on which.
BLOCK = 16


def thin_first(stride: tuple[int, ...], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return a 1x1 convolution of features [..., I, H, W], computed without a stride on CPUs.

    What the stride skips is dropped first, which changes neither result nor gradients.
    """
    if x.device.type != "cpu":
        return F.conv2d(x, weight, bias, stride)
    return F.conv2d(x[..., :: stride[0], :: stride[1]], weight, bias)


def protect_pointwise(model: nn.Module) -> None:
    """Have :func:`thin_first` compute every ``nn.Conv2d`` that oneDNN would corrupt memory for.

    Names, weights, types and settings of the layers stay as they are. Convolutions that code of the
    network calls as functions are out of its reach, and so is a layer with a ``_conv_forward`` of
    its own.
    """
    for module in model.modules():
        if (
            isinstance(module, nn.Conv2d)
            and module.kernel_size == (1, 1)
            and module.stride != (1, 1)
            and module.padding in ((0, 0), "valid")
            and module.groups == 1
            and module.in_channels < BLOCK
            and type(module)._conv_forward is nn.Conv2d._conv_forward
        ):
            # An attribute of the layer itself hides the method, for subclasses too, such as those
            # that torch's parametrizations make.
            module._conv_forward = partial(thin_first, module.stride)  # pyright: ignore[reportAttributeAccessIssue]


def restore_pointwise(model: nn.Module) -> None:
    """Undo :func:`protect_pointwise`, for a network that only goes into a file."""
    for module in model.modules():
        vars(module).pop("_conv_forward", None)
