"""Per-sample losses of logits, in float32 at least; the caller reduces."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Return -log p_y [N] for logits [N, K] and labels [N] int64."""
    return F.cross_entropy(logits, y, reduction="none")


def kl_divergence(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """Return KL(p || q) = sum_k p_k (log p_k - log q_k) [N] for two sets of logits [N, K]."""
    log_p, log_q = F.log_softmax(logits_p, dim=1), F.log_softmax(logits_q, dim=1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """Return max_{k != y} z_k - z_y [N], positive where the prediction is wrong (C&W's loss)."""
    own = logits.gather(1, y[:, None]).squeeze(1)
    others = logits.scatter(1, y[:, None], -torch.inf)
    return others.amax(dim=1) - own
