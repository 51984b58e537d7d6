"""Kernels of the attack's start and step."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..pgd import NORMAL_START, SMALLEST_NORM, Norm, Start
from ..philox import RADIUS, START, step_tensor
from ..tables import is_dense, laid_out_like
from .launching import Launch
from .philox import normal, uniform
from .versions import count_changes

# Elements per program with linf, and per turn of a program's loop with l2.
CHUNK = 1024


@triton.jit
def smaller(a, b):
    """Return the minimum, NaN where one is NaN."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def larger(a, b):
    """Return the maximum, NaN where one is NaN."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def value_of(value, image, SOURCE: tl.constexpr):
    """Return a number per image, float32: an argument, or loaded where SOURCE says so."""
    if SOURCE == "each":
        number = tl.load(value + image).to(tl.float32)
    elif SOURCE == "shared":
        number = tl.load(value).to(tl.float32)
    else:
        number = tl.full((), value, tl.float32)
    return number


@triton.jit
def load(pointer, offsets, end, MASKED: tl.constexpr):
    """Load in the tensor's own dtype; 0 from ``end`` on where MASKED."""
    if MASKED:
        values = tl.load(pointer + offsets, mask=offsets < end, other=0)
    else:
        values = tl.load(pointer + offsets)
    return values


@triton.jit
def store_image(pointer, offsets, values, end, MASKED: tl.constexpr):
    """Clip to [0, 1], leaving NaN, and store in the tensor's own dtype."""
    values = smaller(larger(values, 0.0), 1.0).to(pointer.dtype.element_ty)
    if MASKED:
        tl.store(pointer + offsets, values, mask=offsets < end)
    else:
        tl.store(pointer + offsets, values)


