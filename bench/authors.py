"""Training steps as the public CURE and TRADES code computes them, to compare speeds with.

Written from descriptions of NeurAI-Lab/CURE and yaodongyu/TRADES, as plain eager PyTorch: float32
with TF32 in convolutions alone, images and weights in NCHW, one kernel per small operation.

Of CURE (its mode ``rgp_soft``, with the README's weights), ``pgd_at`` (its mode ``madry``) and
natural training, the way of CURE's code; of TRADES, the way of TRADES' code:

- The attack starts from noise drawn on the host. TRADES computes the natural logits anew in each
  attack step; CURE computes them once, and takes their softmax anew in each step.
- The loss of TRADES passes the natural images through the network twice, for the two terms.
- CURE makes four backward sweeps (natural loss, KL, total, consistency; the last is not used) and
  copies all gradients of each. Its revision model keeps graphs that nothing reads. Percentiles are
  NumPy's on the host, tensor by tensor.
- The step ends by reading its loss, as CURE's code does; TRADES' code reads every hundredth.

Left out is what is no part of a step: logs, the count of right answers, the feeding of images.
``torch.backends.cudnn.benchmark`` is on for all, as in CURE's code; TRADES' code leaves it off.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cure_fast.errors import InputError
from cure_fast.models import build_model

METHODS = ("natural", "pgd_at", "trades", "cure")
NOISE = 0.001


@dataclass(frozen=True, kw_only=True)
class AuthorsSettings:
    """Constants of the public code; for CURE the README's, for CIFAR-10 and ResNet-18.

    Attributes:
        eps: radius of the attack's ball.
        step_size: length of an attack step.
        attack_steps: number of attack steps.
        trades_beta: weight of the KL in TRADES.
        cure_beta: weight of the KL in CURE.
        w_nat: weight of the natural gradient in CURE's score.
        w_rob: weight of the KL's gradient in CURE's score.
        percentile: percent of a tensor's weights that CURE conserves.
        consistency: weight of CURE's consistency loss.
        revision_rate: probability that the revision model moves in a step.
        revision_decay: largest share of the revision model that stays when it moves.
    """

    eps: float = 0.031
    step_size: float = 0.007
    attack_steps: int = 10
    trades_beta: float = 6.0
    cure_beta: float = 5.0
    w_nat: float = 0.1
    w_rob: float = 0.9
    percentile: float = 30.0
    consistency: float = 1.0
    revision_rate: float = 0.2
    revision_decay: float = 0.999


PUBLISHED = AuthorsSettings()


@dataclass
class AuthorsRun:
    """A network in training, step by step.

    Attributes:
        method: one of :data:`METHODS`.
        model: what is trained.
        revision: CURE's revision model, None for other methods.
        optimizer: moves the model's parameters.
        settings: constants of the methods.
        steps: number of steps so far.
    """

    method: str
    model: nn.Module
    revision: nn.Module | None
    optimizer: torch.optim.Optimizer
    settings: AuthorsSettings = PUBLISHED
    steps: int = 0

    def step(self, x: Tensor, y: Tensor) -> float:
        """Train on images [N, 3, H, W] in [0, 1], NCHW, and labels [N]; return the loss."""
        loss = authors_step(
            self.method,
            self.model,
            self.revision,
            self.optimizer,
            x,
            y,
            step=self.steps,
            settings=self.settings,
        )
        self.steps += 1
        return loss


def build_authors(
    method: str,
    model_name: str,
    device: torch.device | str,
    *,
    num_classes: int = 10,
    width: int | None = None,
    settings: AuthorsSettings = PUBLISHED,
) -> AuthorsRun:
    """Return a run with fresh weights in NCHW and SGD as in CURE's code.

    Args:
        method: one of :data:`METHODS`.
        model_name: a key of ``cure_fast.models.MODELS``.
        device: where it is trained.
        num_classes: number of logits.
        width: channels of the first stage; None takes the published.
        settings: constants of the methods.

    Raises:
        InputError: for an unknown method or model.
    """
    _check_method(method)
    model = build_model(model_name, num_classes=num_classes, width=width)
    model = model.to(device=device).to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
    model.train()
    # With gradients: the public code never switches them off for its copy.
    revision = copy.deepcopy(model) if method == "cure" else None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    return AuthorsRun(method, model, revision, optimizer, settings)


def authors_step(
    method: str,
    model: nn.Module,
    revision: nn.Module | None,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    y: Tensor,
    *,
    step: int,
    settings: AuthorsSettings = PUBLISHED,
) -> float:
    """Take one training step and return its loss.

    Noise and CURE's coin come from torch's generator of the host.

    Args:
        method: one of :data:`METHODS`.
        model: what is trained, in train mode, in NCHW.
        revision: CURE's revision model, in train mode; other methods leave it alone.
        optimizer: of the model's parameters, in their order.
        x: images [N, C, H, W] in [0, 1], NCHW, of the model's dtype.
        y: labels [N] int64.
        step: number of steps before this one.
        settings: constants of the methods.

    Raises:
        InputError: for an unknown method, for CURE without a revision model, and for images in
            another layout, which convolutions would go on in.
    """
    _check_method(method)
    if not x.is_contiguous():
        raise InputError(
            f"x: expected contiguous NCHW images, got strides {x.stride()}. Pass x.contiguous()."
        )
    with published_precision(), torch.enable_grad():
        if method == "cure":
            if revision is None:
                raise InputError("revision: expected a network for cure, got None.")
            return _cure_step(model, revision, optimizer, x, y, step, settings)
        loss = _LOSSES[method](model, optimizer, x, y, settings)
        loss.backward()
        optimizer.step()
        return loss.item()


def _check_method(method: str) -> None:
    if method not in METHODS:
        raise InputError(f"method: expected one of {', '.join(METHODS)}, got {method!r}.")


@contextmanager
def published_precision() -> Iterator[None]:
    """Compute with TF32 in convolutions and not in matrix products, whatever holds outside."""
    cudnn = torch.backends.cudnn
    matmul = torch.backends.cuda.matmul
    before = cudnn.allow_tf32, cudnn.benchmark, matmul.allow_tf32
    cudnn.allow_tf32, cudnn.benchmark, matmul.allow_tf32 = True, True, False
    try:
        yield
    finally:
        cudnn.allow_tf32, cudnn.benchmark, matmul.allow_tf32 = before


def perturbed(
    model: nn.Module,
    x: Tensor,
    objective: Callable[[Tensor], Tensor],
    settings: AuthorsSettings,
) -> Tensor:
    """Return PGD images that raise ``objective`` of their logits; leaves the model's mode alone."""
    x_adv = x + NOISE * torch.randn(x.shape, dtype=x.dtype).to(x.device)
    for _ in range(settings.attack_steps):
        x_adv.requires_grad_()
        (slope,) = torch.autograd.grad(objective(model(x_adv)), [x_adv])
        moved = x_adv.detach() + settings.step_size * slope.sign()
        moved = moved.maximum(x - settings.eps).minimum(x + settings.eps)
        x_adv = moved.clamp(0, 1)
    return x_adv.detach().clamp(0, 1)


