"""Per-sample losses of logits, in float32 at least; the caller reduces."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Return -log p_y [N] for logits [N, K] and labels [N] int64."""
    return F.cross_entropy(logits, y, reduction="none")


def kl_divergence(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """Return KL(p || q) = sum_k p_k (log p_k - log q_k) [N] for two sets of logits [N, K]."""
    return kl_divergence_from(logits_p)(logits_q)


def kl_divergence_from(logits_p: Tensor) -> Callable[[Tensor], Tensor]:
    """Return KL(p || q) [N] as a function of the logits of q [N, K].

    What depends on p alone is computed once: an attack asks in each of its steps.
    """
    log_p = F.log_softmax(logits_p, dim=1)
    p = log_p.exp()

    def divergence(logits_q: Tensor) -> Tensor:
        return (p * (log_p - F.log_softmax(logits_q, dim=1))).sum(dim=1)

    return divergence


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """Return max_{k != y} z_k - z_y [N], positive where the prediction is wrong (C&W's loss)."""
    own = logits.gather(1, y[:, None]).squeeze(1)
    others = logits.scatter(1, y[:, None], -torch.inf)
    return others.amax(dim=1) - own
