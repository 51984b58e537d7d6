"""Random numbers that are functions of (seed, stream, step, index), the same on every device.

Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) turns a
counter of four 32-bit words and a 64-bit key into four random words. Here the key is the seed, and
the counter is (index, low word of the step, high word of the step, stream). ``device/philox.py``
computes the same words inside kernels.

The uses of one seed have different streams, so that their numbers are independent of each other.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

COIN = 1  # whether something happens in a step
START = 2  # first perturbation of an attack, per pixel
RADIUS = 3  # length of the first perturbation of an attack, per image

WORD = 0xFFFFFFFF
# Multipliers and key increments of the paper.
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
INCREMENTS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10

# Words are Python integers or int64 tensors; the arithmetic is the same.
Word = int | Tensor


def philox_uniform(seed: int, index: Tensor, step: Tensor | int = 0, *, stream: int) -> Tensor:
    """Return one number of U[0, 1) per entry of ``index``, float32 in its shape.

    A number is a multiple of 2**-24: the upper 24 bits of the first word.

    Args:
        seed: key of the generator, in [0, 2**64).
        index: which numbers; integers in [0, 2**32), any shape and device.
        step: which draw of these numbers, in [0, 2**63): a number, or a 0-d int64 tensor on the
            device of ``index``, which is read there and not advanced. Where the caller advances it
            inside a CUDA graph, each replay draws fresh numbers.
        stream: which use of the seed, in [0, 2**32); this module names those of the package.

    Raises:
        TypeError: for a seed, index, step or stream of another type.
        ValueError: for a seed, step or stream out of range, or a step that is not 0-d or on another
            device. Values of tensors are not read.
    """
    _check(seed, index, step, stream)
    return _unit(philox_words(seed, (index.long(), *_counter(step), stream))[0])


def philox_normal(seed: int, index: Tensor, step: Tensor | int = 0, *, stream: int) -> Tensor:
    """Return one number of N(0, 1) per entry of ``index``, float32 in its shape.

    Box and Muller's cosine of the first two words; no number is larger than 5.8. The arguments and
    errors are those of :func:`philox_uniform`. Kernels agree to 2e-6, not in the last bit.
    """
    _check(seed, index, step, stream)
    first, second, _, _ = philox_words(seed, (index.long(), *_counter(step), stream))
    radius = torch.sqrt(-2 * torch.log(1 - _unit(first)))
    return radius * torch.cos(2 * math.pi * _unit(second))


def philox_words(
    seed: int, counter: tuple[Word, Word, Word, Word]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four random words of each counter as int64 tensors in [0, 2**32).

    Args:
        seed: the key, in [0, 2**64).
        counter: four words in [0, 2**32), the first an int64 tensor, which says the device; shapes
            broadcast.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = seed & WORD, seed >> 32
    for _ in range(ROUNDS):
        high0, low0 = _product(MULTIPLIERS[0], c0)
        high1, low1 = _product(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + INCREMENTS[0]) & WORD, (k1 + INCREMENTS[1]) & WORD
    return c0, c1, c2, c3  # pyright: ignore[reportReturnType]


def step_tensor(step: Tensor | int, device: torch.device) -> Tensor:
    """Return a step as a 0-d int64 tensor on ``device``, as kernels take it, without waiting."""
    return step if isinstance(step, Tensor) else torch.full((), step, device=device)


def check_key(seed: object, step: object, device: torch.device) -> None:
    """Check a seed and a step as :func:`philox_uniform` takes them, on ``device``.

    Raises:
        TypeError: for another type.
        ValueError: for a number out of range, or a step that is not 0-d or on another device.
    """
    _check_integer("seed", seed, 64)
    if not isinstance(step, Tensor):
        _check_integer("step", step, 63)
        return
    if step.dtype != torch.int64:
        raise TypeError(f"step: expected an int or a 0-d int64 tensor, got {step.dtype}.")
    if step.ndim or step.device != device:
        raise ValueError(
            f"step: expected a 0-d tensor on {device}, got shape {list(step.shape)} on "
            f"{step.device}."
        )


def _check(seed: int, index: Tensor, step: Tensor | int, stream: int) -> None:
    if not isinstance(index, Tensor) or index.is_floating_point() or index.is_complex():
        got = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"index: expected a tensor of integers, got {got}.")
    check_key(seed, step, index.device)
    _check_integer("stream", stream, 32)


def _check_integer(name: str, value: object, bits: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int in [0, 2**{bits}), got {type(value).__name__}.")
    if not 0 <= value < 2**bits:
        raise ValueError(f"{name}: expected an int in [0, 2**{bits}), got {value}.")


def _counter(step: Tensor | int) -> tuple[Word, Word]:
    """Return the low and the high word of the step."""
    return step & WORD, step >> 32


def _product(multiplier: int, word: Word) -> tuple[Word, Word]:
    """Return the high and the low word of a product of two words.

    A product above 2**63 wraps around in int64, which leaves its 64 bits as they are.
    """
    product = word * multiplier
    return (product >> 32) & WORD, product & WORD


def _unit(word: Tensor) -> Tensor:
    """Return the upper 24 bits of a word as float32 in [0, 1): exact, so equal on every device."""
    return (word >> 8).float() * 2**-24
