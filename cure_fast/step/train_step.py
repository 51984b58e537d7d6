"""One training step: attack, loss, gradients, update, in passes that fit into memory.

A step whose loss or gradient is not finite leaves weights, momenta and BatchNorm statistics as they
were; what a policy does before the attack (a revision model that moves first) stands. A batch that
does not fit into memory is cut into near-equal pieces whose gradients are added up, so that the
update is of the same batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from cure_fast import distributed
from cure_fast.batch import Batch
from cure_fast.classifier import attack_mode
from cure_fast.console import warn
from cure_fast.errors import DivergedError, MemoryExhaustedError, is_out_of_memory
from cure_fast.step.policy import Policy, Wanted, around
from cure_fast.step.run import Terms
from cure_fast.step.state import TrainState, Undo

T = TypeVar("T")


def train_step(state: TrainState, batch: Batch) -> Terms | None:
    """Train on one batch; return the detached terms of its loss, or None where that is not finite.

    Weights move only if loss and gradients are finite; ``state.skipped`` counts the steps where
    they do not. With fp16 an overflow under a finite loss is part of finding the loss scale, and
    does not count towards ``--max-skipped`` while the scale is above 1.

    Raises:
        DivergedError: after more than ``--max-skipped`` such steps in a row.
        MemoryExhaustedError: if not even two images fit into memory.
    """
    state.undo = state.undo or (Undo(state), Undo(state))
    (before_attack, before_loss), count = state.undo, len(batch)
    before_attack.keep()
    x_adv = fitting(
        state, before_attack.restore, count, lambda pieces: attack(state, batch, pieces)
    )
    batch = batch.attacked(x_adv)
    with around(state.policies, state, batch):
        before_loss.keep()
        terms = fitting(
            state, before_loss.restore, count, lambda pieces: add_gradients(state, batch, pieces)
        )
        join_parts(state, batch, terms)
        state.scaler.unscale_(state.optimizer)
        verdict = judge(state, terms)
        if all(verdict):
            update(state)
        update_scale(state, verdict)
    if all(verdict):
        noted = with_all_notes(state.policies, batch)
        for policy in state.policies:
            policy.on_step(state, noted)
        state.skipped_in_row = 0
    else:
        # Random sources go on.
        before_attack.statistics.restore()
        state.last_gradients.leave_out()
        count_skipped(state, verdict.loss)
    state.optimizer.zero_grad(set_to_none=True)
    state.gradients.clear()
    return terms if verdict.loss else None


def attack(state: TrainState, batch: Batch, pieces: int) -> Tensor:
    """Return the method's adversarial images [N, C, H, W], made in ``pieces`` passes."""
    parts = batch.split(pieces)
    with attack_mode(state.model, state.config.attack.attack_mode):
        made = [state.method.attack(state, part) for part in parts]
    batch.join(parts)
    return made[0] if len(made) == 1 else torch.cat(made)


