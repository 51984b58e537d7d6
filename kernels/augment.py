"""Random crop and mirror image of a batch, from a data set that lies in the device's memory."""

from __future__ import annotations

import torch
from torch import Tensor

from . import dispatch
from .checking import check_tensor

# More is taken for images that lie as [M, C, H, W].
MOST_CHANNELS = 4
# Of padding, and of channels of the result.
LARGEST = 2**20
OUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def augment_crop_flip(
    images: Tensor,
    indices: Tensor,
    *,
    top: Tensor | None,
    left: Tensor | None,
    mirror: Tensor | None,
    padding: int = 4,
    reflect: bool = False,
    out_dtype: torch.dtype = torch.float32,
    channels: int | None = None,
) -> Tensor:
    """Return images of a data set, padded, cropped, mirrored and scaled to [0, 1].

    This is the augmentation of CIFAR training (He et al., CVPR 2016, section 4.2). Pixels are
    divided by 255 in float32 with correct rounding, and then rounded to ``out_dtype``, so every
    device gives the same bits.

    Indices are on the device, where a check would have to wait for it: they are clamped to
    [0, M - 1], so that nothing outside ``images`` is read, and a wrong one shows as the first or
    last image. What a crop takes from outside the padded image is zero too, or with
    ``reflect`` one of its pixels.

    Args:
        images: the data set, uint8 [M, H, W, C], contiguous, M at least 1 and C from 1 to 4.
        indices: which images, int64 [N] in [0, M), on the device of ``images``.
        top: first row of each crop in the padded image, int64 [N] in [0, 2 * padding]. None for
            this and the next two: no crop and no mirror.
        left: first column of each crop, as ``top``.
        mirror: whether each crop is mirrored left to right, bool [N].
        padding: pixels added on every side of an image, in [0, 2**20].
        reflect: whether they are the image mirrored at its outermost pixels, which takes a padding
            below its sides; else they are zero.
        out_dtype: float32, bfloat16 or float16.
        channels: channels of the result, C by default. Those beyond C are zero: convolutions run
            faster on 4 or 8 channels than on 3.

    Returns:
        [N, channels, H, W] in channels_last, in [0, 1].

    Raises:
        TypeError: for a tensor of another dtype, and a padding or channels that is no integer.
        ValueError: for shapes, devices or an ``out_dtype`` other than these, and only some of
            ``top``, ``left`` and ``mirror``.
    """
    _check_images(images)
    _check_each("indices", indices, torch.int64, images)
    drawn = {"top": top, "left": left, "mirror": mirror}
    missing = [name for name, tensor in drawn.items() if tensor is None]
    if missing and len(missing) < len(drawn):
        raise ValueError(f"{missing[0]}: expected a tensor, or None for top, left and mirror.")
    for name, tensor in drawn.items():
        if tensor is not None:
            dtype = torch.bool if name == "mirror" else torch.int64
            _check_each(name, tensor, dtype, images)
            if len(tensor) != len(indices):
                raise ValueError(
                    f"{name}: expected {len(indices)} values, one per index, got {len(tensor)}."
                )
    _check_integer("padding", padding, 0)
    if reflect and padding >= min(images.shape[1:3]):
        raise ValueError(
            f"padding: expected less than the images' sides with reflect, got {padding} for "
            f"{list(images.shape)}."
        )
    if channels is not None:
        _check_integer("channels", channels, images.shape[3])
    if out_dtype not in OUT_DTYPES:
        raise ValueError(
            f"out_dtype: expected one of {', '.join(map(str, OUT_DTYPES))}, got {out_dtype}."
        )
    return dispatch.run(
        "augment",
        augment_crop_flip_ref,
        images.device,
        images,
        indices,
        top=top,
        left=left,
        mirror=mirror,
        padding=padding,
        reflect=reflect,
        out_dtype=out_dtype,
        channels=channels,
    )


def augment_crop_flip_ref(
    images: Tensor,
    indices: Tensor,
    *,
    top: Tensor | None,
    left: Tensor | None,
    mirror: Tensor | None,
    padding: int = 4,
    reflect: bool = False,
    out_dtype: torch.dtype = torch.float32,
    channels: int | None = None,
) -> Tensor:
    """Do :func:`augment_crop_flip` in PyTorch."""
    count, height, width, depth = images.shape
    image = indices.clamp(0, count - 1)[:, None, None]
    row = torch.arange(height, device=images.device)[None, :, None]
    column = torch.arange(width, device=images.device)[None, None, :]
    if top is not None and left is not None and mirror is not None:
        column = torch.where(mirror[:, None, None], width - 1 - column, column)
        row = row + top[:, None, None] - padding
        column = column + left[:, None, None] - padding
        if reflect:
            row = (height - 1 - (height - 1 - row.abs()).abs()).clamp(0, height - 1)
            column = (width - 1 - (width - 1 - column.abs()).abs()).clamp(0, width - 1)
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    pixels = images[image, row.clamp(0, height - 1), column.clamp(0, width - 1)]
    pixels = torch.where(inside[..., None], pixels, 0).float()
    # By a tensor: on a GPU torch turns a division by a number into a product with its reciprocal.
    pixels = pixels / torch.full((), 255.0, dtype=torch.float32, device=images.device)
    shape = (len(indices), height, width, channels or depth)
    out = torch.zeros(shape, dtype=out_dtype, device=images.device)
    out[..., :depth] = pixels
    return out.permute(0, 3, 1, 2)


def _check_images(images: object) -> None:
    tensor = check_tensor("images", images, floating=False)
    if tensor.dtype != torch.uint8:
        raise TypeError(f"images: expected uint8, got {tensor.dtype}.")
    if tensor.ndim != 4 or not tensor.numel():
        raise ValueError(
            f"images: expected shape [M, H, W, C], none of them 0, got {list(tensor.shape)}."
        )
    if tensor.shape[3] > MOST_CHANNELS:
        raise ValueError(
            f"images: expected shape [M, H, W, C] with 1 to {MOST_CHANNELS} channels, got "
            f"{list(tensor.shape)}. From [M, C, H, W] call images.permute(0, 2, 3, 1).contiguous() "
            "once, before the first batch."
        )
    if not tensor.is_contiguous():
        raise ValueError(
            f"images: expected contiguous images, got strides {tensor.stride()}. Call "
            "images.contiguous() once, before the first batch."
        )


def _check_each(name: str, tensor: object, dtype: torch.dtype, images: Tensor) -> None:
    """Check a tensor [N] of ``dtype`` on the device of ``images``."""
    checked = check_tensor(name, tensor, floating=False)
    if checked.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype}, got {checked.dtype}.")
    if checked.ndim != 1:
        raise ValueError(f"{name}: expected shape [N], got {list(checked.shape)}.")
    if checked.device != images.device:
        raise ValueError(
            f"{name}: expected {images.device}, where images is, got {checked.device}. Move it "
            "there first."
        )


def _check_integer(name: str, value: object, low: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}.")
    if not low <= value <= LARGEST:
        raise ValueError(f"{name}: expected an int in [{low}, {LARGEST}], got {value}.")
