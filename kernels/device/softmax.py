"""Losses of logits and their gradients: a program reads the logits of a few rows once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..softmax import INPUTS, Loss, NaturalTarget, SoftmaxLosses
from .launching import Launch

# Logits of each input that a warp holds: 4 registers per thread and input. Rows of few classes
# share a program.
TILE = 128
LOSSES = ("natural_ce", "adversarial_ce", "kl", "consistency", "margin", "total")


def softmax_losses(
    logits: Tensor | None,
    adv_logits: Tensor | None,
    labels: Tensor,
    *,
    teacher_logits: Tensor | None = None,
    teacher_adv_logits: Tensor | None = None,
    beta: float = 5.0,
    gamma: float = 1.0,
    natural_target: NaturalTarget = "attached",
    gradients: Sequence[Loss] = ("natural_ce", "adversarial_ce", "total"),
) -> SoftmaxLosses:
    """Run the kernel on all rows."""
    like = logits if logits is not None else adv_logits
    assert like is not None
    count, classes = like.shape
    wanted = [(name, given) for name in gradients for given in INPUTS[name]]
    if natural_target == "detached":
        wanted = [pair for pair in wanted if pair != ("kl", "logits")]
    outputs = {
        pair: torch.empty((count, classes), dtype=like.dtype, device=like.device) for pair in wanted
    }
    losses = torch.empty((len(LOSSES), count), dtype=torch.float32, device=like.device)
    if count:
        block = max(1 << (classes - 1).bit_length(), 16)
        rows = max(TILE // block, 1)
        inputs = (logits, adv_logits, teacher_logits, teacher_adv_logits)
        Launch(
            softmax_losses_kernel,
            -(-count // rows),
            like.device,
            (
                *(None if tensor is None else tensor.contiguous() for tensor in inputs),
                labels.contiguous(),
                losses,
                *(outputs.get((name, given)) for name in INPUTS for given in INPUTS[name]),
                count,
                float(beta),
                float(gamma),
                1 / count,
            ),
            {
                "K": classes,
                "ROWS": rows,
                "BLOCK": block,
                "ATTACHED": natural_target == "attached",
            },
            warps=max(block // TILE, 1),
        ).run()
    return SoftmaxLosses(
        **dict(zip(LOSSES, losses.unbind(), strict=True)),
        gradients={
            name: (outputs.get((name, "logits")), outputs.get((name, "adv_logits")))
            for name in gradients
        },
    )


@triton.jit
def load_logits(logits, offsets, mask):
    """Return logits as float32, minus infinity beyond the last class, whose probability is 0."""
    return tl.load(logits + offsets, mask=mask, other=-float("inf")).to(tl.float32)


@triton.jit
def log_softmax(values, mask):
    """Return log-probabilities and probabilities, both 0 beyond the last class, and the logarithm
    of the sum of exponentials below the maximum, which is NaN for a row with a NaN.
    """
    shifted = values - tl.max(values, axis=1)[:, None]
    log_total = tl.log(tl.sum(tl.exp(shifted), axis=1))
    log_p = shifted - log_total[:, None]
    # Infinity times a probability of 0 would be NaN.
    return tl.where(mask, log_p, 0.0), tl.exp(log_p), log_total


@triton.jit
def store_mean(gradient, values, offsets, mask, scale):
    """Store the gradient of a loss as that of its mean over the batch, where it is asked for."""
    if gradient is not None:
        tl.store(gradient + offsets, (values * scale).to(gradient.dtype.element_ty), mask=mask)


@triton.jit
def store_losses(losses, rows, count, inside, values):
    """Store the six losses of each row, one after the other."""
    for i in tl.static_range(6):  # pyright: ignore
        tl.store(losses + i * count + rows, values[i], mask=inside)


@triton.jit
def margin_of(values, is_own, classes, fault, log_total, BLOCK: tl.constexpr):
    """Return the margin of each row, and its slope by the logits."""
    others = tl.where(is_own, -float("inf"), values)
    best = tl.max(others, axis=1)
    own = tl.sum(tl.where(is_own, values, 0.0), axis=1)
    # tl.max passes over NaN, which log_total shows.
    margin = best - own + fault + (log_total - log_total)
    first = tl.min(tl.where(others == best[:, None], classes, BLOCK), axis=1)
    slope = (classes == first[:, None]).to(tl.float32) - is_own.to(tl.float32)
    return margin, slope + (margin - margin)[:, None]


@triton.jit
def softmax_losses_kernel(
    logits,
    adv_logits,
    teacher_logits,
    teacher_adv_logits,
    labels,
    losses,
    natural_ce_by_logits,
    adversarial_ce_by_adv_logits,
    kl_by_logits,
    kl_by_adv_logits,
    margin_by_adv_logits,
    total_by_logits,
    total_by_adv_logits,
    count,
    beta,
    gamma,
    scale,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ATTACHED: tl.constexpr,
):
    """Compute ROWS rows: the losses of the logits given, and the gradients whose output is given.

    A tensor that is None is known when the kernel is compiled, and its code is left out.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    classes = tl.arange(0, BLOCK)[None, :]
    inside = rows < count
    mask = inside[:, None] & (classes < K)
    offsets = rows.to(tl.int64)[:, None] * K + classes
    label = tl.load(labels + rows, mask=inside, other=0)
    # Labels are compared, never used as addresses: a wrong one reads nothing.
    fault = tl.where((label >= 0) & (label < K), 0.0, float("nan"))
    is_own = classes == label[:, None]
    one_hot = is_own.to(tl.float32)
    unknown = tl.full((ROWS,), float("nan"), tl.float32)
    natural_ce, adversarial_ce, kl = unknown, unknown, unknown
    consistency, margin, total = unknown, unknown, unknown

    if logits is not None:
        values = load_logits(logits, offsets, mask)
        log_p, p, _ = log_softmax(values, mask)
        natural_ce = fault - tl.sum(tl.where(is_own, log_p, 0.0), axis=1)
        by_p = p - one_hot + fault[:, None]
        store_mean(natural_ce_by_logits, by_p, offsets, mask, scale)

    if adv_logits is not None:
        adv_values = load_logits(adv_logits, offsets, mask)
        log_q, q, log_total = log_softmax(adv_values, mask)
        adversarial_ce = fault - tl.sum(tl.where(is_own, log_q, 0.0), axis=1)
        by_q = q - one_hot + fault[:, None]
        store_mean(adversarial_ce_by_adv_logits, by_q, offsets, mask, scale)
        margin, slope = margin_of(adv_values, is_own, classes, fault, log_total, BLOCK)  # pyright: ignore
        store_mean(margin_by_adv_logits, slope, offsets, mask, scale)

    if logits is not None and adv_logits is not None:
        difference = log_p - log_q  # pyright: ignore
        kl = tl.sum(p * difference, axis=1)  # pyright: ignore
        total = natural_ce + beta * kl
        kl_by_p = p * (difference - kl[:, None])
        kl_by_q = q - p
        store_mean(kl_by_logits, kl_by_p, offsets, mask, scale)
        store_mean(kl_by_adv_logits, kl_by_q, offsets, mask, scale)
        total_by_p = by_p
        if ATTACHED:
            total_by_p += beta * kl_by_p
        total_by_q = beta * kl_by_q + fault[:, None]
        consistency = tl.zeros((ROWS,), tl.float32)
        if teacher_logits is not None:
            log_t, t, _ = log_softmax(load_logits(teacher_logits, offsets, mask), mask)
            consistency = tl.sum(t * (log_t - log_p), axis=1)
            total_by_p += gamma * (p - t)
            log_t, t, _ = log_softmax(load_logits(teacher_adv_logits, offsets, mask), mask)
            consistency += tl.sum(t * (log_t - log_q), axis=1)
            total_by_q += gamma * (q - t)
            total += gamma * consistency
        store_mean(total_by_logits, total_by_p, offsets, mask, scale)
        store_mean(total_by_adv_logits, total_by_q, offsets, mask, scale)

    found = (natural_ce, adversarial_ce, kl, consistency, margin, total)
    store_losses(losses, rows, count, inside, found)
