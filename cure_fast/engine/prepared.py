"""What the steps of a run need, and a step computed with it on the device alone."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cure_fast import distributed
from cure_fast.batch import Batch
from cure_fast.classifier import ImageClassifier, attack_mode
from cure_fast.kernels import TensorList, copy_where_
from cure_fast.step.policy import around
from cure_fast.step.run import Terms
from cure_fast.step.state import Statistics, TrainState, Undo
from cure_fast.step.train_step import join_parts, with_all_notes

from .copies import Copies, standing_in
from .loss import Loss
from .on_device import Counters, Numbers
from .recorded import compile_static
from .update import Update


class Kind(NamedTuple):
    """What steps that do the same operations have in common."""

    phase: Hashable
    attack_steps: int
    shape: torch.Size
    stride: tuple[int, ...]


def kind_of(run: TrainState, batch: Batch) -> Kind:
    """Return the kind of the step that comes next."""
    phases = (run.method.phase(run), *(policy.phase(run) for policy in run.policies))
    phase = (phases, *sorted(batch.notes))
    return Kind(phase, run.attack_steps, batch.x.shape, batch.x.stride())


class Prepared:
    """What the steps of a run need: copies, tables and memory that stay where they are.

    They are made for the run's tensors; ``has`` says which features of the engine are on.
    """

    def __init__(self, run: TrainState, has: Callable[[str], bool]) -> None:
        self.run = run
        self.numbers = Numbers(run)
        self.counters = Counters(run)
        self.undo = Undo(run)
        self.aside = Statistics([run.model, *run.networks.values()])
        dtype = run.model.compute_dtype if has("copies") else None
        self.own = Copies(run.model, dtype)
        moving, still = (
            [Copies(net, dtype) for net in nets.values() if isinstance(net, ImageClassifier)]
            for nets in (run.networks, run.teachers)
        )
        self.moving = [self.own, *moving]
        trained = set(map(id, run.trained_parameters))
        # The update writes these, and a policy's move of weights, or a loss, asks for the others.
        self.copies = {
            id(copies.weights[name]): copy
            for copies in self.moving
            for name, copy in copies.by_name.items()
            if id(copies.weights[name]) in trained
        }
        copied = [copies for copies in (*self.moving, *still) if copies.by_name]
        self.loss = Loss(
            run,
            copied,
            stacked=has("stack"),
            compiled=has("compile-loss"),
            recorded=self.numbers.send,
        )
        self.compiled = compile_static(self.own.logits) if has("compile") else None
        self.update = Update(run.optimizer, run.config.optim, self.copies, fused=has("fuse"))
        self.buffers = [
            (TensorList(buffers), TensorList(kept)) for buffers, kept in self.undo.statistics.groups
        ]
        # Whether the step under way has come to its update, after which it cannot be taken back.
        self.updating = False
        self.rewrites = any(policy.moves_weights for policy in run.policies)

    def restore(self) -> None:
        """Go back to before a step that failed before its update."""
        self.clear()
        self.undo.restore()

    def compute(self, batch: Batch) -> Terms:
        """Compute a step on the device; return its detached terms."""
        run = self.run
        self.run.engine.skip = None
        self.undo.statistics.keep()
        batch = batch.attacked(self.attack(batch))
        with around(run.policies, run, batch):
            for copies in self.moving[0 if self.rewrites else 1 :]:
                copies.refresh()
            terms = self.loss.step(batch, self.kind(batch))
            join_parts(run, batch, terms)
            loss_is_finite, skip = self.judge(terms)
            self.run.engine.skip = skip
            for policy in run.policies:
                policy.on_grads(run)
            optim, lr = run.config.optim, self.setting("lr")
            # A number that never changes is none to send.
            moves = optim.schedule == "onecycle-cosine" and optim.momentum
            momentum = self.setting("momentum") if moves else optim.momentum
            self.updating = True
            if optim.clip_grad is not None:
                torch.nn.utils.clip_grad_norm_(run.trained_parameters, optim.clip_grad)
            run.last_gradients.keep(skip)
            self.update.apply(lr, momentum, skip)
        noted = with_all_notes(run.policies, batch)
        for policy in run.policies:
            policy.on_step(run, noted)
        if self.rewrites:
            self.own.refresh()
        for buffers, kept in self.buffers:
            copy_where_(buffers, kept, condition=skip)
        self.counters.add(terms, loss_is_finite, skip)
        self.clear()
        return terms

    def setting(self, name: str) -> Tensor:
        """Return a 0-d tensor that holds a setting of the optimiser in each step."""
        return self.numbers.get(name, lambda run: run.optimizer.param_groups[0][name], send=True)

    def kind(self, batch: Batch) -> Kind | None:
        """Return the kind of steps whose loss is recorded; None for a loss that is not."""
        records = self.loss.stacked or self.loss.compiled
        regular = batch.whole == self.run.loader.batch_size
        return kind_of(self.run, batch) if records and regular else None

    def attack(self, batch: Batch) -> Tensor:
        """Return the method's adversarial images, made with the network in its attack mode."""
        run = self.run
        # For an epoch's last, smaller batch, compilation takes too long.
        regular = batch.whole == run.loader.batch_size

        def network(x: Tensor) -> Tensor:
            # What is compiled would pass over the hooks of a method.
            compiled = self.compiled if regular and not has_hooks(run.model) else None
            return (compiled or self.own.logits)(x)

        with attack_mode(run.model, run.config.attack.attack_mode), standing_in(run.model, network):
            return run.method.attack(run, batch)

    def gradients(self, batch: Batch, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Return the gradients of the method's total; statistics stay as they are."""
        self.aside.keep()
        found = self.loss.derive(batch, parameters, self.kind(batch))
        self.aside.restore()
        distributed.sum_(found)
        return found

    def judge(self, terms: Terms) -> tuple[Tensor, Tensor]:
        """Return whether the loss is finite, and whether anything is not, 0-d bool.

        Adds the gradient's norm to the terms.
        """
        loss_is_finite = torch.stack(list(terms.values())).isfinite().all()
        going = loss_is_finite
        groups = [[p.grad for p in self.run.trained_parameters if p.grad is not None]]
        groups += self.run.gradients.values()
        for group in groups:
            # Their norms are stacked, which for more than one dtype copies each by a launch.
            for dtype in dict.fromkeys(grad.dtype for grad in group):
                alike = [grad for grad in group if grad.dtype == dtype]
                norm = torch.nn.utils.get_total_norm(alike)
                terms.setdefault("gradient_norm", norm.nan_to_num(0, 0, 0))
                going = going & norm.isfinite()
        return loss_is_finite, ~going

    def clear(self) -> None:
        """Let go what belongs to one step."""
        self.run.optimizer.zero_grad(set_to_none=True)
        self.run.gradients.clear()
        self.run.engine.skip = None
        self.updating = False


def has_hooks(network: nn.Module) -> bool:
    """Return whether a module of the network calls hooks."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind) for module in network.modules() for kind in kinds)
