"""Operations on whole models (lists of tensors), importable from any PyTorch training loop.

Depends on torch alone. Every operation is plain PyTorch today, with no host
synchronisation on the way, so it also runs inside other people's loops on a GPU.
"""

from __future__ import annotations

from .ema import ema_update_
from .pgd import pgd_step_
from .rgp import rgp_mask_, rgp_score, rgp_threshold

__all__ = ["ema_update_", "pgd_step_", "rgp_mask_", "rgp_score", "rgp_threshold"]
