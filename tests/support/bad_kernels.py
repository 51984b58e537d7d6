"""Kernels with the faults that test_compiled.py looks for, to show that it would see them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from cure_fast.kernels.device.launching import Launch

CPU = torch.device("cpu")


@triton.jit
def loaded_offset_kernel(out, source, starts, n, BLOCK: tl.constexpr):
    """Begin at an offset that is known when it runs only, as nothing proves it to be aligned."""
    offsets = tl.load(starts + tl.program_id(0)) + tl.arange(0, BLOCK)
    tl.store(out + offsets, tl.load(source + offsets, mask=offsets < n), mask=offsets < n)


@triton.jit
def huge_block_kernel(out, source, BLOCK: tl.constexpr):
    """Hold more numbers per thread than it has registers."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(source + offsets)
    tl.store(out + offsets, values / (tl.sum(values) + tl.sum(values * values / tl.max(values))))


@triton.jit
def inexact_kernel(out, source, BLOCK: tl.constexpr):
    """Round once where the reference rounds twice, and take denormal numbers for 0."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(source + offsets)
    tl.store(out + offsets, tl.math.rsqrt(tl.fma(values, values, values)))


@triton.jit
def number_at(value, LOADED: tl.constexpr):
    if LOADED:
        return tl.load(value)
    return value


@triton.jit
def two_types_kernel(out, value):
    """Return a number or a pointer, which the interpreter lets pass."""
    tl.store(out, number_at(value, True))


def launch_loaded_offset() -> None:
    starts = torch.zeros(8, dtype=torch.int32)
    args = (torch.empty(8192), torch.empty(8192), starts, 8192)
    Launch(loaded_offset_kernel, 8, CPU, args, {"BLOCK": 1024}).run()


def launch_huge_block() -> None:
    args = (torch.empty(32768), torch.empty(32768))
    Launch(huge_block_kernel, 1, CPU, args, {"BLOCK": 32768}).run()


def launch_inexact() -> None:
    args = (torch.empty(1024), torch.empty(1024))
    Launch(inexact_kernel, 1, CPU, args, {"BLOCK": 1024}).run()


def launch_two_types() -> None:
    Launch(two_types_kernel, 1, CPU, (torch.empty(1), torch.empty(1))).run()


CASES: dict[str, Callable[[], object]] = {}

VARIANTS = {
    "bad offset": launch_loaded_offset,
    "bad block": launch_huge_block,
    "bad rounding": launch_inexact,
    "bad types": launch_two_types,
}
ON_EACH_GPU, KINDS = (), ("bad offset", "bad block", "bad rounding")
