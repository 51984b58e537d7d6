"""Operations on whole models (lists of tensors), importable from any PyTorch training loop.

Depends on torch, and on triton where kernels run. Tensors on a CUDA device take Triton kernels,
others the PyTorch reference ``<op>_ref`` beside each operation; ``CURE_FAST_KERNELS`` forces a
choice (auto, triton, reference). Nothing waits for the device.
"""

from __future__ import annotations

from .augment import augment_crop_flip
from .ema import copy_where_, ema_update_, flip_coin
from .pgd import pgd_init, pgd_step_
from .prepared import RGP
from .rgp import (
    Selection,
    mask_below_,
    rgp_mask_,
    rgp_score,
    rgp_select,
    rgp_threshold,
)
from .softmax import SoftmaxLosses, softmax_losses
from .tables import TensorList
from .update import masked_sgd_

__all__ = [
    "RGP",
    "Selection",
    "SoftmaxLosses",
    "TensorList",
    "augment_crop_flip",
    "copy_where_",
    "ema_update_",
    "flip_coin",
    "mask_below_",
    "masked_sgd_",
    "pgd_init",
    "pgd_step_",
    "rgp_mask_",
    "rgp_score",
    "rgp_select",
    "rgp_threshold",
    "softmax_losses",
]