def kl_sum(logits: Tensor, logits_adv: Tensor) -> Tensor:
    """Return KL(p(x) || p(x')) summed over the batch, both sides open to gradients."""
    log_adv, natural = F.log_softmax(logits_adv, dim=1), F.softmax(logits, dim=1)
    return F.kl_div(log_adv, natural, reduction="sum")


def _natural_loss(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    y: Tensor,
    settings: AuthorsSettings,
) -> Tensor:
    optimizer.zero_grad()
    return F.cross_entropy(model(x), y)


def _pgd_at_loss(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    y: Tensor,
    settings: AuthorsSettings,
) -> Tensor:
    model.eval()
    x_adv = perturbed(model, x, lambda logits: F.cross_entropy(logits, y), settings)
    model.train()
    optimizer.zero_grad()
    return F.cross_entropy(model(x_adv), y)


def _trades_loss(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    y: Tensor,
    settings: AuthorsSettings,
) -> Tensor:
    model.eval()
    # The natural logits come anew in each attack step, as the last operand does below.
    x_adv = perturbed(model, x, lambda logits: kl_sum(model(x), logits), settings)
    model.train()
    optimizer.zero_grad()
    natural = F.cross_entropy(model(x), y)
    logits_adv = model(x_adv)
    robust = (1.0 / len(x)) * kl_sum(model(x), logits_adv)
    return natural + settings.trades_beta * robust


