"""One training step: attack, loss, gradients, update, in passes that fit into memory.

A step whose loss or gradient is not finite leaves weights, momenta and BatchNorm statistics as they
were; what a policy does before the loss (a revision model that moves first) stands. A batch that
does not fit into memory is cut into near-equal pieces whose gradients are added up, so that the
update is of the same batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from cure_fast.console import warn
from cure_fast.errors import DivergedError, MemoryExhaustedError, is_out_of_memory
from cure_fast.models.modes import attack_mode
from cure_fast.step.method import Terms, around

if TYPE_CHECKING:
    from cure_fast.training.trainer import Run

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
    if run.undo is None:
        run.undo = Undo(run)
    undo, count = run.undo, len(y)
    undo.keep_before_attack()
    x_adv = fitting(run, undo.restore_attack, count, lambda pieces: attack(run, x, y, pieces))
    with around(run.policies, run, x, x_adv, y):
        undo.keep_before_loss()
        terms = fitting(
            run, undo.restore_loss, count, lambda pieces: add_gradients(run, x, x_adv, y, pieces)
        )
        run.scaler.unscale_(run.optimizer)
        verdict = judge(run, terms)
        if verdict.all_finite:
            update(run)
        update_scale(run, verdict)
    if verdict.all_finite:
        for policy in run.policies:
            policy.on_step(run)
        run.skipped_in_row = 0
    else:
        undo.restore_statistics()
        count_skipped(run, verdict.loss)
    run.optimizer.zero_grad(set_to_none=True)
    run.gradients.clear()
    return terms if verdict.loss else None


def attack(run: Run, x: Tensor, y: Tensor, pieces: int) -> Tensor:
    """Return the method's adversarial images [N, C, H, W], made in ``pieces`` passes."""
    with attack_mode(run.model, run.config.attack.attack_mode):
        made = [run.method.attack(run, *piece) for piece in split(pieces, x, y)]
    return made[0] if len(made) == 1 else torch.cat(made)


def add_gradients(run: Run, x: Tensor, x_adv: Tensor, y: Tensor, pieces: int) -> Terms:
    """Fill the gradients of the batch in ``pieces`` passes; return its detached terms.

    Every term is a mean over its images, so pieces count by their share of the batch.
    """
    run.optimizer.zero_grad(set_to_none=True)
    run.gradients.clear()
    sums: Terms = {}
    for piece in split(pieces, x, x_adv, y):
        terms = run.method.loss(run, *piece)
        share = len(piece[0]) / len(x)
        if share < 1:
            terms = {name: share * term for name, term in terms.items()}
        run.method.backward(run, terms)
        for name, term in terms.items():
            sums[name] = sums[name] + term.detach() if name in sums else term.detach()
    return sums


def split(pieces: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the same part of each tensor, ``pieces`` parts whose lengths differ by one at most."""
    return zip(*(tensor.tensor_split(pieces) for tensor in tensors), strict=True)


def pieces_of(count: int, size: int) -> int:
    """Return in how many passes ``count`` images go, of at most ``size`` where that is possible.

    No pass has a single image unless the batch does: BatchNorm cannot normalise one value. So five
    images two at a time go in two passes, of three and two.
    """
    return max(1, min(math.ceil(count / size), count // 2))


@dataclass(frozen=True)
class Verdict:
    """What of a step is finite: the terms of its loss, ``.grad``, and the further gradients."""

    loss: bool
    grads: bool = True
    further: bool = True

    @property
    def all_finite(self) -> bool:
        """Whether the step may move anything."""
        return self.loss and self.grads and self.further


def judge(run: Run, terms: Terms) -> Verdict:
    """Return what of the step is finite; reads the device once."""
    grads = [p.grad for p in run.model.parameters() if p.grad is not None]
    further = [grad for group in run.gradients.values() for grad in group]
    finite = [torch.stack([*terms.values()]).isfinite().all()]
    finite += [
        torch.nn.utils.get_total_norm(group).isfinite() for group in (grads, further) if group
    ]
    # A method without further gradients has none that is not finite.
    return Verdict(*torch.stack(finite).tolist())


def update_scale(run: Run, verdict: Verdict) -> None:
    """Let fp16's loss scale follow: it falls where gradients overflowed, and rises in time."""
    if run.scaler.is_enabled() and verdict.grads and not verdict.further:
        # The scaler has seen ``.grad`` alone.
        run.scaler.update(run.scaler.get_scale() * run.scaler.get_backoff_factor())
    else:
        run.scaler.update()


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
            raise no_memory_for_update(run, error) from error
        raise


def no_memory_for_update(run: Run, error: Exception) -> MemoryExhaustedError:
    """Return the error of an update that ran out of memory."""
    return MemoryExhaustedError(
        f"no memory for the update of the weights in step {run.step}: {error}. Try a "
        "smaller model, or a device with more memory."
    )


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
            f"{ordinal(run.skipped_in_row)} step in a row."
        )


