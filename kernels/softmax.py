"""The losses of adversarial training that are functions of logits, with their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .checking import check_choice, check_number, check_same, check_tensor
from .dispatch import run

NaturalTarget = Literal["attached", "detached"]
Loss = Literal["natural_ce", "adversarial_ce", "kl", "margin", "total"]

# Losses whose gradients can be asked for, and the logits that each is a function of.
INPUTS: dict[str, tuple[str, ...]] = {
    "natural_ce": ("logits",),
    "adversarial_ce": ("adv_logits",),
    "kl": ("logits", "adv_logits"),
    "margin": ("adv_logits",),
    "total": ("logits", "adv_logits"),
}

# A row lies in the registers of one program as a whole; for more classes they do not suffice.
MOST_CLASSES = 4096


@dataclass(frozen=True)
class SoftmaxLosses:
    """Losses of each sample, float32 [N], and gradients of their batch means.

    With z, z' the natural and adversarial logits, p, p' their softmax, and t, t' the teacher's
    softmax on the same images. A loss is NaN where logits that it needs were not given.

    Attributes:
        natural_ce: -log p_y.
        adversarial_ce: -log p'_y.
        kl: KL(p || p') = sum_k p_k (log p_k - log p'_k).
        consistency: KL(t || p) + KL(t' || p'); 0 without a teacher.
        margin: max_{k != y} z'_k - z'_y, positive where the prediction is wrong; -inf for K = 1.
        total: natural_ce + beta * kl + gamma * consistency.
        gradients: for each name asked for, the gradients [N, K] of the loss's mean over the batch
            with respect to logits and adv_logits, in the dtype of the logits; None for logits that
            the loss does not depend on.
    """

    natural_ce: Tensor
    adversarial_ce: Tensor
    kl: Tensor
    consistency: Tensor
    margin: Tensor
    total: Tensor
    gradients: dict[str, tuple[Tensor | None, Tensor | None]]


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
    """Return CURE's losses of a batch and their gradients with respect to the logits.

    Gowda et al., CURE, ICLR 2024: cross-entropy (of the score, Eq. 6), KL (Eq. 4 and 5) and
    consistency with the revision model, the teacher (Eq. 8); the margin is Carlini and Wagner's
    (IEEE S&P 2017, their f6). TRADES is the total without a teacher. Each logit is read once, and
    only the gradients asked for are computed, so that attacks can ask for one. Nothing is recorded
    for autograd: hand the gradients to ``torch.autograd.backward([logits, ...], [gradient, ...])``.

    Arithmetic is in float32. A gradient in float16 loses what is below 6e-8, and the mean over the
    batch makes gradients small: prefer bfloat16 or float32 logits. Among several classes that
    reach the margin's maximum the first takes the gradient. The labels' values are not read back:
    a label outside [0, K), also -100, makes the natural_ce, adversarial_ce, margin and total of its
    sample NaN, and their gradients; so does a NaN logit for the losses that it enters. A margin
    that is not finite has a NaN gradient.

    Args:
        logits: of natural images [N, K], float16, bfloat16 or float32, K at least 1; None where no
            loss of them is wanted.
        adv_logits: of adversarial images, same shape and dtype; None where no loss of them is
            wanted.
        labels: int64 [N], in [0, K).
        teacher_logits: the teacher's logits of the natural images, same shape, any of the dtypes.
        teacher_adv_logits: those of the adversarial images; given together with teacher_logits.
        beta: weight of the KL in the total, at least 0.
        gamma: weight of the consistency in the total, at least 0.
        natural_target: whether gradients of the KL flow into p too (``attached``), or only into p'.
        gradients: losses to differentiate: natural_ce, adversarial_ce, kl, margin, total.

    Raises:
        TypeError: for arguments that are no floating tensors, or labels that are not int64.
        ValueError: for shapes, dtypes or devices that differ, logits that are missing for a
            gradient or a teacher, numbers out of range and unknown names.
    """
    beta, gamma = check_number("beta", beta, 0), check_number("gamma", gamma, 0)
    check_choice("natural_target", natural_target, ("attached", "detached"))
    _check_gradients(gradients, {"logits": logits, "adv_logits": adv_logits})
    like_name, like = _check_logits(logits, adv_logits, labels)
    _check_teacher(teacher_logits, teacher_adv_logits, like_name, like)
    if teacher_logits is not None and (logits is None or adv_logits is None):
        missing = "logits" if logits is None else "adv_logits"
        raise ValueError(f"{missing}: expected logits to compare with the teacher's, got None.")
    compute = softmax_losses_ref
    if like.shape[1] <= MOST_CLASSES:
        compute = partial(run, "softmax", softmax_losses_ref, like.device)
    return compute(
        logits,
        adv_logits,
        labels,
        teacher_logits=teacher_logits,
        teacher_adv_logits=teacher_adv_logits,
        beta=beta,
        gamma=gamma,
        natural_target=natural_target,
        gradients=gradients,
    )


@torch.no_grad()
def softmax_losses_ref(
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
    """Differentiate by hand: of -log p_y, p less the label; of KL(a || b), b - a and a (d - KL)."""
    like = logits if logits is not None else adv_logits
    assert like is not None
    count, classes = like.shape
    target = labels.clamp(0, classes - 1)
    fault = torch.zeros(count, dtype=torch.float32, device=like.device)
    fault = fault.masked_fill(labels != target, torch.nan)
    unknown = torch.full_like(fault, torch.nan)
    losses = dict.fromkeys((*INPUTS, "consistency"), unknown)
    by: dict[str, tuple[Tensor | None, Tensor | None]] = {}
    by_logits = unknown
    if logits is not None:
        losses["natural_ce"], by_logits = _cross_entropy(logits, target, fault)
        by["natural_ce"] = (by_logits, None)
    if adv_logits is not None:
        losses["adversarial_ce"], by_adv_logits = _cross_entropy(adv_logits, target, fault)
        losses["margin"], by_margin = _margin(adv_logits, target, fault)
        by["adversarial_ce"], by["margin"] = (None, by_adv_logits), (None, by_margin)
    if logits is not None and adv_logits is not None:
        losses["kl"], by_p, by_q = _kl(logits, adv_logits)
        by["kl"] = (by_p if natural_target == "attached" else None, by_q)
        total_p, total_q = by_logits, beta * by_q + fault[:, None]
        if natural_target == "attached":
            total_p = total_p + beta * by_p
        losses["total"] = losses["natural_ce"] + beta * losses["kl"]
        losses["consistency"] = torch.zeros_like(fault)
        if teacher_logits is not None and teacher_adv_logits is not None:
            consistency_p, _, pull_p = _kl(teacher_logits, logits)
            consistency_q, _, pull_q = _kl(teacher_adv_logits, adv_logits)
            losses["consistency"] = consistency_p + consistency_q
            losses["total"] = losses["total"] + gamma * losses["consistency"]
            total_p, total_q = total_p + gamma * pull_p, total_q + gamma * pull_q
        by["total"] = (total_p, total_q)

    def mean(gradient: Tensor | None) -> Tensor | None:
        return None if gradient is None else (gradient * (1 / max(count, 1))).to(like.dtype)

    means = {name: (mean(by[name][0]), mean(by[name][1])) for name in gradients}
    return SoftmaxLosses(**losses, gradients=means)


def _cross_entropy(logits: Tensor, target: Tensor, fault: Tensor) -> tuple[Tensor, Tensor]:
    """Return -log p_y [N] and its gradient [N, K]."""
    log_p = F.log_softmax(logits.float(), dim=1)
    one_hot = F.one_hot(target, logits.shape[1])
    own = log_p.gather(1, target[:, None])[:, 0]
    return fault - own, log_p.exp() - one_hot + fault[:, None]


def _kl(logits_a: Tensor, logits_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return KL(a || b) [N] and its gradients [N, K] with respect to both logits."""
    log_a, log_b = F.log_softmax(logits_a.float(), dim=1), F.log_softmax(logits_b.float(), dim=1)
    a, difference = log_a.exp(), log_a - log_b
    kl = (a * difference).sum(dim=1)
    return kl, a * (difference - kl[:, None]), log_b.exp() - a


