"""One training step: attack, loss, gradients, update, in passes that fit into memory.

A step whose loss or gradient is not finite leaves weights, averages and BatchNorm statistics as
they were. A batch that does not fit into memory is cut into equal pieces whose gradients are added
up, so that the update is of the same batch.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from cure_fast.errors import DivergedError, MemoryExhaustedError
from cure_fast.memory import is_out_of_memory
from cure_fast.method import Terms, around, attack_mode

if TYPE_CHECKING:
    from cure_fast.trainer import Run

T = TypeVar("T")


def train_step(run: Run, x: Tensor, y: Tensor) -> Terms | None:
    """Train on one batch; return the detached terms of its loss, or None where that is not finite.

    Weights move only if loss and gradients are finite; ``run.skipped`` counts the steps where they
    do not. With fp16 an overflow under a finite loss is part of finding the loss scale, and does
    not count towards ``--max-skipped`` while the scale is above 1.

    Args:
        run: what is moved.
        x: natural images [N, C, H, W] in [0, 1], float32, channels_last.
        y: labels [N] int64.

    Raises:
        DivergedError: after more than ``--max-skipped`` such steps in a row.
        MemoryExhaustedError: if not even two images fit into memory.
    """
    before = Moving(run)
    x_adv = fitting(run, before, len(y), lambda size: attack(run, x, y, size))
    with around(run.policies, run, x, x_adv, y):
        attacked = Moving(run)
        terms = fitting(run, attacked, len(y), lambda size: add_gradients(run, x, x_adv, y, size))
        run.scaler.unscale_(run.optimizer)
        loss_is_finite, finite = judge(run, terms)
        if finite:
            update(run)
        run.scaler.update()
    if finite:
        for policy in run.policies:
            policy.on_step(run)
        run.skipped_in_row = 0
    else:
        before.restore_buffers()
        count_skipped(run, loss_is_finite)
    run.optimizer.zero_grad(set_to_none=True)
    run.gradients.clear()
    return terms if loss_is_finite else None


def attack(run: Run, x: Tensor, y: Tensor, size: int) -> Tensor:
    """Return the method's adversarial images [N, C, H, W], made ``size`` at a time."""
    with attack_mode(run.model, run.config.attack.attack_mode):
        pieces = [run.method.attack(run, *piece) for piece in zip(*split(size, x, y), strict=True)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def add_gradients(run: Run, x: Tensor, x_adv: Tensor, y: Tensor, size: int) -> Terms:
    """Fill the gradients of the batch, ``size`` images at a time; return its detached terms.

    Every term is a mean over its images, so pieces count by their share of the batch.
    """
    run.optimizer.zero_grad(set_to_none=True)
    run.gradients.clear()
    sums: Terms = {}
    for piece in zip(*split(size, x, x_adv, y), strict=True):
        terms = run.method.loss(run, *piece)
        share = len(piece[0]) / len(x)
        if share < 1:
            terms = {name: share * term for name, term in terms.items()}
        run.method.backward(run, terms)
        for name, term in terms.items():
            sums[name] = sums[name] + term.detach() if name in sums else term.detach()
    return sums


def split(size: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Cut tensors of equal length into near-equal pieces of about ``size``.

    No piece holds a single image unless the batch does: BatchNorm cannot normalise one value.
    """
    count = len(tensors[0])
    pieces = max(1, min(math.ceil(count / size), count // 2))
    return [tensor.tensor_split(pieces) for tensor in tensors]


def judge(run: Run, terms: Terms) -> tuple[bool, bool]:
    """Return whether the terms are finite, and whether the gradients are too (reads the device)."""
    grads = [p.grad for p in run.model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    values = torch.stack([*(term.float() for term in terms.values()), norm.float()])
    finite = values.isfinite().tolist()
    return all(finite[:-1]), all(finite)


def update(run: Run) -> None:
    """Move the weights; what runs out of memory here has moved some of them and cannot be redone.

    Raises:
        MemoryExhaustedError: where that happens.
    """
    try:
        for policy in run.policies:
            policy.on_grads(run)
        run.scaler.step(run.optimizer)
    except Exception as error:
        if is_out_of_memory(error):
            raise MemoryExhaustedError(
                f"no memory for the update of the weights in step {run.step}: {error}. Try a "
                "smaller model, or a device with more memory."
            ) from error
        raise


def count_skipped(run: Run, loss_is_finite: bool) -> None:
    """Count a step that moved nothing.

    Raises:
        DivergedError: if there were too many in a row.
    """
    run.skipped += 1
    if run.scaler.is_enabled() and loss_is_finite and run.scaler.get_scale() >= 1:
        return
    run.skipped_in_row += 1
    if run.skipped_in_row > run.config.run.max_skipped:
        what = "gradient" if loss_is_finite else "loss"
        raise DivergedError(
            f"the {what} is not finite in epoch {run.epoch + 1}, step {run.step}, for the "
            f"{ordinal(run.skipped_in_row)} step in a row. {advice(run)}"
        )


def ordinal(count: int) -> str:
    """Return ``1st``, ``2nd``, ``3rd``, ``11th``, ``21st``."""
    ending = "th" if count % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(count % 10)
    return f"{count}{ending or 'th'}"


def advice(run: Run) -> str:
    """Return what to try after a divergence."""
    return f"Try a lower --lr than {run.config.optim.lr:g}, or --amp off."


class Moving:
    """What a step moves besides weights: BatchNorm statistics and the attack's random source.

    Args:
        run: remembered as it is now.
    """

    def __init__(self, run: Run) -> None:
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for network in (run.model, *run.networks.values()):
            for buffer in network.buffers():
                by_dtype.setdefault(buffer.dtype, []).append(buffer)
        # One launch per dtype on a GPU, where a network has a hundred small buffers.
        self.buffers = list(by_dtype.values())
        self.values = [[torch.empty_like(buffer) for buffer in group] for group in self.buffers]
        for group, values in zip(self.buffers, self.values, strict=True):
            torch._foreach_copy_(values, group)  # pyright: ignore[reportPrivateImportUsage]
        self.generator = run.generators["attack"]
        self.state = self.generator.get_state()

    def restore_buffers(self) -> None:
        """Put the statistics back."""
        for group, values in zip(self.buffers, self.values, strict=True):
            torch._foreach_copy_(group, values)  # pyright: ignore[reportPrivateImportUsage]

    def restore(self) -> None:
        """Put everything back."""
        self.restore_buffers()
        self.generator.set_state(self.state)


def fitting(run: Run, before: Moving, count: int, compute: Callable[[int], T]) -> T:
    """Return ``compute(size)``; halve ``run.micro_batch_size`` for as long as memory runs out.

    Args:
        run: keeps the size for the steps to come.
        before: state to start each try from.
        count: images in the batch.
        compute: what is tried, given the number of images per pass.

    Raises:
        MemoryExhaustedError: if two images at a time are too many.
    """
    while True:
        size = min(run.micro_batch_size or count, count)
        try:
            return compute(size)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).split("\n")[0]
        # Outside the handler, whose traceback holds the tensors of the failed try.
        before.restore()
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
        if size <= 2:
            raise MemoryExhaustedError(
                f"step {run.step} does not fit into memory, even {size} of the batch's {count} "
                f"images at a time ({reason}). Try a smaller --model or --width, --amp bf16, or a "
                "device with more memory."
            )
        run.micro_batch_size = math.ceil(size / 2)
        print(
            f"memory: step {run.step} did not fit; from here {run.micro_batch_size} images per "
            f"pass, {count} per step as before",
            file=sys.stderr,
        )
