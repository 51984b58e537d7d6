"""Kernel of the crop and mirror image."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import Launch

# Elements of the result per program.
CHUNK = 1024


@triton.jit
def shift_of(corner, PADDING: tl.constexpr, SIZE: tl.constexpr):
    """Return how far a crop is shifted, int32; SIZE or more shifts all of the image away."""
    return tl.minimum(tl.maximum(tl.load(corner) - PADDING, -SIZE), SIZE).to(tl.int32)


@triton.jit
def reflected(place, SIZE: tl.constexpr):
    """Return the place inside an axis that one beyond its ends mirrors; far beyond, some place."""
    place = SIZE - 1 - tl.abs(SIZE - 1 - tl.abs(place))
    return tl.minimum(tl.maximum(place, 0), SIZE - 1)


@triton.jit
def augment_kernel(
    out,
    images,
    indices,
    top,
    left,
    mirror,
    count,
    PADDING: tl.constexpr,
    REFLECT: tl.constexpr,
    MOVED: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Write one chunk of one image of the result, whose elements lie as (row, column, channel)."""
    SIZE: tl.constexpr = HEIGHT * WIDTH * CHANNELS
    PARTS: tl.constexpr = (SIZE + CHUNK - 1) // CHUNK
    number = tl.program_id(0) // PARTS
    offsets = tl.program_id(0) % PARTS * CHUNK + tl.arange(0, CHUNK)
    channel = offsets % CHANNELS
    column = offsets // CHANNELS % WIDTH
    row = offsets // (CHANNELS * WIDTH)
    if MOVED:
        column = tl.where(tl.load(mirror + number) != 0, WIDTH - 1 - column, column)
        row += shift_of(top + number, PADDING, HEIGHT)
        column += shift_of(left + number, PADDING, WIDTH)
        if REFLECT:
            row = reflected(row, HEIGHT)
            column = reflected(column, WIDTH)
    inside = (row >= 0) & (row < HEIGHT) & (column >= 0) & (column < WIDTH)
    inside = inside & (channel < DEPTH) & (offsets < SIZE)
    image = tl.minimum(tl.maximum(tl.load(indices + number), 0), count - 1)
    source = images + image * (HEIGHT * WIDTH * DEPTH)
    pixels = tl.load(source + (row * WIDTH + column) * DEPTH + channel, mask=inside, other=0)
    values = tl.math.div_rn(pixels.to(tl.float32), 255.0).to(out.dtype.element_ty)
    target = out + number.to(tl.int64) * SIZE + offsets
    if SIZE % CHUNK == 0:
        tl.store(target, values)
    else:
        tl.store(target, values, mask=offsets < SIZE)


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
    """Launch the kernel, one chunk of one image per program."""
    count, height, width, depth = images.shape
    shape = (len(indices), height, width, channels or depth)
    out = torch.empty(shape, dtype=out_dtype, device=images.device)
    drawn = (None, None, None)
    if top is not None and left is not None and mirror is not None:
        drawn = (top.contiguous(), left.contiguous(), mirror.contiguous().view(torch.uint8))
    if out.numel():
        args = (out, images, indices.contiguous(), *drawn, count)
        constants = {
            "PADDING": padding,
            "REFLECT": reflect,
            "MOVED": top is not None,
            "HEIGHT": height,
            "WIDTH": width,
            "DEPTH": depth,
            "CHANNELS": shape[3],
            "CHUNK": CHUNK,
        }
        programs = len(indices) * -(-out[0].numel() // CHUNK)
        Launch(augment_kernel, programs, images.device, args, constants).run()
    return out.permute(0, 3, 1, 2)
