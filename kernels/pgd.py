"""One step of projected gradient ascent on images (Madry et al., ICLR 2018)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

# A gradient whose norm is below this has no direction that float32 can tell; the step is then zero.
SMALLEST_NORM = 1e-12


def pgd_step_(
    x_adv: Tensor,
    x: Tensor,
    grad: Tensor,
    *,
    step_size: float | Tensor,
    eps: float | Tensor,
    norm: Literal["linf", "l2"] = "linf",
) -> Tensor:
    """Move ``x_adv`` in place along ``grad``, back onto the eps-ball around ``x`` and into [0, 1].

    A gradient that is NaN or infinite has no direction. It makes its pixel NaN (with ``l2``, where
    pixels share a norm, its image), and so the loss that the caller sees next: a pixel that
    silently stayed where it was would be a weaker attack. Nothing is read back from the device.

    Args:
        x_adv: current images [N, ...], floating; changed in place and returned.
        x: natural images, same shape, in [0, 1].
        grad: gradient of the objective that rises, same shape.
        step_size: length of the step in pixel units; a number or one per image [N].
        eps: radius of the ball in pixel units; a number or one per image [N].
        norm: ``linf`` steps along the sign and clips each pixel; ``l2`` steps along the normalised
            gradient and scales the perturbation back to the sphere. A zero gradient moves nothing.

    Raises:
        ValueError: for an unknown norm or shapes that differ.
    """
    if not x_adv.shape == x.shape == grad.shape:
        raise ValueError(f"shapes differ: x_adv {x_adv.shape}, x {x.shape}, grad {grad.shape}.")
    step, radius = _per_image(step_size, x), _per_image(eps, x)
    if norm == "linf":
        # torch's sign of NaN is 0 and of infinity 1. Adding 0 * grad turns both into NaN and leaves
        # the sign of a finite gradient as it is, bit for bit (also the +0 of a gradient of -0).
        moved = x_adv + step * grad.sign().add_(grad, alpha=0)
        return x_adv.copy_(torch.minimum(torch.maximum(moved, x - radius), x + radius).clamp_(0, 1))
    if norm == "l2":
        delta = x_adv + step * grad / _norms(grad) - x
        delta = delta * (radius / _norms(delta)).clamp(max=1)
        return x_adv.copy_((x + delta).clamp_(0, 1))
    raise ValueError(f"norm: expected linf or l2, got {norm!r}.")


def _per_image(value: float | Tensor, x: Tensor) -> float | Tensor:
    """Shape one value per image [N] so that it broadcasts over the pixels of ``x`` [N, ...]."""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    return value.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


def _norms(values: Tensor) -> Tensor:
    """Return the L2 norm of each image [N, 1, ...], at least SMALLEST_NORM."""
    norms = values.flatten(1).norm(dim=1).clamp(min=SMALLEST_NORM)
    return norms.view(-1, *[1] * (values.ndim - 1))
