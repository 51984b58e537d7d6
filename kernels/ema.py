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
from .checking import check_flag, check_lists, check_scalar, check_tensor
from .in_place import check_in_place
from .philox import COIN, check_key, philox_uniform

# Elements of what a CPU averages at once, which stay in its cache from one pass to the next.
PIECE = 2**18
# What kernels move and copy.
DTYPES = (
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)


def flip_coin(
    rate: float | Tensor, *, seed: int, step: Tensor | int, device: torch.device | str | None = None
) -> Tensor:
    """Return whether a coin of probability ``rate`` lands, without waiting for the device.

    The answer is a function of (seed, step) alone, the same on every device. In a CUDA graph give
    ``step`` as a tensor that the graph advances: each replay then tosses afresh.

    Args:
        rate: probability, in [0, 1]; a number, or a 0-d floating tensor, which is not read.
        seed: key of the random numbers, in [0, 2**64).
        step: number of the toss, in [0, 2**63): an int, or a 0-d int64 tensor, not advanced.
        device: where the answer is wanted, such as ``"cuda"``; that of ``step`` by default, or the
            CPU.

    Returns:
        0-d bool tensor.

    Raises:
        TypeError: for arguments of another type.
        ValueError: for a number out of range, or tensors on different devices.
    """
    where = device_of(step, device)
    check_scalar("rate", rate, where, 0, 1)
    check_key(seed, step, where)
    rate = plain_number(rate)
    return dispatch.run("ema", flip_coin_ref, where, rate, seed=seed, step=step, device=where)


def flip_coin_ref(
    rate: float | Tensor, *, seed: int, step: Tensor | int, device: torch.device | str | None = None
) -> Tensor:
    """Compute :func:`flip_coin` by torch's integers."""
    device = device_of(step, device)
    first = torch.zeros((), dtype=torch.int64, device=device)
    return philox_uniform(seed, first, step, stream=COIN) < rate