def add_gradients(state: TrainState, batch: Batch, pieces: int) -> Terms:
    """Fill the gradients of the batch in ``pieces`` passes; return its detached terms.

    Every term is a mean over its images, so pieces count by their share of the batch.
    """
    state.optimizer.zero_grad(set_to_none=True)
    state.gradients.clear()
    wanted = wanted_gradients(state)
    sums: Terms = {}
    parts = batch.split(pieces)
    for part in parts:
        terms = loss_of(state, part)
        share = len(part) / batch.whole
        if share < 1:
            terms = {name: share * term for name, term in terms.items()}
        for name, (of, parameters) in wanted.items():
            grads = torch.autograd.grad(
                state.scaler.scale(of(terms)),
                parameters,
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            add_to(state.gradients, name, list(grads))
        state.scaler.scale(terms["total"]).backward()
        for name, term in terms.items():
            sums[name] = sums[name] + term.detach() if name in sums else term.detach()
    batch.join(parts)
    return sums


def join_parts(state: TrainState, batch: Batch, terms: Terms) -> None:
    """Add up what the processes have of a step: terms, all gradients, BatchNorm statistics.

    Each counts by its share of the images, so that the step is that of the whole batch. Statistics
    are means, so that all processes have the same.
    """
    if batch.part is None:
        return
    grads = [p.grad for p in state.trained_parameters if p.grad is not None]
    further = [grad for group in state.gradients.values() for grad in group]
    statistics = [] if state.config.run.sync_batchnorm else running_statistics(state.all_networks)
    for kept in statistics:
        kept.mul_(batch.part.share)
    distributed.sum_([*terms.values(), *grads, *further, *statistics])


def running_statistics(networks: Mapping[str, nn.Module]) -> list[Tensor]:
    """Return the means and variances that BatchNorms of the networks keep."""
    modules = [module for network in networks.values() for module in network.modules()]
    norms = [module for module in modules if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    kept = [tensor for norm in norms for tensor in (norm.running_mean, norm.running_var)]
    return [tensor for tensor in kept if tensor is not None]


def with_all_notes(policies: Sequence[Policy], batch: Batch) -> Batch:
    """Return the batch with labels, places and notes of all processes, where policies may ask.

    Its images are those of this process alone.
    """
    asks = any(type(policy).on_step is not Policy.on_step for policy in policies)
    part = batch.part
    if part is None or not batch.notes or not asks:
        return batch

    def joint(rows: Tensor) -> Tensor:
        return distributed.joint(rows, first=part.first, whole=part.whole)

    notes = {name: joint(note) for name, note in batch.notes.items()}
    return replace(batch, y=joint(batch.y), index=joint(batch.index), notes=notes)


def loss_of(state: TrainState, batch: Batch) -> Terms:
    """Return the terms of the method's loss, with those that policies add.

    Beside them stands the accuracy in percent on the natural and the adversarial images, where the
    loss has a pass of the trained network over them.
    """
    with passes_of(state.model) as passes:
        terms = state.method.loss(state, batch)

        def logits(images: Tensor) -> Tensor:
            for given, found in passes:
                if given is images and found.requires_grad:
                    return found
            return state.model(images)

        for policy in state.policies:
            policy.on_loss(state, batch, terms, logits)
    kinds = {"natural": batch.x} | ({} if batch.x_adv is batch.x else {"adversarial": batch.x_adv})
    for kind, images in kinds.items():
        found = next((logits for given, logits in passes if given is images), None)
        if found is not None:
            right = (found.detach().argmax(1) == batch.y).to(terms["total"].dtype)
            terms[f"{kind}_accuracy"] = 100 * right.mean()
    return terms


@contextmanager
def passes_of(model: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Note the training-mode passes through a network in the block: images and logits."""
    passes: list[tuple[Tensor, Tensor]] = []

    def note(model: nn.Module, given: tuple[Tensor], logits: Tensor) -> None:
        if model.training:
            passes.append((given[0], logits))

    hook = model.register_forward_hook(note)
    try:
        yield passes
    finally:
        hook.remove()


def wanted_gradients(state: TrainState) -> dict[str, Wanted]:
    """Return which gradients the step's policies want."""
    wanted: dict[str, Wanted] = {}
    for policy in state.policies:
        for name, gradients in policy.wants(state).items():
            assert name not in wanted, f"two policies want gradients that they call {name}"
            wanted[name] = gradients
    return wanted


def add_to(gradients: dict[str, list[Tensor]], name: str, grads: list[Tensor]) -> None:
    """Add a pass's part to the set of gradients ``name``."""
    if name in gradients:
        torch._foreach_add_(gradients[name], grads)  # pyright: ignore[reportPrivateImportUsage]
    else:
        gradients[name] = grads


def pieces_of(count: int, size: int) -> int:
    """Return in how many passes ``count`` images go, of at most ``size`` where that is possible.

    No pass has a single image unless the batch does: BatchNorm cannot normalise one value. So five
    images two at a time go in two passes, of three and two.
    """
    return max(1, min(math.ceil(count / size), count // 2))


class Verdict(NamedTuple):
    """What of a step is finite: the terms of its loss, ``.grad``, and the further gradients."""

    loss: bool
    grads: bool = True
    further: bool = True


def judge(state: TrainState, terms: Terms) -> Verdict:
    """Return what of the step is finite, and add the gradient's norm to the terms; read the
    device once.
    """
    grads = [p.grad for p in state.trained_parameters if p.grad is not None]
    further = [grad for group in state.gradients.values() for grad in group]
    finite = {"loss": torch.stack([*terms.values()]).isfinite().all()}
    norms = {
        name: torch.nn.utils.get_total_norm(group)
        for name, group in (("grads", grads), ("further", further))
        if group
    }
    finite |= {name: norm.isfinite() for name, norm in norms.items()}
    if "grads" in norms:
        # A step that moves nothing has none: fp16 overflows while it looks for its loss scale.
        terms["gradient_norm"] = norms["grads"].nan_to_num(0, 0, 0)
    # What a step has no gradients of has none that is not finite.
    return Verdict(**dict(zip(finite, torch.stack([*finite.values()]).tolist(), strict=True)))


def update_scale(state: TrainState, verdict: Verdict) -> None:
    """Let fp16's loss scale follow: it falls where gradients overflowed, and rises in time."""
    if state.scaler.is_enabled() and verdict.grads and not verdict.further:
        # The scaler has seen ``.grad`` alone.
        state.scaler.update(state.scaler.get_scale() * state.scaler.get_backoff_factor())
    else:
        state.scaler.update()


def update(state: TrainState) -> None:
    """Move the weights; what runs out of memory here has moved some of them and cannot be redone.

    Raises:
        MemoryExhaustedError: where that happens.
    """
    try:
        for policy in state.policies:
            policy.on_grads(state)
        if state.config.optim.clip_grad is not None:
            torch.nn.utils.clip_grad_norm_(state.trained_parameters, state.config.optim.clip_grad)
        state.last_gradients.keep()
        state.scaler.step(state.optimizer)
    except Exception as error:
        if is_out_of_memory(error):
            raise no_memory_for_update(state, error) from error
        raise


def no_memory_for_update(state: TrainState, error: Exception) -> MemoryExhaustedError:
    """Return the error of an update that ran out of memory."""
    return MemoryExhaustedError(
        f"no memory for the update of the weights in step {state.step}: {error}. Try a "
        "smaller model, or a device with more memory."
    )


def count_skipped(state: TrainState, loss_is_finite: bool) -> None:
    """Count a step that moved nothing.

    Raises:
        DivergedError: if there were too many in a row.
    """
    state.skipped += 1
    if state.scaler.is_enabled() and loss_is_finite and state.scaler.get_scale() >= 1:
        return
    state.skipped_in_row += 1
    if state.skipped_in_row > state.config.run.max_skipped:
        what = "gradient" if loss_is_finite else "loss"
        raise DivergedError(
            f"the {what} is not finite in epoch {state.epoch + 1}, step {state.step}, for "
            f"{state.skipped_in_row} step{'s' * (state.skipped_in_row > 1)} in a row."
        )


def fitting(
    state: TrainState, restore: Callable[[], None], count: int, compute: Callable[[int], T]
) -> T:
    """Return ``compute(pieces)`` for a batch of ``count`` images, in as few pieces as fit.

    As long as memory runs out, ``restore`` undoes the try and ``state.micro_batch_size`` is halved,
    also for the steps to come.

    Raises:
        MemoryExhaustedError: if the batch can be cut no further.
    """
    while True:
        pieces = pieces_of(count, state.micro_batch_size or count)
        try:
            return compute(pieces)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).split("\n")[0]
            if state.part is not None:
                raise MemoryExhaustedError(
                    f"step {state.step} does not fit into memory ({reason}). Several processes cut "
                    "no batch: take more of them, or a smaller --batch-size."
                ) from error
        # Outside the handler, whose traceback holds the tensors of the failed try.
        restore()
        if state.device.type == "cuda":
            torch.cuda.empty_cache()
        largest = math.ceil(count / pieces)
        size = max(2, math.ceil(largest / 2))
        if pieces_of(count, size) == pieces:
            raise MemoryExhaustedError(
                f"step {state.step} does not fit into memory, even {largest} of the batch's "
                f"{count} images at a time ({reason}). Try a smaller --model or --width, --amp "
                "bf16, or a device with more memory."
            )
        state.micro_batch_size = size
        warn(
            f"step {state.step} did not fit into memory; from here {size} images per pass, {count} "
            "per step as before"
        )
