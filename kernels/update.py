"""The whole update of a step in one pass: mask, SGD, average of the weights, working copies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from . import dispatch
from .checking import check_choice, check_lists, check_scalar, check_tensor, per_tensor
from .ema import average_ref, check_averages
from .rgp import check_scores, is_below

Conserve = Literal["gradient", "weight"]


def masked_sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor] | None,
    *,
    lr: float | Tensor,
    momentum: float = 0.0,
    weight_decay: float | Sequence[float] | Tensor = 0.0,
    nesterov: bool = False,
    scores: Sequence[Tensor | None] | None = None,
    thresholds: Tensor | None = None,
    conserve: Conserve = "gradient",
    averages: Sequence[Tensor] | None = None,
    decay: float | Tensor = 0.999,
    moved: Tensor | None = None,
    low_precision_copies: Sequence[Tensor] | None = None,
    skip: Tensor | None = None,
) -> None:
    """Update a whole model in place: mask, SGD, average, working copies, in one pass.

    The step is that of ``torch.optim.SGD`` without dampening (on a GPU, of its foreach form): with
    g the masked gradient, w the weight and v its momentum buffer, ``g += weight_decay * w``, then
    ``v = momentum * v + g``, then ``w -= lr * v``; with nesterov ``w -= lr * (g + momentum * v)``.
    Buffers begin as zeros. Averages and copies are made of the new weights.

    Args:
        params: L weight tensors, float32, changed in place.
        grads: L gradients of the same shapes, floating; they are read, not masked in place.
        momentum_buffers: L tensors, float32, changed in place; None where ``momentum`` is 0.
        lr: learning rate, at least 0; a number or a 0-d floating tensor on the device.
        momentum: factor of the momentum, at least 0.
        weight_decay: factor of the weights in the gradient, at least 0; a number, one per tensor,
            or a float32 tensor [L] on the device.
        nesterov: look ahead by one step of momentum.
        scores: L score tensors of the same shapes, floating; None for a tensor that is not masked,
            or for all. See :func:`cure_fast.kernels.rgp_select`.
        thresholds: float32 [L] or longer; entries whose score is strictly below are masked.
        conserve: ``gradient`` makes a masked gradient zero, so that momentum and weight decay still
            move the weight (CURE's paper and code); ``weight`` leaves a masked weight as it is,
            while its momentum buffer goes on as with ``gradient``.
        averages: L tensors, float32, moved as by :func:`cure_fast.kernels.ema_update_`; or None.
        decay: share of the old average that stays, in [0, 1]; a number or a 0-d floating tensor.
        moved: 0-d bool tensor, whether averages move (see :func:`cure_fast.kernels.flip_coin`);
            None moves them at each call.
        low_precision_copies: L bfloat16 or float16 tensors that take the new weights; or None.
        skip: 0-d bool tensor; where it is true nothing changes, for steps that are not finite.

    Raises:
        TypeError: for arguments of another type or dtype.
        ValueError: for a number out of range, lists, shapes or devices that do not match, momentum
            without buffers, scores without thresholds, or nesterov without momentum.
    """
    device = _check_tensors(params, grads, momentum_buffers, averages, low_precision_copies)
    _check_numbers(device, lr, momentum, nesterov, momentum_buffers)
    weight_decay = _check_weight_decay(weight_decay, len(params), device)
    _check_flag("moved", moved, device)
    _check_flag("skip", skip, device)
    check_choice("conserve", conserve, ("gradient", "weight"))
    if averages is not None:
        check_averages(averages, params, decay)
    if (scores is None) != (thresholds is None):
        raise ValueError("scores and thresholds: expected both or neither.")
    if scores is not None and thresholds is not None:
        check_scores("params", params, scores, thresholds)
    dispatch.run(
        "update",
        masked_sgd_ref,
        device,
        params,
        grads,
        momentum_buffers,
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        nesterov=nesterov,
        scores=scores,
        thresholds=thresholds,
        conserve=conserve,
        averages=averages,
        decay=decay,
        moved=moved,
        low_precision_copies=low_precision_copies,
        skip=skip,
    )


@torch.no_grad()
def masked_sgd_ref(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor] | None,
    *,
    lr: float | Tensor,
    momentum: float = 0.0,
    weight_decay: float | Sequence[float] | Tensor = 0.0,
    nesterov: bool = False,
    scores: Sequence[Tensor | None] | None = None,
    thresholds: Tensor | None = None,
    conserve: Conserve = "gradient",
    averages: Sequence[Tensor] | None = None,
    decay: float | Tensor = 0.999,
    moved: Tensor | None = None,
    low_precision_copies: Sequence[Tensor] | None = None,
    skip: Tensor | None = None,
) -> None:
    """Compute :func:`masked_sgd_` tensor by tensor, with the calls of torch.optim.SGD."""
    decays = _per_tensor_decay(weight_decay, len(params))
    going = None if skip is None else skip == 0
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        before, g = param.clone(), grad.float()
        masked = None
        if scores is not None and thresholds is not None:
            values = scores[i]
            masked = None if values is None else is_below(values, thresholds[i])
        if masked is not None:
            g = g.masked_fill(masked, 0)
        factor = decays[i]
        if isinstance(factor, Tensor):
            g = g.addcmul(param, factor)
        else:
            g = g.add(param, alpha=factor)
        if momentum_buffers is not None:
            buffer = momentum_buffers[i]
            v = buffer.mul(momentum).add(g)
            buffer.copy_(v if going is None else torch.where(going, v, buffer))
            g = g.add(v, alpha=momentum) if nesterov else v
        after = param - lr * g if isinstance(lr, Tensor) else param.add(g, alpha=-lr)
        if conserve == "weight" and masked is not None:
            after = torch.where(masked, before, after)
        param.copy_(after if going is None else torch.where(going, after, before))
    moving = torch.ones((), dtype=torch.bool) if moved is None else moved
    if params and averages is not None:
        moving = moving.to(params[0].device)
        average_ref(
            averages, params, decay=decay, moved=moving if going is None else moving & going
        )
    for copy, param in zip(low_precision_copies or (), params, strict=False):
        copy.copy_(param if going is None else torch.where(going, param, copy.float()))


def _per_tensor_decay(
    weight_decay: float | Sequence[float] | Tensor, count: int
) -> Sequence[float | Tensor]:
    if isinstance(weight_decay, Tensor):
        return list(weight_decay)
    return list(weight_decay) if isinstance(weight_decay, Sequence) else [weight_decay] * count


def _check_tensors(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor] | None,
    averages: Sequence[Tensor] | None,
    low_precision_copies: Sequence[Tensor] | None,
) -> torch.device:
    """Check shapes, devices and dtypes of the lists; return the device."""
    lists = {
        "params": params,
        "grads": grads,
        "momentum_buffers": momentum_buffers,
        "averages": averages,
        "low_precision_copies": low_precision_copies,
    }
    present = {name: tensors for name, tensors in lists.items() if tensors is not None}
    device = check_lists(present)
    half = (torch.bfloat16, torch.float16)
    for name, wanted, advice in (
        ("params", (torch.float32,), "Keep master weights; low_precision_copies takes the others."),
        ("momentum_buffers", (torch.float32,), "Allocate them with torch.zeros_like(param)."),
        ("averages", (torch.float32,), "Average the master weights."),
        ("low_precision_copies", half, "Leave the argument out if there is none."),
    ):
        for i, tensor in enumerate(present.get(name, ())):
            if tensor.dtype not in wanted:
                names = " or ".join(str(dtype) for dtype in wanted)
                raise TypeError(f"{name}[{i}]: expected {names}, got {tensor.dtype}. {advice}")
    return device


def _check_numbers(
    device: torch.device,
    lr: float | Tensor,
    momentum: float,
    nesterov: bool,
    momentum_buffers: Sequence[Tensor] | None,
) -> None:
    check_scalar("lr", lr, device, 0)
    per_tensor("momentum", momentum, 1, 0)
    if momentum and momentum_buffers is None:
        raise ValueError(
            "momentum_buffers: expected one per tensor with momentum above 0, got None."
        )
    if nesterov and not momentum:
        raise ValueError("nesterov: expected momentum above 0 with it, got 0.")


def _check_weight_decay(
    weight_decay: float | Sequence[float] | Tensor, count: int, device: torch.device
) -> float | Sequence[float] | Tensor:
    if not isinstance(weight_decay, Tensor):
        numbers = per_tensor("weight_decay", weight_decay, count, 0)
        return numbers if isinstance(weight_decay, Sequence) else float(weight_decay)
    check_tensor("weight_decay", weight_decay)
    if weight_decay.shape != (count,) or weight_decay.dtype != torch.float32:
        raise ValueError(
            f"weight_decay: expected a float32 tensor [{count}], one number per tensor, got "
            f"{weight_decay.dtype} {list(weight_decay.shape)}."
        )
    if weight_decay.device != device:
        raise ValueError(f"weight_decay: expected {device}, got {weight_decay.device}.")
    return weight_decay


def _check_flag(name: str, flag: Tensor | None, device: torch.device) -> None:
    if flag is None:
        return
    check_tensor(name, flag, floating=False)
    if flag.dtype != torch.bool or flag.ndim or flag.device != device:
        raise ValueError(
            f"{name}: expected a 0-d bool tensor on {device}, got {flag.dtype} "
            f"{list(flag.shape)} on {flag.device}."
        )
