"""Projected gradient ascent on images (Madry et al., ICLR 2018): the start and one step."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from . import dispatch, philox
from .checking import MOST_ELEMENTS, check_choice, check_number, check_same, check_tensor

Norm = Literal["linf", "l2"]
Start = Literal["uniform", "normal", "zero"]

NORMS = ("linf", "l2")
STARTS = ("uniform", "normal", "zero")
# A gradient whose norm is below this has no direction that float32 can tell; the step is then zero.
SMALLEST_NORM = 1e-12
# Scale of the "normal" start in pixel units, from TRADES (Zhang et al., ICML 2019).
NORMAL_START = 0.001


def pgd_step_(
    x_adv: Tensor,
    x: Tensor,
    grad: Tensor,
    *,
    step_size: float | Tensor,
    eps: float | Tensor,
    norm: Norm = "linf",
) -> Tensor:
    """Move ``x_adv`` in place along ``grad``, back onto the eps-ball around ``x`` and into [0, 1].

    One step of Madry et al., ICLR 2018, Eq. 2 with the projection of its section 2. A gradient that
    is NaN or infinite has no direction. It makes its pixel NaN (with ``l2``, where pixels share a
    norm, its image), and so the loss that the caller sees next: a pixel that silently stayed where
    it was would be a weaker attack. Nothing is read back from the device.

    The arithmetic is float32 (float64 for float64 images), and the result is rounded once to the
    dtype of ``x_adv``. The kernel gives the reference's values with ``linf``; with ``l2`` its norms
    are summed in another order.

    Args:
        x_adv: current images [N, ...], floating, fewer than 2**31 elements; changed in place and
            returned. Contiguous and channels_last images are fastest; others are copied. Nothing is
            recorded for autograd: pass ``x_adv.detach()``, or call under ``torch.no_grad()``.
        x: natural images in [0, 1], same shape, any floating dtype, in other memory than ``x_adv``;
            copied if they lie in another order.
        grad: gradient of the objective that rises, same shape, any floating dtype; as ``x``.
        step_size: length of the step in pixel units, not negative; a number, a 0-d tensor or one
            per image [N]. Tensors are not read, so their values go unchecked.
        eps: radius of the ball in pixel units, as ``step_size``.
        norm: ``linf`` steps along the sign and clips each pixel; ``l2`` steps along the normalised
            gradient and scales the perturbation back to the sphere. A zero gradient moves nothing.

    Raises:
        TypeError: for what is no floating tensor, and what is no number.
        ValueError: for an unknown norm, a negative or NaN number, shapes or devices that differ,
            an ``x_adv`` that requires a gradient, and one with the memory of ``x``.
    """
    _check_images("x_adv", x_adv)
    if x_adv.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "x_adv: expected images that need no gradient, as they are changed in place. Pass "
            "x_adv.detach()."
        )
    check_same("x", x, "x_adv", x_adv)
    if x.data_ptr() == x_adv.data_ptr() != 0:  # 0 where there are no elements, or no data.
        raise ValueError(
            "x: expected other memory than that of x_adv, which is changed in place. Begin with "
            "x_adv = x.clone()."
        )
    check_same("grad", grad, "x_adv", x_adv)
    _check_per_image("step_size", step_size, x_adv)
    _check_per_image("eps", eps, x_adv)
    check_choice("norm", norm, NORMS)
    if torch.float64 in (x_adv.dtype, x.dtype):  # Kernels take numbers in float32.
        return pgd_step_ref(x_adv, x, grad, step_size=step_size, eps=eps, norm=norm)
    return dispatch.run(
        "pgd",
        pgd_step_ref,
        x_adv.device,
        x_adv,
        x,
        grad,
        step_size=step_size,
        eps=eps,
        norm=norm,
    )


@torch.no_grad()
def pgd_step_ref(
    x_adv: Tensor,
    x: Tensor,
    grad: Tensor,
    *,
    step_size: float | Tensor,
    eps: float | Tensor,
    norm: Norm = "linf",
) -> Tensor:
    """Do :func:`pgd_step_` in PyTorch."""
    dtype = _wide(x_adv.dtype, x.dtype)
    start, centre = x_adv.to(dtype), x.to(dtype)
    step, radius = _per_image(step_size, centre), _per_image(eps, centre)
    if norm == "linf":
        # torch's sign of NaN is 0 and of infinity 1. Adding 0 * grad turns both into NaN and leaves
        # the sign of a finite gradient as it is, bit for bit (also the +0 of a gradient of -0).
        direction = grad.sign().add_(grad, alpha=0).to(dtype)
        moved = start + step * direction
        moved = torch.minimum(torch.maximum(moved, centre - radius), centre + radius)
        return x_adv.copy_(moved.clamp_(0, 1))
    grad = grad.to(dtype)
    delta = start + grad * (step / _norms(grad)) - centre
    delta = delta * (radius / _norms(delta)).clamp(max=1)
    return x_adv.copy_((centre + delta).clamp_(0, 1))


def pgd_init(
    x: Tensor,
    *,
    eps: float | Tensor,
    norm: Norm = "linf",
    start: Start = "uniform",
    seed: int,
    step: int | Tensor = 0,
) -> Tensor:
    """Return ``x`` plus the first perturbation of an attack, inside the eps-ball and [0, 1].

    The perturbation of a pixel depends on the seed, the step and the pixel's position in the
    logical order (n, c, h, w) alone, not on the memory format, the dtype or the device. CPU and GPU
    agree in the bits of ``linf`` with ``uniform``, and within 1e-5 * eps otherwise, before rounding
    to the dtype of ``x``. The numbers are those of stream START, and RADIUS, in :mod:`.philox`.

    Args:
        x: images [N, ...] in [0, 1], floating, fewer than 2**31 elements; not changed.
        eps: radius of the ball in pixel units, not negative; a number, a 0-d tensor or one per
            image [N]. Tensors are not read, so their values go unchecked.
        norm: the ball's norm, ``linf`` or ``l2``.
        start: ``uniform`` draws from the ball: with ``l2`` a normal direction, and the length
            eps * u**(1/d) for images of d pixels. ``normal`` adds 0.001 times a standard normal
            (TRADES, Zhang et al., ICML 2019, Algorithm 1), clipped to the ball or scaled back into
            it. ``zero`` returns a copy.
        seed: key of the generator, in [0, 2**64).
        step: which draw of this seed, in [0, 2**63): a number, or a 0-d int64 tensor on the device
            of ``x``, read there and not advanced; give each call its own.

    Returns:
        A new tensor without gradient, of the shape, dtype and memory format of ``x``.

    Raises:
        TypeError: for what is no floating tensor, no number, or no integer for seed and step.
        ValueError: for unknown names, numbers out of range, and devices that differ.
    """
    _check_images("x", x)
    _check_per_image("eps", eps, x)
    check_choice("norm", norm, NORMS)
    check_choice("start", start, STARTS)
    philox.check_key(seed, step, x.device)
    if start == "zero" or x.dtype == torch.float64:  # Kernels take numbers in float32.
        return pgd_init_ref(x, eps=eps, norm=norm, start=start, seed=seed, step=step)
    return dispatch.run(
        "pgd", pgd_init_ref, x.device, x, eps=eps, norm=norm, start=start, seed=seed, step=step
    )


@torch.no_grad()
def pgd_init_ref(
    x: Tensor,
    *,
    eps: float | Tensor,
    norm: Norm = "linf",
    start: Start = "uniform",
    seed: int,
    step: int | Tensor = 0,
) -> Tensor:
    """Do :func:`pgd_init` in PyTorch."""
    out = torch.empty_like(x)
    if start == "zero":
        return out.copy_(x)
    centre = x.to(_wide(x.dtype))
    radius = _per_image(eps, centre)
    index = torch.arange(x.numel(), device=x.device).view(x.shape)
    if norm == "linf" and start == "uniform":
        uniform = philox.philox_uniform(seed, index, step, stream=philox.START)
        return out.copy_((centre + (2 * uniform - 1) * radius).clamp_(0, 1))
    normal = philox.philox_normal(seed, index, step, stream=philox.START)
    if norm == "linf":
        delta = (NORMAL_START * normal).clamp(-radius, radius)
    elif start == "normal":
        delta = normal * torch.clamp(radius / _norms(normal), max=NORMAL_START)
    else:
        images = torch.arange(len(x), device=x.device)
        uniform = 1 - philox.philox_uniform(seed, images, step, stream=philox.RADIUS)
        length = _per_image(uniform ** (1 / max(x[:1].numel(), 1)), centre)
        delta = normal * (radius * length / _norms(normal))
    return out.copy_((centre + delta).clamp_(0, 1))


def _check_images(name: str, images: Tensor) -> None:
    check_tensor(name, images)
    if images.ndim == 0 or images.numel() > MOST_ELEMENTS:
        raise ValueError(
            f"{name}: expected images [N, ...] of at most {MOST_ELEMENTS} elements together, got "
            f"shape {list(images.shape)}. Pass fewer images at once."
        )


def _check_per_image(name: str, value: object, images: Tensor) -> None:
    """Check one non-negative number, a 0-d tensor, or a tensor of one number per image."""
    if not isinstance(value, Tensor):
        check_number(name, value, 0)
        return
    check_tensor(name, value)
    if value.ndim and value.shape != images.shape[:1]:
        raise ValueError(
            f"{name}: expected a number or one per image [{len(images)}], got shape "
            f"{list(value.shape)}."
        )
    if value.device != images.device:
        raise ValueError(
            f"{name}: expected {images.device}, where the images are, got {value.device}. Move it "
            "there first."
        )


def _wide(*dtypes: torch.dtype) -> torch.dtype:
    """Return the dtype of the arithmetic on such images."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _per_image(value: float | Tensor, x: Tensor) -> Tensor:
    """Return one value, or one per image [N], so that it broadcasts over ``x`` [N, ...]."""
    if not isinstance(value, Tensor):
        return torch.full((), value, dtype=x.dtype, device=x.device)
    return value.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


def _norms(values: Tensor) -> Tensor:
    """Return the L2 norm of each image [N, 1, ...], at least SMALLEST_NORM."""
    norms = values.unsqueeze(-1).flatten(1).norm(dim=1).clamp(min=SMALLEST_NORM)
    return norms.view(-1, *[1] * (values.ndim - 1))
