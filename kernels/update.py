"""The whole update of a step in one pass: mask, SGD, average of the weights, working copies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from . import dispatch
from .checking import (
    check_choice,
    check_flag,
    check_lists,
    check_number,
    check_scalar,
    check_scores,
    check_tensor,
    per_tensor,
)
from .ema import average_ref, plain_number
from .in_place import check_in_place
from .layout import memory_order
from .rgp import is_below
from .tables import TensorList

Conserve = Literal["gradient", "weight"]


def masked_sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor] | None,
    *,
    lr: float | Tensor,
    momentum: float | Tensor = 0.0,
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
        momentum_buffers: L tensors, float32, changed in place; None where ``momentum`` is 0, which
            leaves them as they are.
        lr: learning rate, at least 0; a number or a 0-d floating tensor on the device.
        momentum: factor of the momentum, at least 0; as ``lr``.
        weight_decay: factor of the weights in the gradient, at least 0; a number, one per tensor,
            or a float32 tensor [L] on the device. Numbers that differ are sent at each call, which
            a CUDA graph cannot: give it a tensor.
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
            without buffers, scores without thresholds, nesterov without momentum, moved without
            averages, and tensors changed in place that have gaps, lie in another memory order than
            their weights, or share memory with another tensor.
    """
    device = _check_tensors(params, grads, momentum_buffers, averages, low_precision_copies)
    _check_momentum(momentum, nesterov, momentum_buffers, device)
    check_scalar("lr", lr, device, 0)
    weight_decay = _check_weight_decay(weight_decay, len(params), device)
    check_flag("skip", skip, device)
    check_choice("conserve", conserve, ("gradient", "weight"))
    _check_moving(device, averages, decay, moved)
    _check_mask(params, scores, thresholds)
    dispatch.run(
        "update",
        masked_sgd_ref,
        device,
        params,
        grads,
        momentum_buffers,
        lr=plain_number(lr),
        momentum=plain_number(momentum),
        weight_decay=weight_decay,
        nesterov=nesterov,
        scores=scores,
        thresholds=thresholds,
        conserve=conserve,
        averages=averages,
        decay=plain_number(decay),
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
    momentum: float | Tensor = 0.0,
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
        if momentum_buffers is not None and (isinstance(momentum, Tensor) or momentum):
            buffer = momentum_buffers[i]
            v = buffer.mul(momentum).add(g)
            buffer.copy_(v if going is None else torch.where(going, v, buffer))
            if not nesterov:
                g = v
            elif isinstance(momentum, Tensor):
                g = g + momentum * v
            else:
                g = g.add(v, alpha=momentum)
        after = param - lr * g if isinstance(lr, Tensor) else param.add(g, alpha=-lr)
        if conserve == "weight" and masked is not None:
            after = torch.where(masked, before, after)
        param.copy_(after if going is None else torch.where(going, after, before))
    if params and averages is not None:
        always = torch.ones((), dtype=torch.bool, device=params[0].device)
        moving = always if moved is None else moved
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
    full, half = {torch.float32}, {torch.bfloat16, torch.float16}
    for name, wanted, advice in (
        ("params", full, "Keep master weights; low_precision_copies takes the others."),
        ("momentum_buffers", full, "Allocate them with torch.zeros_like(param)."),
        ("averages", full, "Average the master weights."),
        ("low_precision_copies", half, "Leave the argument out if there is none."),
    ):
        tensors = present.get(name, ())
        if wanted.issuperset(tensor.dtype for tensor in tensors):
            continue
        for i, tensor in enumerate(tensors):
            if tensor.dtype not in wanted:
                names = " or ".join(sorted(map(str, wanted)))
                raise TypeError(f"{name}[{i}]: expected {names}, got {tensor.dtype}. {advice}")
    changed = {name: lists[name] for name in lists if name != "grads"}
    check_in_place(changed, {"grads": grads})
    _check_orders(params, changed)
    return device


def _check_orders(params: Sequence[Tensor], changed: Mapping[str, Sequence[Tensor] | None]) -> None:
    """Check that what is changed lies in memory as the weights do: kernels walk through both."""
    wanted = _orders(params)
    for name, tensors in changed.items():
        if tensors is None or (found := _orders(tensors)) == wanted:
            continue
        i = [a != b for a, b in zip(found, wanted, strict=True)].index(True)
        raise ValueError(
            f"{name}[{i}]: expected strides {params[i].stride()}, those of params[{i}], got "
            f"{tensors[i].stride()}. Make it by torch.empty_like(params[{i}]), after any change of "
            "the model's memory format."
        )


def _orders(tensors: Sequence[Tensor]) -> tuple[tuple[int, ...] | None, ...]:
    """Return the memory order of each tensor."""
    if isinstance(tensors, TensorList):
        return tensors.layout.orders
    return tuple(map(memory_order, tensors))


def _check_momentum(
    momentum: float | Tensor,
    nesterov: bool,
    momentum_buffers: Sequence[Tensor] | None,
    device: torch.device,
) -> None:
    check_scalar("momentum", momentum, device, 0)
    some = isinstance(momentum, Tensor) or momentum != 0
    if some and momentum_buffers is None:
        raise ValueError(
            "momentum_buffers: expected one per tensor with momentum above 0, got None."
        )
    if not isinstance(nesterov, bool):
        raise TypeError(f"nesterov: expected True or False, got {type(nesterov).__name__}.")
    if nesterov and not some:
        raise ValueError("nesterov: expected momentum above 0 with it, got 0.")


def _check_moving(
    device: torch.device,
    averages: Sequence[Tensor] | None,
    decay: float | Tensor,
    moved: Tensor | None,
) -> None:
    check_flag("moved", moved, device)
    check_scalar("decay", decay, device, 0, 1)
    if moved is not None and averages is None:
        raise ValueError("averages: expected a list of tensors with moved, got None.")


def _check_mask(
    params: Sequence[Tensor],
    scores: Sequence[Tensor | None] | None,
    thresholds: Tensor | None,
) -> None:
    if (scores is None) != (thresholds is None):
        raise ValueError("scores and thresholds: expected both or neither.")
    if scores is None or thresholds is None:
        return
    check_scores("params", params, scores, thresholds)


def _check_weight_decay(
    weight_decay: float | Sequence[float] | Tensor, count: int, device: torch.device
) -> float | Sequence[float] | Tensor:
    if isinstance(weight_decay, Sequence):
        return per_tensor("weight_decay", weight_decay, count, 0)
    if not isinstance(weight_decay, Tensor):
        return check_number("weight_decay", weight_decay, 0)
    check_tensor("weight_decay", weight_decay)
    if weight_decay.shape != (count,) or weight_decay.dtype != torch.float32:
        raise ValueError(
            f"weight_decay: expected a float32 tensor [{count}], one number per tensor, got "
            f"{weight_decay.dtype} {list(weight_decay.shape)}."
        )
    if weight_decay.device != device:
        raise ValueError(f"weight_decay: expected {device}, got {weight_decay.device}.")
    return weight_decay