_LOSSES = {"natural": _natural_loss, "pgd_at": _pgd_at_loss, "trades": _trades_loss}


def _cure_step(
    model: nn.Module,
    revision: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    y: Tensor,
    step: int,
    settings: AuthorsSettings,
) -> float:
    model.eval()
    fixed = model(x)
    x_adv = perturbed(model, x, lambda logits: kl_sum(fixed, logits), settings)
    model.train()
    losses = _cure_losses(model, revision, x, x_adv, y, settings)
    names = [name for name, _ in model.named_parameters()]
    params = list(model.parameters())
    swept = _sweep(optimizer, params, losses)
    conserve(names, swept["natural"], swept["robust"], swept["total"], settings)
    for param, grad in zip(params, swept["total"], strict=True):
        param.grad = grad
    optimizer.step()
    if torch.rand(1) < settings.revision_rate:
        _revise(revision, model, min(1 - 1 / (step + 2), settings.revision_decay))
    return losses["total"].item()


def _cure_losses(
    model: nn.Module,
    revision: nn.Module,
    x: Tensor,
    x_adv: Tensor,
    y: Tensor,
    settings: AuthorsSettings,
) -> dict[str, Tensor]:
    """Return the losses in the order of their backward sweeps."""
    logits, taught = model(x), revision(x).detach()
    logits_adv, taught_adv = model(x_adv), revision(x_adv).detach()
    natural = F.cross_entropy(logits, y)
    robust = (1.0 / len(x)) * kl_sum(logits, logits_adv)
    consistency = _distilled(taught, logits) + _distilled(taught_adv, logits_adv)
    consistency = settings.consistency * consistency
    total = natural + settings.cure_beta * robust + consistency
    return {"natural": natural, "robust": robust, "total": total, "consistency": consistency}


def _distilled(taught: Tensor, logits: Tensor) -> Tensor:
    log_p = F.log_softmax(logits, dim=1)
    return F.kl_div(log_p, F.softmax(taught, dim=1), reduction="batchmean")


def _sweep(
    optimizer: torch.optim.Optimizer, params: Sequence[nn.Parameter], losses: dict[str, Tensor]
) -> dict[str, list[Tensor]]:
    """Return copies of all gradients of each loss, from one backward sweep per loss."""
    swept: dict[str, list[Tensor]] = {}
    # Kept until all sweeps are done, as the public code keeps them; nothing reads them.
    unused: list[Tensor] = []
    for number, (name, loss) in enumerate(losses.items(), start=1):
        optimizer.zero_grad(set_to_none=True)
        loss.backward(retain_graph=number < len(losses))
        swept[name] = []
        for param in params:
            assert param.grad is not None, "every parameter takes part in every loss"
            swept[name].append(param.grad.clone())
            unused.append(torch.ones_like(param))
    return swept


def conserve(
    names: Sequence[str],
    natural: Sequence[Tensor],
    robust: Sequence[Tensor],
    total: Sequence[Tensor],
    settings: AuthorsSettings,
) -> None:
    """Zero in ``total``, in place, what scores below its tensor's percentile.

    The score is the signed sum of two gradients, formed for all tensors; masked are those whose
    name contains ``conv1``, but for the first of all.
    """
    weighted_nat = [grad * settings.w_nat for grad in natural]
    weighted_rob = [grad * settings.w_rob for grad in robust]
    scores = [nat + rob for nat, rob in zip(weighted_nat, weighted_rob, strict=True)]
    for index, (name, score, grad) in enumerate(zip(names, scores, total, strict=True)):
        if index > 0 and "conv1" in name:
            threshold = np.percentile(score.cpu().numpy(), settings.percentile)
            grad[score < float(threshold)] = 0.0


@torch.no_grad()
def _revise(revision: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the parameters of the revision model, one by one; its buffers are its own."""
    for average, param in zip(revision.parameters(), model.parameters(), strict=True):
        average.mul_(decay).add_(param, alpha=1 - decay)