def ordinal(count: int) -> str:
    """Return ``1st``, ``2nd``, ``3rd``, ``11th``, ``21st``."""
    ending = "th" if count % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(count % 10)
    return f"{count}{ending or 'th'}"


class Undo:
    """What the passes of a step move besides gradients, kept so that it can be put back.

    That is BatchNorm statistics, and the random sources that passes draw from: the run's own and
    torch's. The copies are allocated once.

    Args:
        run: whose networks are looked after.
    """

    def __init__(self, run: Run) -> None:
        self.model = Statistics([run.model])
        self.networks = Statistics(list(run.networks.values()))
        self.during_attack = Statistics([run.model])
        self.device = run.device
        self.generators = list(run.generators.values())
        self.states: list[Tensor] = []

    def keep_before_attack(self) -> None:
        """Keep what the attack can move."""
        self.model.keep()
        self._keep_random()

    def keep_before_loss(self) -> None:
        """Keep what the passes of the loss can move, with what policies did before them."""
        self.during_attack.keep()
        self.networks.keep()
        self._keep_random()

    def restore_attack(self) -> None:
        """Go back to before the attack."""
        self.model.restore()
        self._restore_random()

    def restore_loss(self) -> None:
        """Go back to before the passes of the loss."""
        self.during_attack.restore()
        self.networks.restore()
        self._restore_random()

    def restore_statistics(self) -> None:
        """Put back the statistics of the whole step; random sources go on."""
        self.model.restore()
        self.networks.restore()

    def _keep_random(self) -> None:
        self.states = [generator.get_state() for generator in self.generators]
        self.torch_state = torch.get_rng_state()
        if self.device.type == "cuda":
            self.cuda_state = torch.cuda.get_rng_state(self.device)

    def _restore_random(self) -> None:
        for generator, state in zip(self.generators, self.states, strict=True):
            generator.set_state(state)
        torch.set_rng_state(self.torch_state)
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(self.cuda_state, self.device)


class Statistics:
    """The buffers of networks, such as BatchNorm's running statistics, and one copy of them.

    Args:
        networks: their buffers must stay the tensors that they are now.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for network in networks:
            for buffer in network.buffers():
                by_dtype.setdefault(buffer.dtype, []).append(buffer)
        # One launch per dtype on a GPU, where a network has a hundred small buffers.
        self.groups = [
            (group, [torch.empty_like(buffer) for buffer in group]) for group in by_dtype.values()
        ]

    def keep(self) -> None:
        """Copy the buffers."""
        for buffers, copies in self.groups:
            torch._foreach_copy_(copies, buffers)  # pyright: ignore[reportPrivateImportUsage]

    def restore(self) -> None:
        """Copy them back."""
        for buffers, copies in self.groups:
            torch._foreach_copy_(buffers, copies)  # pyright: ignore[reportPrivateImportUsage]


def fitting(run: Run, restore: Callable[[], None], count: int, compute: Callable[[int], T]) -> T:
    """Return ``compute(pieces)``; halve ``run.micro_batch_size`` for as long as memory runs out.

    Args:
        run: keeps the size for the steps to come.
        restore: undoes a try that failed.
        count: images in the batch.
        compute: what is tried, given the number of passes.

    Raises:
        MemoryExhaustedError: if the batch can be cut no further.
    """
    while True:
        pieces = pieces_of(count, run.micro_batch_size or count)
        try:
            return compute(pieces)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).split("\n")[0]
        # Outside the handler, whose traceback holds the tensors of the failed try.
        restore()
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
        largest = math.ceil(count / pieces)
        size = max(2, math.ceil(largest / 2))
        if pieces_of(count, size) == pieces:
            raise MemoryExhaustedError(
                f"step {run.step} does not fit into memory, even {largest} of the batch's {count} "
                f"images at a time ({reason}). Try a smaller --model or --width, --amp bf16, or a "
                "device with more memory."
            )
        run.micro_batch_size = size
        warn(
            f"step {run.step} did not fit into memory; from here {size} images per pass, {count} "
            "per step as before"
        )
