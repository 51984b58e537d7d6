"""How kernels find their share of a list of tensors: see ``tables.py``."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pointer_to(addresses, segment, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return where a tensor begins; a multiple of 16 bytes lets the compiler use wide accesses."""
    pointer = tl.load(addresses + segment).to(tl.pointer_type(DTYPE))  # pyright: ignore[reportArgumentType]
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def my_segment(chunks):
    """Return which tensor this program works on, int64."""
    return tl.load(chunks + 2 * tl.program_id(0).to(tl.int64)).to(tl.int64)


@triton.jit
def my_start(chunks, CHUNK: tl.constexpr):
    """Return the first element of this program's chunk of its tensor, int32."""
    return tl.load(chunks + 2 * tl.program_id(0).to(tl.int64) + 1) * CHUNK


@triton.jit
def number(value, ON_DEVICE: tl.constexpr):
    """Return a number that the host passed, or that lies in device memory, as float32."""
    if ON_DEVICE:
        return tl.load(value).to(tl.float32)
    else:  # the compiler leaves out a branch that is not taken, but not what follows one
        return value