@triton.jit
def step_linf_chunk(
    x_adv,
    x,
    grad,
    step_size,
    eps,
    offsets,
    end,
    pixels,
    STEP_SIZE: tl.constexpr,
    EPS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Step the elements at ``offsets``."""
    gradient = load(grad, offsets, end, MASKED)
    if gradient.dtype != tl.float64:  # In float32, float64 could overflow, or lose its sign.
        gradient = gradient.to(tl.float32)
    sign = tl.where(gradient > 0, 1.0, tl.where(gradient < 0, -1.0, 0.0))
    direction = (sign + 0 * gradient).to(tl.float32)  # NaN where the gradient is not finite.
    image = tl.minimum(offsets, end - 1) // pixels
    moved = load(x_adv, offsets, end, MASKED).to(tl.float32)
    moved += value_of(step_size, image, STEP_SIZE) * direction
    centre = load(x, offsets, end, MASKED).to(tl.float32)
    radius = value_of(eps, image, EPS)
    moved = smaller(larger(moved, centre - radius), centre + radius)
    store_image(x_adv, offsets, moved, end, MASKED)


@triton.jit
def step_linf_kernel(
    x_adv,
    x,
    grad,
    step_size,
    eps,
    end,
    pixels,
    STEP_SIZE: tl.constexpr,
    EPS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Step one chunk of all images."""
    begin = tl.program_id(0) * CHUNK
    offsets = begin + tl.arange(0, CHUNK)
    if begin <= end - CHUNK:
        step_linf_chunk(
            x_adv, x, grad, step_size, eps, offsets, end, pixels, STEP_SIZE, EPS, MASKED=False
        )
    else:
        step_linf_chunk(
            x_adv, x, grad, step_size, eps, offsets, end, pixels, STEP_SIZE, EPS, MASKED=True
        )


@triton.jit
def delta_of(x_adv, x, grad, scale, offsets, pixels, MASKED: tl.constexpr):
    """Return the perturbation after a step of ``scale`` times the gradient."""
    moved = load(x_adv, offsets, pixels, MASKED).to(tl.float32)
    moved += load(grad, offsets, pixels, MASKED).to(tl.float32) * scale
    return moved - load(x, offsets, pixels, MASKED).to(tl.float32)


@triton.jit
def norm_of(squares, SMALLEST: tl.constexpr):
    """Return the root of the sum of squares, at least SMALLEST; NaN stays."""
    return larger(tl.sqrt_rn(tl.sum(squares)), SMALLEST)


@triton.jit
def step_l2_kernel(
    x_adv,
    x,
    grad,
    step_size,
    eps,
    STEP_SIZE: tl.constexpr,
    EPS: tl.constexpr,
    PIXELS: tl.constexpr,
    SMALLEST: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Step one image: its gradient's norm, its perturbation's norm, its pixels."""
    image = tl.program_id(0)
    first = image.to(tl.int64) * PIXELS
    x_adv, x, grad = x_adv + first, x + first, grad + first
    full: tl.constexpr = PIXELS // CHUNK
    lanes = tl.arange(0, CHUNK)

    squares = tl.zeros((CHUNK,), tl.float32)
    for chunk in range(full):
        gradient = load(grad, chunk * CHUNK + lanes, PIXELS, False).to(tl.float32)
        squares += gradient * gradient
    if full * CHUNK < PIXELS:
        gradient = load(grad, full * CHUNK + lanes, PIXELS, True).to(tl.float32)
        squares += gradient * gradient
    scale = tl.math.div_rn(value_of(step_size, image, STEP_SIZE), norm_of(squares, SMALLEST))

    squares = tl.zeros((CHUNK,), tl.float32)
    for chunk in range(full):
        delta = delta_of(x_adv, x, grad, scale, chunk * CHUNK + lanes, PIXELS, False)
        squares += delta * delta
    if full * CHUNK < PIXELS:
        delta = delta_of(x_adv, x, grad, scale, full * CHUNK + lanes, PIXELS, True)
        squares += delta * delta
    shrink = tl.math.div_rn(value_of(eps, image, EPS), norm_of(squares, SMALLEST))
    shrink = smaller(shrink, 1.0)

    for chunk in range(full):
        offsets = chunk * CHUNK + lanes
        delta = delta_of(x_adv, x, grad, scale, offsets, PIXELS, False) * shrink
        centre = load(x, offsets, PIXELS, False).to(tl.float32)
        store_image(x_adv, offsets, centre + delta, PIXELS, False)
    if full * CHUNK < PIXELS:
        offsets = full * CHUNK + lanes
        delta = delta_of(x_adv, x, grad, scale, offsets, PIXELS, True) * shrink
        centre = load(x, offsets, PIXELS, True).to(tl.float32)
        store_image(x_adv, offsets, centre + delta, PIXELS, True)


@triton.jit
def logical(offsets, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """Return the positions in logical order of an image's elements, which lie channels last."""
    return offsets % CHANNELS * (PIXELS // CHANNELS) + offsets // CHANNELS


@triton.jit(do_not_specialize=["seed"])
def init_linf_kernel(
    out,
    x,
    eps,
    seed,
    step,
    end,
    EPS: tl.constexpr,
    PIXELS: tl.constexpr,
    NORMAL: tl.constexpr,
    CHANNELS: tl.constexpr,
    STREAM: tl.constexpr,
    SCALE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Start one chunk of all images."""
    begin = tl.program_id(0) * CHUNK
    offsets = begin + tl.arange(0, CHUNK)
    image = tl.minimum(offsets, end - 1) // PIXELS
    index = offsets
    if CHANNELS != 1:
        index = image * PIXELS + logical(offsets % PIXELS, PIXELS, CHANNELS)
    radius = value_of(eps, image, EPS)
    if NORMAL:
        delta = normal(seed, index, tl.load(step), STREAM) * SCALE
        delta = smaller(larger(delta, -radius), radius)
    else:
        delta = (2 * uniform(seed, index, tl.load(step), STREAM) - 1) * radius
    if begin <= end - CHUNK:
        centre = load(x, offsets, end, False).to(tl.float32)
        store_image(out, offsets, centre + delta, end, False)
    else:
        centre = load(x, offsets, end, True).to(tl.float32)
        store_image(out, offsets, centre + delta, end, True)


@triton.jit(do_not_specialize=["seed"])
def init_l2_kernel(
    out,
    x,
    eps,
    seed,
    step,
    EPS: tl.constexpr,
    PIXELS: tl.constexpr,
    NORMAL: tl.constexpr,
    CHANNELS: tl.constexpr,
    STREAM: tl.constexpr,
    RADIUS_STREAM: tl.constexpr,
    SCALE: tl.constexpr,
    SMALLEST: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Start one image; its normal numbers are drawn twice, which costs no memory traffic."""
    image = tl.program_id(0)
    first = image.to(tl.int64) * PIXELS
    out, x = out + first, x + first
    now = tl.load(step)
    full: tl.constexpr = PIXELS // CHUNK
    lanes = tl.arange(0, CHUNK)

    squares = tl.zeros((CHUNK,), tl.float32)
    for chunk in range(full + 1):
        offsets = chunk * CHUNK + lanes
        numbers = normal(seed, first + logical(offsets, PIXELS, CHANNELS), now, STREAM)
        squares += tl.where(offsets < PIXELS, numbers * numbers, 0)
    norm = norm_of(squares, SMALLEST)
    radius = value_of(eps, image, EPS)
    if NORMAL:
        scale = smaller(tl.math.div_rn(radius, norm), SCALE)
    else:
        part = 1 - uniform(seed, image, now, RADIUS_STREAM)
        scale = tl.math.div_rn(radius * tl.exp(tl.log(part) * (1.0 / PIXELS)), norm)

    for chunk in range(full):
        offsets = chunk * CHUNK + lanes
        delta = normal(seed, first + logical(offsets, PIXELS, CHANNELS), now, STREAM) * scale
        centre = load(x, offsets, PIXELS, False).to(tl.float32)
        store_image(out, offsets, centre + delta, PIXELS, False)
    if full * CHUNK < PIXELS:
        offsets = full * CHUNK + lanes
        delta = normal(seed, first + logical(offsets, PIXELS, CHANNELS), now, STREAM) * scale
        centre = load(x, offsets, PIXELS, True).to(tl.float32)
        store_image(out, offsets, centre + delta, PIXELS, True)


def pgd_step(
    x_adv: Tensor,
    x: Tensor,
    grad: Tensor,
    *,
    step_size: float | Tensor,
    eps: float | Tensor,
    norm: Norm = "linf",
) -> Tensor:
    """Launch the step of ``norm``."""
    if not x_adv.numel():
        return x_adv
    images = x_adv if _is_image_by_image(x_adv) else x_adv.contiguous()
    x, grad = laid_out_like([x, grad], [images, images])
    (step_size, step_source), (eps, eps_source) = _source(step_size), _source(eps)
    pixels = images[0].numel()
    tensors = (images, x, grad, step_size, eps)
    constants = {"STEP_SIZE": step_source, "EPS": eps_source, "CHUNK": CHUNK}
    if norm == "linf":
        args = (*tensors, images.numel(), pixels)
        programs = -(-images.numel() // CHUNK)
        Launch(step_linf_kernel, programs, x_adv.device, args, constants).run()
    else:
        constants |= {"PIXELS": pixels, "SMALLEST": SMALLEST_NORM}
        Launch(step_l2_kernel, len(images), x_adv.device, tensors, constants).run()
    if images is x_adv:
        count_changes([x_adv])
        return x_adv
    return x_adv.copy_(images)


def pgd_init(
    x: Tensor,
    *,
    eps: float | Tensor,
    norm: Norm = "linf",
    start: Start = "uniform",
    seed: int,
    step: int | Tensor = 0,
) -> Tensor:
    """Launch the start of ``norm``; a start from ``zero`` needs no kernel."""
    x = x.detach()
    out = torch.empty_like(x)
    if not x.numel():
        return out
    last = x.ndim > 2 and not x.is_contiguous() and x.movedim(1, -1).is_contiguous()
    images = x if last else x.contiguous()
    result = out if out.stride() == images.stride() else torch.empty_like(images)
    eps, eps_source = _source(eps)
    args = (result, images, eps, seed, step_tensor(step, x.device))
    constants = {
        "EPS": eps_source,
        "NORMAL": start == "normal",
        "PIXELS": images[0].numel(),
        "CHANNELS": images.shape[1] if last else 1,
        "STREAM": START,
        "SCALE": NORMAL_START,
        "CHUNK": CHUNK,
    }
    if norm == "linf":
        programs = -(-x.numel() // CHUNK)
        Launch(init_linf_kernel, programs, x.device, (*args, x.numel()), constants).run()
    else:
        constants |= {"RADIUS_STREAM": RADIUS, "SMALLEST": SMALLEST_NORM}
        Launch(init_l2_kernel, len(x), x.device, args, constants).run()
    return out if result is out else out.copy_(result)


def _is_image_by_image(images: Tensor) -> bool:
    """Return whether the images lie in memory one after another, each in one piece."""
    return is_dense(images) and (
        len(images) == 1 or images.stride(0) * len(images) == images.numel()
    )


def _source(value: float | Tensor) -> tuple[float | Tensor, str]:
    """Return a number per image as kernels take it, and where it is."""
    if not isinstance(value, Tensor):
        return float(value), "number"
    return (value.contiguous(), "each") if value.ndim else (value, "shared")
