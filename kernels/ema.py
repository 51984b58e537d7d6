"""Averages of weights over steps, and the coin that decides whether they move.

The stochastic momentum update of CURE's revision model (Gowda et al., ICLR 2024, Eq. 7) moves the
whole set with a probability. With probability 1 it is the plain exponential moving average, which
PIAT's interpolation, SWA and weight averaging use too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import dispatch
from .checking import check_lists, check_scalar
from .philox import COIN, check_key, philox_uniform


def flip_coin(
    rate: float | Tensor, *, seed: int, step: Tensor | int, device: torch.device | None = None
) -> Tensor:
    """Return whether a coin of probability ``rate`` lands, without waiting for the device.

    The answer is a function of (seed, step) alone, the same on every device. In a CUDA graph give
    ``step`` as a tensor that the graph advances: each replay then tosses afresh.

    Args:
        rate: probability, in [0, 1]; a number, or a 0-d floating tensor, which is not read.
        seed: key of the random numbers, in [0, 2**64).
        step: number of the toss, in [0, 2**63): an int, or a 0-d int64 tensor, not advanced.
        device: where the answer is wanted; that of ``step`` by default, or the CPU.

    Returns:
        0-d bool tensor.

    Raises:
        TypeError: for arguments of another type.
        ValueError: for a number out of range, or tensors on different devices.
    """
    if device is None:
        device = step.device if isinstance(step, Tensor) else torch.device("cpu")
    check_scalar("rate", rate, device, 0, 1)
    check_key(seed, step, device)
    return dispatch.run("ema", flip_coin_ref, device, rate, seed=seed, step=step, device=device)


def flip_coin_ref(
    rate: float | Tensor, *, seed: int, step: Tensor | int, device: torch.device | None = None
) -> Tensor:
    """Compute :func:`flip_coin` by torch's integers."""
    if device is None:
        device = step.device if isinstance(step, Tensor) else torch.device("cpu")
    first = torch.zeros((), dtype=torch.int64, device=device)
    return philox_uniform(seed, first, step, stream=COIN) < rate


def ema_update_(
    averages: Sequence[Tensor],
    params: Sequence[Tensor],
    *,
    decay: float | Tensor,
    rate: float | Tensor = 1.0,
    seed: int = 0,
    step: Tensor | int = 0,
) -> Tensor:
    """Move all ``averages`` towards ``params`` with probability ``rate``; return whether so.

    A move is ``average = decay * average + (1 - decay) * param`` for floating tensors and a copy
    for others (such as BatchNorm's count of batches). One coin decides for the whole set, on
    the tensors' device: nothing is read back to the host. See :func:`flip_coin` for CUDA graphs.

    Args:
        averages: tensors to move, changed in place; float64 ones are moved in float64, other
            floating ones in float32.
        params: tensors to move towards, same shapes; floating where the average is.
        decay: share of the old average that stays, in [0, 1]; a number or a 0-d floating tensor.
        rate: probability of a move, in [0, 1]; a number or a 0-d floating tensor. 1 is a plain
            exponential moving average, without a coin.
        seed: key of the coin, in [0, 2**64).
        step: number of the toss, in [0, 2**63): an int, or a 0-d int64 tensor, not advanced.

    Returns:
        0-d bool tensor on the device of ``averages``.

    Raises:
        TypeError: for arguments of another type, or an average and a parameter of which only one is
            floating.
        ValueError: for a number out of range, or lists, shapes or devices that do not match.
    """
    device = check_averages(averages, params, decay)
    check_scalar("rate", rate, device, 0, 1)
    check_key(seed, step, device)
    return dispatch.run(
        "ema",
        ema_update_ref,
        device,
        averages,
        params,
        decay=decay,
        rate=rate,
        seed=seed,
        step=step,
    )


def ema_update_ref(
    averages: Sequence[Tensor],
    params: Sequence[Tensor],
    *,
    decay: float | Tensor,
    rate: float | Tensor = 1.0,
    seed: int = 0,
    step: Tensor | int = 0,
) -> Tensor:
    """Compute :func:`ema_update_` tensor by tensor."""
    device = averages[0].device if averages else torch.device("cpu")
    moved = flip_coin_ref(rate, seed=seed, step=step, device=device)
    average_ref(averages, params, decay=decay, moved=moved)
    return moved


@torch.no_grad()
def average_ref(
    averages: Sequence[Tensor], params: Sequence[Tensor], *, decay: float | Tensor, moved: Tensor
) -> None:
    """Move ``averages`` where the 0-d bool ``moved`` says so."""
    if moved.device.type == "cpu" and not moved:
        return  # On the CPU reading it is free, and most steps do not move.
    for average, param in zip(averages, params, strict=True):
        after = lerp(average, param, decay) if average.is_floating_point() else param
        average.copy_(torch.where(moved, after, average))


def lerp(average: Tensor, param: Tensor, decay: float | Tensor) -> Tensor:
    """Return ``decay * average + (1 - decay) * param``, rounded as the kernels round it.

    As in torch.lerp, the end that is nearer is the one moved, so that a decay of 0 and of 1 is
    exact.
    """
    dtype = torch.float64 if average.dtype == torch.float64 else torch.float32
    old, new = average.to(dtype), param.to(dtype)
    weight = step_weight(decay, average.device).to(dtype)
    way = new - old
    return torch.where(weight < 0.5, old + weight * way, new - way * (1 - weight))


def step_weight(decay: float | Tensor, device: torch.device) -> Tensor:
    """Return ``1 - decay``, the weight of the new value, as a 0-d float64 tensor."""
    if isinstance(decay, Tensor):
        return 1 - decay.double()
    return torch.full((), 1 - decay, dtype=torch.float64, device=device)


def check_averages(
    averages: Sequence[Tensor], params: Sequence[Tensor], decay: float | Tensor
) -> torch.device:
    """Check what is averaged; return the device.

    Raises:
        TypeError: for arguments of another type.
        ValueError: for a decay out of range, or lists, shapes or devices that do not match.
    """
    device = check_lists({"averages": averages, "params": params}, floating=False)
    check_scalar("decay", decay, device, 0, 1)
    for i, (average, param) in enumerate(zip(averages, params, strict=True)):
        if average.is_floating_point() != param.is_floating_point():
            raise TypeError(
                f"params[{i}]: expected a dtype like {average.dtype}, that of averages[{i}], got "
                f"{param.dtype}."
            )
    return device