def _margin(logits: Tensor, target: Tensor, fault: Tensor) -> tuple[Tensor, Tensor]:
    """Return max_{k != y} z_k - z_y [N] and its gradient [N, K]."""
    values = logits.float()
    others = values.scatter(1, target[:, None], -torch.inf)
    # argmax returns the first of equal classes on the CPU only.
    best = others.amax(dim=1, keepdim=True)
    first = (others == best).int().argmax(dim=1)
    margin = (best - values.gather(1, target[:, None]))[:, 0] + fault
    classes = logits.shape[1]
    slope = F.one_hot(first, classes) - F.one_hot(target, classes)
    return margin, slope + (margin - margin)[:, None]


def _check_gradients(gradients: Sequence[str], given: dict[str, Tensor | None]) -> None:
    if isinstance(gradients, str) or not isinstance(gradients, Sequence):
        raise TypeError(
            f"gradients: expected a sequence of names, got {gradients!r}. For one pass (name,)."
        )
    for name in gradients:
        check_choice("gradients", name, tuple(INPUTS))
        for needed in INPUTS[name]:
            if given[needed] is None:
                raise ValueError(
                    f"{needed}: expected logits, for the gradient of {name}, got None."
                )


def _check_logits(
    logits: Tensor | None, adv_logits: Tensor | None, labels: Tensor
) -> tuple[str, Tensor]:
    """Check logits and labels; return the name and tensor that the others must resemble."""
    if logits is None and adv_logits is None:
        raise ValueError("logits, adv_logits: expected at least one of them, got None for both.")
    name, like = ("adv_logits", adv_logits) if logits is None else ("logits", logits)
    like = check_tensor(name, like)
    _check_dtype(name, like)
    if like.ndim != 2 or like.shape[1] == 0:
        raise ValueError(
            f"{name}: expected shape [N, K] with at least one class, got {list(like.shape)}."
        )
    if adv_logits is not None and logits is not None:
        check_same("adv_logits", adv_logits, name, like)
        if adv_logits.dtype != like.dtype:
            raise ValueError(
                f"adv_logits: expected {like.dtype}, as {name} has, got {adv_logits.dtype}. "
                "Compute both under the same autocast."
            )
    check_tensor("labels", labels, floating=False)
    if labels.dtype != torch.int64:
        raise TypeError(f"labels: expected int64, got {labels.dtype}. Try labels.long().")
    if labels.shape != like.shape[:1] or labels.device != like.device:
        raise ValueError(
            f"labels: expected shape {list(like.shape[:1])} on {like.device}, one label per row of "
            f"{name}, got {list(labels.shape)} on {labels.device}."
        )
    return name, like


def _check_teacher(
    teacher_logits: Tensor | None, teacher_adv_logits: Tensor | None, name: str, like: Tensor
) -> None:
    if (teacher_logits is None) != (teacher_adv_logits is None):
        raise ValueError(
            "teacher_logits, teacher_adv_logits: expected both or neither. Pass the teacher's "
            "logits of the natural and of the adversarial images."
        )
    for which, tensor in (
        ("teacher_logits", teacher_logits),
        ("teacher_adv_logits", teacher_adv_logits),
    ):
        if tensor is not None:
            check_same(which, tensor, name, like)
            _check_dtype(which, tensor)


def _check_dtype(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise TypeError(
            f"{name}: expected float16, bfloat16 or float32, got {tensor.dtype}. Try "
            f"{name}.float()."
        )
