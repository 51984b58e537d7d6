"""Attacks as functions: images in, adversarial images out, the model's state untouched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from cure_fast.kernels import pgd_step_
from cure_fast.kernels.pgd import NORMAL_START, SMALLEST_NORM, Norm

Start = Literal["normal", "uniform", "zero"]
# From a tensor [N, ...] and what fills one in place with random numbers to such numbers, shaped as
# it is.
Draw = Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]


def draw_rows(like: Tensor, fill: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the random numbers that ``fill`` puts into a tensor shaped as ``like``."""
    return fill(torch.empty_like(like))


def start_point(
    x: Tensor,
    *,
    eps: float | Tensor,
    start: Start | Tensor,
    norm: Norm = "linf",
    clamp_start: bool = True,
    generator: torch.Generator | None = None,
    draw: Draw = draw_rows,
) -> Tensor:
    """Return ``x`` plus the first perturbation, inside the eps-ball, without gradient.

    Args:
        x: images [N, C, H, W] in [0, 1].
        eps: radius of the ball in pixel units; a number, or one per image [N].
        start: ``normal`` adds 0.001 times a standard normal, ``uniform`` draws from the ball,
            ``zero`` adds nothing; a tensor shaped as ``x`` is the perturbation itself.
        norm: the ball's, ``linf`` or ``l2``.
        clamp_start: whether the result is clamped to [0, 1].
        generator: source of the noise, on the device of ``x``; None takes torch's default.
        draw: how rows are drawn from it.
    """
    radius = eps.to(x).view(-1, 1, 1, 1) if isinstance(eps, Tensor) else eps
    if isinstance(start, Tensor):
        noise = start.clone()
    elif start == "zero":
        return x.detach().clone(memory_format=torch.preserve_format)
    elif start == "normal":
        noise = draw(x, lambda t: t.normal_(0, NORMAL_START, generator=generator))
    elif norm == "l2":
        noise = draw(x, lambda t: t.normal_(generator=generator))
        share = draw(x[:, :1, :1, :1], lambda t: t.uniform_(generator=generator))
        noise *= radius * share ** (1 / x[0].numel()) / lengths(noise)
    elif isinstance(radius, Tensor):
        noise = draw(x, lambda t: t.uniform_(-1, 1, generator=generator))
        noise *= radius
    else:
        noise = draw(x, lambda t: t.uniform_(-radius, radius, generator=generator))
    if norm == "l2":
        noise *= (radius / lengths(noise)).clamp(max=1)
    elif isinstance(radius, Tensor):
        noise.clamp_(-radius, radius)
    else:
        noise.clamp_(-radius, radius)
    moved = noise.add_(x.detach())
    return moved.clamp_(0, 1) if clamp_start else moved


def lengths(noise: Tensor) -> Tensor:
    """Return the L2 norm of each image's perturbation, [N, 1, 1, 1], above 0."""
    return noise.flatten(1).norm(dim=1).clamp(min=SMALLEST_NORM).view(-1, 1, 1, 1)


def pgd(
    model: nn.Module,
    x: Tensor,
    objective: Callable[[Tensor], Tensor],
    *,
    eps: float | Tensor,
    step_size: float | Tensor,
    steps: int,
    norm: Norm = "linf",
    start: Start | Tensor = "uniform",
    clamp_start: bool = True,
    generator: torch.Generator | None = None,
    draw: Draw = draw_rows,
    before: Callable[[Tensor], Tensor] | None = None,
    after: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return the last iterate of projected gradient ascent on ``objective(model(x_adv))``.

    It lies inside the eps-ball and [0, 1].

    The mode of the model (train or eval) and whether its parameters take gradients are the
    caller's; no ``.grad`` of a parameter is touched.

    Args:
        model: network from images [N, C, H, W] in [0, 1] to logits [N, K].
        x: natural images [N, C, H, W] in [0, 1].
        objective: from logits [N, K] to a scalar, summed over the batch: a mean would scale the
            gradients down by N, below what half precision can hold. It sees each iterate once, the
            start first, so it may count, or change a tensor of step lengths for the step to come.
        eps: radius of the ball in pixel units; a number, or one per image [N].
        step_size: length of one step in pixel units; as ``eps``.
        before: changes the iterate [N, C, H, W] before each forward pass.
        after: changes it after each step; the result is projected once more.
        steps: number of steps; 0 returns the start.
        norm: the ball's; ``linf`` steps along the gradient's sign, ``l2`` along the gradient.
        start: first perturbation; see :func:`start_point`.
        clamp_start: whether the first gradient too is taken inside [0, 1].
        generator: source of the start's noise.
        draw: how rows are drawn from it.
    """
    x_adv = start_point(
        x,
        eps=eps,
        start=start,
        norm=norm,
        clamp_start=clamp_start or steps == 0,
        generator=generator,
        draw=draw,
    )
    for _ in range(steps):
        if before is not None:
            x_adv = before(x_adv)
        with torch.enable_grad():
            leaf = x_adv.requires_grad_()
            (grad,) = torch.autograd.grad(objective(model(leaf)), leaf)
        x_adv = pgd_step_(leaf.detach(), x, grad, step_size=step_size, eps=eps, norm=norm)
        if after is not None:
            none = torch.zeros_like(x)
            x_adv = pgd_step_(after(x_adv), x, none, step_size=0.0, eps=eps, norm=norm)
    return x_adv