def ema_update_(
    averages: Sequence[Tensor],
    params: Sequence[Tensor],
    *,
    decay: float | Tensor,
    rate: float | Tensor = 1.0,
    seed: int = 0,
    step: Tensor | int | None = None,
    skip: Tensor | None = None,
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
        step: number of the toss, in [0, 2**63): an int, or a 0-d int64 tensor, not advanced;
            needed unless ``rate`` is the number 1. The same number tosses the same coin.
        skip: 0-d bool tensor; where it is true nothing moves, for steps that are not finite.

    Returns:
        0-d bool tensor on the device of ``averages``.

    Raises:
        TypeError: for arguments of another type, an average and a parameter of which only one is
            floating, or others whose dtypes differ.
        ValueError: for a number out of range, lists, shapes or devices that do not match, an
            average with gaps or with the memory of another tensor, or a rate below 1 without
            ``step``.
    """
    device = check_averages(averages, params, decay)
    check_in_place({"averages": averages}, {"params": params})
    check_scalar("rate", rate, device, 0, 1)
    if step is None and (isinstance(rate, Tensor) or rate < 1):
        raise ValueError(
            "step: expected the number of the step with a rate below 1, got None. The same number "
            "tosses the same coin; pass another at each step."
        )
    check_key(seed, 0 if step is None else step, device)
    check_flag("skip", skip, device)
    return dispatch.run(
        "ema",
        ema_update_ref,
        device,
        averages,
        params,
        decay=plain_number(decay),
        rate=plain_number(rate),
        seed=seed,
        step=step,
        skip=skip,
    )


def ema_update_ref(
    averages: Sequence[Tensor],
    params: Sequence[Tensor],
    *,
    decay: float | Tensor,
    rate: float | Tensor = 1.0,
    seed: int = 0,
    step: Tensor | int | None = None,
    skip: Tensor | None = None,
) -> Tensor:
    """Compute :func:`ema_update_` tensor by tensor."""
    device = averages[0].device if averages else torch.device("cpu")
    moved = flip_coin_ref(rate, seed=seed, step=0 if step is None else step, device=device)
    if skip is not None:
        moved = moved & ~skip
    average_ref(averages, params, decay=decay, moved=moved)
    return moved


def copy_where_(targets: Sequence[Tensor], sources: Sequence[Tensor], *, condition: Tensor) -> None:
    """Copy all ``sources`` into ``targets`` if ``condition`` holds, without reading it back.

    So a step that turned out not to be finite can take back what it has moved.

    Args:
        targets: tensors that are overwritten; of integers, bool, float16, bfloat16, float32 and
            float64.
        sources: tensors of the same shapes and dtypes.
        condition: 0-d bool tensor on their device.

    Raises:
        TypeError: for arguments of another type, or dtypes that differ or that kernels lack.
        ValueError: for lists, shapes or devices that do not match, or a target with gaps or with
            the memory of another tensor.
    """
    device = check_lists({"targets": targets, "sources": sources}, floating=False)
    _check_dtypes("targets", targets)
    for i, (target, source) in enumerate(zip(targets, sources, strict=True)):
        _check_alike("sources", "targets", i, source, target)
    check_in_place({"targets": targets}, {"sources": sources})
    check_flag("condition", check_tensor("condition", condition, floating=False), device)
    dispatch.run("ema", copy_where_ref, device, targets, sources, condition=condition)


@torch.no_grad()
def copy_where_ref(
    targets: Sequence[Tensor], sources: Sequence[Tensor], *, condition: Tensor
) -> None:
    """Compute :func:`copy_where_` tensor by tensor."""
    for target, source in zip(targets, sources, strict=True):
        target.copy_(torch.where(condition, source, target))


@torch.no_grad()
def average_ref(
    averages: Sequence[Tensor], params: Sequence[Tensor], *, decay: float | Tensor, moved: Tensor
) -> None:
    """Move ``averages`` where the 0-d bool ``moved`` says so."""
    if moved.device.type == "cpu":
        if moved:  # On the CPU reading it is free, and most steps do not move.
            _average_on_cpu(averages, params, 1 - float(decay))
        return
    for average, param in zip(averages, params, strict=True):
        after = lerp(average, param, decay) if average.is_floating_point() else param
        average.copy_(torch.where(moved, after, average))


def _average_on_cpu(averages: Sequence[Tensor], params: Sequence[Tensor], weight: float) -> None:
    """Move averages by ``weight``, rounded as :func:`lerp` does; torch's own rounds once less."""
    for average, param in zip(averages, params, strict=True):
        if not average.is_floating_point():
            average.copy_(param)
        elif average.dtype == param.dtype and average.dtype in (torch.float32, torch.float64):
            pieces = [(average, param)]
            if average.stride() == param.stride() and average.numel() > PIECE:
                flat = (t.as_strided((t.numel(),), (1,)).split(PIECE) for t in (average, param))
                pieces = zip(*flat, strict=True)
            for piece, towards in pieces:
                way = towards - piece
                if weight < 0.5:
                    piece.add_(way.mul_(weight))
                else:
                    torch.sub(towards, way.mul_(1 - weight), out=piece)
        else:
            average.copy_(lerp(average, param, 1 - weight))


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
    _check_dtypes("averages", averages)
    _check_dtypes("params", params)
    for i, (average, param) in enumerate(zip(averages, params, strict=True)):
        if not (average.is_floating_point() and param.is_floating_point()):
            _check_alike("params", "averages", i, param, average)
    return device


def device_of(step: Tensor | int, device: torch.device | str | None) -> torch.device:
    """Return where a coin is wanted, with an index where it is a GPU: see :func:`flip_coin`."""
    if device is None:
        return step.device if isinstance(step, Tensor) else torch.device("cpu")
    where = torch.device(device)
    if where.type == "cuda" and where.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return where


def plain_number(value: float | Tensor) -> float | Tensor:
    """Return a number as the type that kernels take: integers and NumPy's would be others."""
    return value if isinstance(value, Tensor) else float(value)


def _check_dtypes(name: str, tensors: Sequence[Tensor]) -> None:
    for i, tensor in enumerate(tensors):
        if tensor.dtype not in DTYPES:
            raise TypeError(
                f"{name}[{i}]: expected one of {', '.join(map(str, DTYPES))}, got {tensor.dtype}."
            )


def _check_alike(name: str, like_name: str, i: int, tensor: Tensor, like: Tensor) -> None:
    if tensor.dtype != like.dtype:
        raise TypeError(
            f"{name}[{i}]: expected {like.dtype}, that of {like_name}[{i}], got {tensor.dtype}."
        )
