"""The random numbers of ``kernels/philox.py`` inside kernels, uniform ones bit for bit.

``seed`` is an integer argument of the kernel, and ``step`` an int64 that it has loaded: see
:func:`cure_fast.kernels.philox.step_tensor`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def words(seed, index, step, STREAM: tl.constexpr):
    """Return the first two random words of each index (int32 or int64 >= 0) as uint32."""
    step = step.to(tl.uint64)
    low, high = (step & 0xFFFFFFFF).to(tl.uint32), (step >> 32).to(tl.uint32)
    stream = tl.full((), STREAM, tl.uint32)
    c0 = index.to(tl.uint32)
    c0, c1, _, _ = tl.philox(seed, c0, low, high, stream)  # pyright: ignore[reportGeneralTypeIssues]
    return c0, c1


@triton.jit
def uniform(seed, index, step, STREAM: tl.constexpr):
    """Return float32 of U[0, 1), one per index."""
    first, _ = words(seed, index, step, STREAM)  # pyright: ignore[reportGeneralTypeIssues]
    return unit(first)


@triton.jit
def normal(seed, index, step, STREAM: tl.constexpr):
    """Return float32 of N(0, 1), one per index."""
    first, second = words(seed, index, step, STREAM)  # pyright: ignore[reportGeneralTypeIssues]
    return tl.sqrt(-2 * tl.log(1 - unit(first))) * cosine_of_turns(unit(second))


@triton.jit
def unit(word):
    """Return the upper 24 bits of a word as float32 in [0, 1)."""
    return (word >> 8).to(tl.int32).to(tl.float32) * (2.0**-24)


@triton.jit
def cosine_of_turns(turns):
    """Return cos(2 * pi * turns) for turns in [0, 1), within 3e-7.

    ``tl.cos`` reserves local memory for arguments of any size (32 bytes a thread on sm_90).
    The argument here is reduced exactly: the cosine is -sin(2 * pi * a), |a| <= 1/4, and the
    polynomial is the odd one of degree 9 with the smallest largest error there (4e-9).
    """
    a = 0.25 - tl.abs(turns - 0.5)
    s = a * a
    p = ((39.536705 * s - 76.54978) * s + 81.601006) * s - 41.341656
    return -((p * s + 6.283185) * a)
