"""One call of each operation for each kind of arguments that has machine code of its own.

Shapes are those of convolutions, BatchNorm and CIFAR images: some tensors are several chunks long
and end within one, as in real models. Only what a call launches matters, not its result.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cure_fast.kernels import rgp
from cure_fast.kernels.augment import augment_crop_flip
from cure_fast.kernels.ema import copy_where_, ema_update_, flip_coin
from cure_fast.kernels.pgd import Norm, pgd_init, pgd_step_
from cure_fast.kernels.rgp import Score
from cure_fast.kernels.softmax import softmax_losses
from cure_fast.kernels.update import masked_sgd_

SHAPES = ((128, 64, 3, 3), (10, 512), (64,))


def tensors(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.zeros(shape, dtype=dtype) for shape in SHAPES]


def unaligned(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return tensors that begin one element after a multiple of 16 bytes."""
    return [
        torch.zeros(tensor.numel() + 1, dtype=dtype)[1:].view(tensor.shape)
        for tensor in tensors(dtype)
    ]


half, double = partial(tensors, torch.bfloat16), partial(tensors, torch.float64)


def select(
    nat: Callable[[], list[Tensor]] = tensors,
    adv: Callable[[], list[Tensor]] = tensors,
    score: Score = "abs",
) -> None:
    rgp.rgp_select(nat(), adv(), percentile=30, alpha=0.1, score=score)


def update(
    make: Callable[[], list[Tensor]] = tensors,
    grads: Callable[[], list[Tensor]] = tensors,
    **options: Any,
) -> None:
    """Launch the update as the trainer does: masked, with momentum, averages and a device's lr."""
    given = {
        "lr": torch.tensor(0.1),
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "scores": make(),
        "thresholds": torch.zeros(len(SHAPES)),
        "averages": make(),
        "moved": torch.tensor(True),
    }
    masked_sgd_(make(), grads(), make(), **(given | options))


def average(make: Callable[[], list[Tensor]] = tensors, **options: Any) -> None:
    options = {"decay": 0.999, "rate": 0.2, "step": torch.tensor(0)} | options
    averages = make()
    ema_update_(averages, tensors() if averages[0].is_floating_point() else make(), **options)


def copy(dtype: torch.dtype = torch.float32) -> None:
    copy_where_(tensors(dtype), tensors(dtype), condition=torch.tensor(True))


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(128, 3, 32, 32, dtype=dtype).to(memory_format=torch.channels_last)


def step(norm: Norm = "linf", dtype: torch.dtype = torch.float32, **options: Any) -> None:
    numbers = {"step_size": 2 / 255, "eps": 8 / 255} | options
    pgd_step_(images(dtype), images(dtype), images(dtype), norm=norm, **numbers)


def losses(
    count: int = 128, classes: int = 10, dtype: torch.dtype = torch.float32, **options: Any
) -> None:
    """Launch the losses of a training step: all of them, with a teacher."""
    logits = (torch.zeros(count, classes, dtype=dtype) for _ in range(4))
    natural, adversarial, teacher, teacher_adversarial = logits
    given = {"teacher_logits": teacher, "teacher_adv_logits": teacher_adversarial}
    softmax_losses(natural, adversarial, torch.zeros(count).long(), **(given | options))


def augment(
    dtype: torch.dtype = torch.float32,
    channels: int = 3,
    drawn: bool = True,
    reflect: bool = False,
) -> None:
    stored = torch.zeros(64, 32, 32, 3, dtype=torch.uint8)
    indices = torch.zeros(128).long()
    crops = (indices, indices, indices.bool()) if drawn else (None, None, None)
    where = dict(zip(("top", "left", "mirror"), crops, strict=True))
    augment_crop_flip(stored, indices, **where, reflect=reflect, out_dtype=dtype, channels=channels)


attack = {"teacher_logits": None, "teacher_adv_logits": None}
each = torch.full((128,), 8 / 255)

# Compiled for every GPU.
CASES: dict[str, Callable[[], object]] = {
    "select": select,
    "threshold": lambda: rgp.rgp_threshold(tensors(), tensors(), percentile=30, alpha=0.1),
    "mask": lambda: rgp.rgp_mask_(tensors(), tensors(), tensors(), percentile=30, alpha=0.1),
    "update": update,
    "average": average,
    "step linf": step,
    "step l2": partial(step, "l2"),
    "losses": losses,
    "augment": augment,
    **{
        f"start {norm} {start}": partial(
            pgd_init, images(), eps=8 / 255, norm=norm, start=start, seed=0
        )
        for norm, start in (("linf", "uniform"), ("linf", "normal"), ("l2", "uniform"))
    },
}

