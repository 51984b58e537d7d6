"""BatchNorm folded into the layers before it: one launch for all layers."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ..batchnorm import Optionals
from ..tables import TensorList, as_tensor_list, laid_out_like
from .chunks import my_segment, my_start, pointer_to
from .launching import Launch, launch_each, triton_dtype
from .numbers import one_or_on_device
from .versions import count_changes

# Small, so that most chunks of wide layers lie within one output channel.
CHUNK = 1024
CHANNELS = 256


@triton.jit
def load_channels(addresses, segment, channels, mask, DEFAULT: tl.constexpr):
    """Return one float32 per output channel; DEFAULT where the layer, or every one, has none."""
    if addresses is None:
        values = tl.full(channels.shape, DEFAULT, tl.float32)
    else:
        address = tl.load(addresses + segment)
        pointer = address.to(tl.pointer_type(tl.float32))
        values = tl.load(pointer + channels, mask=mask & (address != 0), other=DEFAULT)
    return values


@triton.jit
def scale_of(bn_weight_addresses, var_addresses, segment, channels, mask, eps):
    """Return by what BatchNorm multiplies output channels."""
    variance = load_channels(var_addresses, segment, channels, mask, 1.0)
    bn_weight = load_channels(bn_weight_addresses, segment, channels, mask, 1.0)
    return tl.math.div_rn(bn_weight, tl.sqrt_rn(variance + eps))


@triton.jit
def fold_biases(
    bias_addresses,
    bn_weight_addresses,
    bn_bias_addresses,
    mean_addresses,
    var_addresses,
    out_bias,
    segment,
    count,
    eps,
    CHANNELS: tl.constexpr,
):
    """Store the biases of one layer."""
    begin = 0
    # No range(): the interpreter cannot make one of a number that was loaded.
    while begin < count:
        channels = begin + tl.arange(0, CHANNELS)
        mask = channels < count
        scale = scale_of(bn_weight_addresses, var_addresses, segment, channels, mask, eps)
        mean = load_channels(mean_addresses, segment, channels, mask, 0.0)
        bias = load_channels(bias_addresses, segment, channels, mask, 0.0)
        bn_bias = load_channels(bn_bias_addresses, segment, channels, mask, 0.0)
        folded = bn_bias + (bias - mean) * scale
        tl.store(out_bias + channels, folded.to(out_bias.dtype.element_ty), mask=mask)
        begin += CHANNELS


@triton.jit
def _fold_kernel(
    weight_addresses,  # int64 [L], as all addresses
    bias_addresses,  # or None, as the two below
    bn_weight_addresses,
    bn_bias_addresses,
    mean_addresses,
    var_addresses,
    out_weight_addresses,
    out_bias_addresses,
    sizes,  # int32 [L], elements of the weights
    channel_counts,  # int32 [L], elements of the biases
    chunks,  # int32 [P, 2]
    eps,  # float32, or float32 [L]
    OUT: tl.constexpr,
    EPS_ON_DEVICE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Fold one chunk of weights; the program of a layer's first chunk folds its biases too."""
    segment = my_segment(chunks)
    start = my_start(chunks, CHUNK)
    size = tl.load(sizes + segment)
    count = tl.load(channel_counts + segment)
    if EPS_ON_DEVICE:
        eps = tl.load(eps + segment)
    if start == 0:
        fold_biases(
            bias_addresses,
            bn_weight_addresses,
            bn_bias_addresses,
            mean_addresses,
            var_addresses,
            pointer_to(out_bias_addresses, segment, OUT, False),
            segment,
            count,
            eps,
            CHANNELS,
        )
    row = size // count
    left = size - start
    offsets = start + tl.arange(0, CHUNK)
    inside = tl.arange(0, CHUNK) < left
    first = start // row
    if first == (start + tl.minimum(left, CHUNK) - 1) // row:
        # One square root and division for the chunk, instead of one for each element.
        one = scale_of(bn_weight_addresses, var_addresses, segment, first, True, eps)
        scale = tl.zeros([CHUNK], tl.float32) + one
    else:
        scale = scale_of(bn_weight_addresses, var_addresses, segment, offsets // row, inside, eps)
    weight = pointer_to(weight_addresses, segment, tl.float32, ALIGNED)
    out_weight = pointer_to(out_weight_addresses, segment, OUT, ALIGNED)
    if left >= CHUNK:
        folded = tl.load(weight + offsets) * scale
        tl.store(out_weight + offsets, folded.to(OUT))
    else:
        folded = tl.load(weight + offsets, mask=inside) * scale
        tl.store(out_weight + offsets, folded.to(OUT), mask=inside)


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
    """Launch the kernel, once per dtype of the outputs."""
    old = as_tensor_list(laid_out_like(weights, out_weights), "weights")
    new = as_tensor_list(out_weights, "out_weights")
    new_biases = as_tensor_list(out_biases, "out_biases")
    read = {
        "biases": biases,
        "bn_weights": bn_weights,
        "bn_biases": bn_biases,
        "running_means": running_means,
        "running_vars": running_vars,
    }
    # Held until the launch: a list can be the only owner of its tensors.
    lists = (old, *(table_of(name, each) for name, each in read.items()), new, new_biases)
    tables = [None if each is None else each.addresses for each in lists]
    eps = one_or_on_device("eps", eps, old.device)
    plan = old.plan(new, chunk=CHUNK)
    channel_counts = new_biases.plan(chunk=CHUNK).sizes
    launch_each(
        [
            Launch(
                _fold_kernel,
                len(group.chunks),
                old.device,
                (*tables, plan.sizes, channel_counts, group.chunks, eps),
                {
                    "OUT": triton_dtype(group.dtypes[1]),
                    "EPS_ON_DEVICE": isinstance(eps, Tensor),
                    "ALIGNED": group.aligned,
                    "CHUNK": CHUNK,
                    "CHANNELS": CHANNELS,
                },
            )
            for group in plan.groups
        ]
    )
    count_changes(out_weights, out_biases)


def table_of(name: str, tensors: Optionals) -> TensorList | None:
    """Return the tensors with their table, or None where there is no tensor at all.

    Tensors with gaps are copied, unless they are in a TensorList, whose addresses are fixed.
    """
    if tensors is None or all(tensor is None for tensor in tensors):
        return None
    if not isinstance(tensors, TensorList):
        tensors = [tensor if tensor is None else tensor.contiguous() for tensor in tensors]
    return as_tensor_list(tensors, name)
