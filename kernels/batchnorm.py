"""BatchNorm folded into the layer before it, for networks that are only evaluated."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .checking import check_lists, check_number, check_tensor, per_tensor
from .dispatch import run
from .in_place import check_in_place

Optionals = Sequence[Tensor | None] | None
WORKING_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def fold_batchnorm(
    weights: Sequence[Tensor],
    biases: Optionals,
    bn_weights: Optionals,
    bn_biases: Optionals,
    running_means: Sequence[Tensor],
    running_vars: Sequence[Tensor],
    *,
    eps: float | Sequence[float] | Tensor,
    out_weights: Sequence[Tensor],
    out_biases: Sequence[Tensor],
) -> None:
    """Write weights that do in one layer what each layer and its BatchNorm in eval mode do.

    BatchNorm(conv(x)) = bn_bias + (conv(x) - mean) * scale with scale = bn_weight / sqrt(var + eps)
    (Ioffe and Szegedy, ICML 2015, Algorithm 2), so

        out_weight = weight * scale[:, None, ...]
        out_bias = bn_bias + (bias - mean) * scale

    in float32, rounded once to the dtype of the outputs. Convolutions and linear layers work alike.
    All layers take one launch, or one per dtype of the outputs. The arguments may be TensorLists,
    and must be for a CUDA graph.

    Args:
        weights: L weights [O, I, ...], float32, contiguous or channels_last: the output channels
            outermost in memory. One that lies otherwise than its output is copied first.
        biases: L biases [O] of the same layers, float32, or None for a layer without or for all.
        bn_weights: L weights [O] of the BatchNorms, float32; None stands for ones.
        bn_biases: L biases [O] of the BatchNorms, float32; None stands for zeros.
        running_means: L running means [O], float32.
        running_vars: L running variances [O], float32, at least 0.
        eps: what BatchNorm adds to the variance, at least 0: a number, L numbers, or a float32
            tensor [L] on the same device, which is not read by the host. Numbers that differ are
            sent at each call, which a CUDA graph cannot.
        out_weights: L tensors that are overwritten, shapes of the weights, float32, bfloat16 or
            float16, output channels outermost in memory. They may be the weights themselves.
        out_biases: L tensors [O] that are overwritten, each in the dtype of its out_weights.

    Raises:
        TypeError: for what is no list of tensors, or another dtype.
        ValueError: for lengths, shapes, devices or memory formats that do not match, ``eps`` out of
            range, and outputs with gaps or with the memory of another output.
    """
    device = check_lists({"weights": weights, "out_weights": out_weights}, empty=False)
    _check_weights(weights, out_weights, out_biases)
    statistics = {
        "running_means": running_means,
        "running_vars": running_vars,
        "out_biases": out_biases,
    }
    check_lists(statistics)
    _check_channels("running_means", running_means, weights)
    _check_channels("running_vars", running_vars, weights)
    for name, tensors in (("biases", biases), ("bn_weights", bn_weights), ("bn_biases", bn_biases)):
        if tensors is not None:
            _check_channels(name, tensors, weights)
    eps = _check_eps(eps, len(weights), device)
    # They may be the weights and biases that they are made of.
    check_in_place({"out_weights": out_weights, "out_biases": out_biases}, {})
    run(
        "batchnorm",
        fold_batchnorm_ref,
        device,
        weights,
        biases,
        bn_weights,
        bn_biases,
        running_means,
        running_vars,
        eps=eps,
        out_weights=out_weights,
        out_biases=out_biases,
    )


@torch.no_grad()
def fold_batchnorm_ref(
    weights: Sequence[Tensor],
    biases: Optionals,
    bn_weights: Optionals,
    bn_biases: Optionals,
    running_means: Sequence[Tensor],
    running_vars: Sequence[Tensor],
    *,
    eps: float | Sequence[float] | Tensor,
    out_weights: Sequence[Tensor],
    out_biases: Sequence[Tensor],
) -> None:
    """Compute :func:`fold_batchnorm` layer by layer."""
    absent = [None] * len(weights)
    for i, weight in enumerate(weights):
        bias, bn_weight, bn_bias = (
            (tensors or absent)[i] for tensors in (biases, bn_weights, bn_biases)
        )
        mean, variance = running_means[i], running_vars[i]
        squared = variance + (eps[i] if isinstance(eps, Tensor | Sequence) else eps)
        # By way of float64: torch's float32 square root is not always the nearest on the CPU.
        deviation = squared.double().sqrt().float()
        scale = (torch.ones_like(deviation) if bn_weight is None else bn_weight) / deviation
        shift = ((0 if bias is None else bias) - mean) * scale
        out_weights[i].copy_(weight * scale.view(-1, *[1] * (weight.ndim - 1)))
        out_biases[i].copy_(shift if bn_bias is None else bn_bias + shift)


def _check_weights(
    weights: Sequence[Tensor], out_weights: Sequence[Tensor], out_biases: Sequence[Tensor]
) -> None:
    for i, (weight, out) in enumerate(zip(weights, out_weights, strict=True)):
        if weight.ndim < 2:
            raise ValueError(f"weights[{i}]: expected shape [O, I, ...], got {list(weight.shape)}.")
        _check_dtype(f"weights[{i}]", weight, (torch.float32,))
        _check_dtype(f"out_weights[{i}]", out, WORKING_DTYPES)
        if out.shape[0] > 1 and out.stride(0) != out.numel() // out.shape[0]:
            raise ValueError(
                f"out_weights[{i}]: expected the output channels outermost in memory, got shape "
                f"{list(out.shape)} with strides {out.stride()}. Pass a contiguous or a "
                "channels_last tensor."
            )
    if isinstance(out_biases, Tensor) or len(out_biases) != len(weights):
        raise ValueError(
            f"out_biases: expected a list of {len(weights)} tensors, as many as weights."
        )
    _check_channels("out_biases", out_biases, weights, [out.dtype for out in out_weights])


def _check_channels(
    name: str,
    tensors: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    dtypes: Sequence[torch.dtype] | None = None,
) -> None:
    """Check for one tensor [O], or None, per layer, in its entry of ``dtypes``, else float32."""
    if isinstance(tensors, Tensor) or not isinstance(tensors, Sequence):
        raise TypeError(f"{name}: expected a list of tensors, got {type(tensors).__name__}.")
    if len(tensors) != len(weights):
        raise ValueError(
            f"{name}: expected {len(weights)} entries, as many as weights, got {len(tensors)}."
        )
    for i, (tensor, weight) in enumerate(zip(tensors, weights, strict=True)):
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor) or tensor.shape != weight.shape[:1]:
            found = list(check_tensor(f"{name}[{i}]", tensor, floating=False).shape)
            raise ValueError(
                f"{name}[{i}]: expected shape {list(weight.shape[:1])}, the output channels of "
                f"weights[{i}], got {found}."
            )
        if tensor.device != weight.device:
            raise ValueError(
                f"{name}[{i}]: expected {weight.device}, where weights[{i}] is, got "
                f"{tensor.device}. Move it there first."
            )
        wanted = torch.float32 if dtypes is None else dtypes[i]
        if tensor.dtype != wanted:
            raise TypeError(f"{name}[{i}]: expected {wanted}, got {tensor.dtype}.")


def _check_dtype(name: str, tensor: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    if tensor.dtype not in dtypes:
        wanted = " or ".join(map(str, dtypes))
        raise TypeError(f"{name}: expected {wanted}, got {tensor.dtype}.")


def _check_eps(
    eps: float | Sequence[float] | Tensor, count: int, device: torch.device
) -> float | Sequence[float] | Tensor:
    if isinstance(eps, Sequence):
        return per_tensor("eps", eps, count, 0)
    if not isinstance(eps, Tensor):
        return check_number("eps", eps, 0)
    if eps.dtype != torch.float32 or eps.shape != (count,) or eps.device != device:
        raise ValueError(
            f"eps: expected a number, {count} numbers, or torch.float32 of shape [{count}] on "
            f"{device}, got {eps.dtype} of shape {list(eps.shape)} on {eps.device}."
        )
    return eps
