"""Scores, and the integers that have their order."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def score_of(nat, adv, alpha, rest, SCORE: tl.constexpr):
    """Return the prominence of float32 gradients; the one formula of all kernels."""
    if SCORE == "abs":
        return alpha * tl.abs(nat) + rest * tl.abs(adv)
    total = alpha * nat + rest * adv
    if SCORE == "signed":
        return total
    return tl.abs(total)


@triton.jit
def key_of(score, SIGNED: tl.constexpr):
    """Return uint32 in the order of the scores, NaN last; 31 bits where none is negative."""
    bits = score.to(tl.int32, bitcast=True)
    if SIGNED:
        # -0 equals 0. Negative numbers rise as their bits fall.
        bits = tl.where(score == 0, 0, bits)
        key = (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)
        return tl.where(score != score, 0xFFFFFFFF, key)
    # Only a NaN can have the sign bit here; without it, NaN lies above infinity.
    return (bits & 0x7FFFFFFF).to(tl.uint32, bitcast=True)


@triton.jit
def score_with(key, SIGNED: tl.constexpr):
    """Return the float32 score that has a key."""
    bits = key.to(tl.int32, bitcast=True)
    if SIGNED:
        bits = tl.where(bits < 0, bits ^ -2147483648, ~bits)
    return bits.to(tl.float32, bitcast=True)