# Compiled for one of them.
VARIANTS: dict[str, Callable[[], object]] = {
    "select signed": partial(select, score="signed"),
    "select abs_of_sum": partial(select, score="abs_of_sum"),
    "select bf16": partial(select, half, half),
    "select bf16 fp32": partial(select, half, tensors),
    "select fp16": partial(select, partial(tensors, torch.float16), tensors),
    "select unaligned": partial(select, unaligned, unaligned),
    "mask bf16": lambda: rgp.rgp_mask_(half(), half(), half(), percentile=30, alpha=0.1),
    "update plain": partial(update, scores=None, thresholds=None, averages=None, moved=None),
    "update bf16": lambda: update(grads=half, low_precision_copies=half()),
    "update nesterov hold": partial(update, nesterov=True, conserve="weight", lr=0.1),
    "update without momentum": partial(update, momentum=0.0),
    "update skip": partial(update, skip=torch.tensor(False), weight_decay=torch.zeros(len(SHAPES))),
    "update unaligned": partial(update, unaligned, unaligned),
    "average always": partial(average, rate=1.0, decay=torch.tensor(0.999)),
    "average bf16": partial(average, half),
    "average fp64": partial(average, double),
    "average counts": partial(average, partial(tensors, torch.int64)),
    "average bool": partial(average, partial(tensors, torch.bool)),
    "copy": copy,
    "copy bf16": partial(copy, torch.bfloat16),
    "copy fp64": partial(copy, torch.float64),
    "copy counts": partial(copy, torch.int64),
    # Integers would be compiled into a kernel, and NumPy's numbers have no type there.
    **{
        f"{name} of {kind}": partial(call, number)
        for kind, number in (("0", 0), ("1", 1), ("numpy", np.float32(0.5)))
        for name, call in (
            ("update numbers", lambda n: update(lr=n, momentum=n, weight_decay=n, decay=n)),
            ("average decay", lambda n: average(decay=n)),
            ("average decay fp64", lambda n: average(double, decay=n)),
            ("coin", lambda n: flip_coin(n, seed=1, step=0)),
            ("step numbers", lambda n: step(step_size=n, eps=n)),
            ("start numbers", lambda n: pgd_init(images(), eps=n, seed=1)),
            ("losses numbers", lambda n: losses(beta=n, gamma=n)),
        )
    },
    "update lr fp64, decay bf16": lambda: update(
        lr=torch.tensor(0.1).double(), decay=torch.tensor(0.9).bfloat16()
    ),
    "update momentum fp64": lambda: update(momentum=torch.tensor(0.9).double(), nesterov=True),
    "update fp64 gradients": partial(update, grads=double),
    "update of everything": lambda: update(
        grads=half,
        low_precision_copies=half(),
        nesterov=True,
        conserve="weight",
        skip=torch.tensor(False),
        weight_decay=torch.zeros(len(SHAPES)),
        decay=torch.tensor(0.9),
    ),
    **{
        f"{name} of seed {seed}": partial(call, seed=seed)
        for seed in (1, 2**63, 2**64 - 1)
        for name, call in (
            ("coin", partial(flip_coin, 0.5, step=0)),
            ("start", partial(pgd_init, images(), eps=0.1)),
            ("start l2", partial(pgd_init, images(), eps=0.1, norm="l2")),
        )
    },
    "step linf each": partial(step, step_size=each, eps=each),
    "step linf bf16": partial(step, dtype=torch.bfloat16),
    "step l2 each": partial(step, "l2", step_size=each, eps=each),
    "augment bf16, 4 channels": partial(augment, torch.bfloat16, 4),
    "augment bf16, 8 channels": partial(augment, torch.bfloat16, 8),
    "augment mirrored border": partial(augment, reflect=True),
    "augment nothing": partial(augment, drawn=False),
    "losses bf16": partial(losses, dtype=torch.bfloat16),
    "losses of 100": partial(losses, classes=100),
    "losses of 1000": partial(losses, classes=1000),
    **{
        f"losses {name}": partial(losses, **attack, gradients=(name,))
        for name in ("kl", "adversarial_ce", "margin")
    },
}

# What --some compiles for every GPU: few and large values, and the kernel of the most operations.
ON_EACH_GPU = ("update", "step l2")
# The variants that it makes machine code of: other widths, places and numbers of values. What the
# others could break is the types, which Triton finds before it makes any.
KINDS = (
    *("select bf16", "select unaligned", "update of everything", "average fp64"),
    *("losses of 1000", "augment bf16, 4 channels", "step linf each"),
)
