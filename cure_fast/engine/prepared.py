"""What the steps of a run need, and a step computed with it on the device alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cure_fast.kernels import TensorList, copy_where_
from cure_fast.models import ImageClassifier
from cure_fast.models.modes import attack_mode
from cure_fast.step.method import Terms, around
from cure_fast.step.train_step import Undo

from .counters import Counters
from .folded import FoldedNetwork
from .numbers import DeviceNumbers
from .passes import Passes, wide
from .tape import Tape
from .tape_compiled import CompiledNetwork, CompiledTape
from .tape_joint import Joint
from .trace import UnsupportedNetworkError
from .update import Update
from .working import WorkingCopies, WorkingNetwork

if TYPE_CHECKING:
    from cure_fast.training.trainer import Run

    from .fast import FastEngine

# Tensor cores read channels in groups of 8 half-precision numbers.
PADDED_CHANNELS = 8

# From images [N, C, H, W] in [0, 1] to logits [N, K].
Network = Callable[[Tensor], Tensor]


class Prepared:
    """What the steps of a run need: copies, tables and memory that stay where they are.

    Args:
        run: whose tensors they are made for.
        engine: the run's; says which features are on, and takes the verdict on a step.
    """

    def __init__(self, run: Run, engine: FastEngine) -> None:
        self.run, self.engine = run, engine
        self.numbers = DeviceNumbers(run)
        self.counters = Counters(run)
        self.undo = Undo(run)
        self.dtype = run.model.compute_dtype if engine.has("copies") else None
        # Without copies, half precision is autocast's, in the network's own forward pass.
        self.autocast = self.dtype is None and run.model.compute_dtype is not None
        self.working = WorkingCopies(run.model, self.dtype)
        copies = self.working.by_name
        self.named = dict(run.model.named_parameters())
        self.weights = {name: copies.get(name, p) for name, p in self.named.items()}
        self.copies = {id(self.named[name]): copy for name, copy in copies.items()}
        self.passes = self._passes()
        joint = run.config.run.joint_forward and run.method.uses_attack
        self.joint = Joint(run, self.passes) if joint and self.passes.tape is not None else None
        self.attacked = self._attacked()
        self.further = self._further()
        self.update = Update(run.optimizer, run.config.optim, self.copies, fused=engine.has("fuse"))
        self.buffers = [
            (TensorList(buffers), TensorList(kept))
            for statistics in (self.undo.model, self.undo.networks)
            for buffers, kept in statistics.groups
        ]
        moved = [tensor for policy in run.policies for tensor in policy.moved_before_loss()]
        self.moved_before_loss = [(tensor, torch.empty_like(tensor)) for tensor in moved]
        # Whether the step under way has come to its update, after which it cannot be taken back.
        self.updating = False
        self.rewrites = any(policy.moves_weights for policy in run.policies)

    def _passes(self) -> Passes:
        """Return what computes the passes of the loss."""
        for copy in self.copies.values():
            copy.requires_grad_()
        model = self.run.model
        if self.autocast:
            return Passes(model.own_logits, self.weights, None)
        network = WorkingNetwork(model, self.weights, self.dtype)
        stacked = self.engine.has("stack")
        return Passes(network, self.weights, self._tape() if stacked else None)

    def _tape(self) -> Tape:
        """Return the tape of the passes of the loss."""
        if not self.engine.has("compile-loss"):
            return Tape(self.run.model, self.weights)
        size = self.run.loader.batch_size
        return CompiledTape(self.run.model, self.weights, batch_size=size)

    def _further(self) -> list[tuple[ImageClassifier, WorkingCopies, Network]]:
        """Return the run's further networks, copies of their weights, and what computes them."""
        further = []
        for network in self.run.networks.values():
            if not isinstance(network, ImageClassifier):
                continue
            copies = WorkingCopies(network, self.dtype)
            computed: Network = WorkingNetwork(network, copies.by_name, self.dtype)
            trains = any(parameter.requires_grad for parameter in network.parameters())
            if self.engine.has("compile-loss") and not self.autocast and not trains:
                weights = {**dict(network.named_parameters()), **copies.by_name}
                with suppress(UnsupportedNetworkError):
                    tape = CompiledTape(network, weights, batch_size=self.run.loader.batch_size)
                    computed = CompiledNetwork(computed, tape)
            if self.dtype is not None or isinstance(computed, CompiledNetwork):
                further.append((network, copies, computed))
        return further

    def _attacked(self) -> FoldedNetwork | None:
        """Return the copy of the network that is attacked; None attacks the network itself."""
        run = self.run
        evaluates = run.method.uses_attack and run.config.attack.attack_mode == "eval"
        if not evaluates or not self.engine.has("fold"):
            return None
        dtype = run.model.compute_dtype
        return FoldedNetwork(
            run.model,
            dtype=dtype,
            pad_channels=1 if dtype is None else PADDED_CHANNELS,
            compiled=self.engine.has("compile"),
        )

    def keep(self) -> None:
        """Keep what a step moves before its update: statistics, and states of random sources."""
        self.undo.keep_before_attack()
        self.undo.networks.keep()
        for tensor, kept in self.moved_before_loss:
            kept.copy_(tensor)

    def restore(self) -> None:
        """Go back to before a step that failed before its update."""
        self.clear()
        self.undo.restore_attack()
        self.undo.networks.restore()
        with torch.no_grad():
            for tensor, kept in self.moved_before_loss:
                tensor.copy_(kept)

    def compute(self, x: Tensor, y: Tensor) -> Terms:
        """Compute a step on the device; return its detached terms."""
        run = self.run
        self.engine.skip = None
        self.undo.model.keep()
        x_adv = self.attack(x, y)
        with around(run.policies, run, x, x_adv, y):
            if self.rewrites:
                self.working.refresh()
            # With what policies did before the loss, which stands in a skipped step too.
            self.undo.networks.keep()
            with self.standing_in():
                if self.joint is not None:
                    self.joint.offer(x, x_adv, y)
                terms = run.method.loss(run, x, x_adv, y)
                run.method.backward(run, terms)
            terms = {name: term.detach() for name, term in terms.items()}
            loss_is_finite, skip = self.judge(terms)
            self.engine.skip = skip
            for policy in run.policies:
                policy.on_grads(run)
            lr = self.numbers.get("learning rate", learning_rate)
            self.updating = True
            self.update.apply(lr, skip)
        for policy in run.policies:
            policy.on_step(run)
        if self.rewrites:
            self.working.refresh()
        for buffers, kept in self.buffers:
            copy_where_(buffers, kept, condition=skip)
        self.counters.add(terms, loss_is_finite, skip)
        self.clear()
        return terms

    def attack(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the method's adversarial images, made with the network in its attack mode."""
        run = self.run
        if not run.method.uses_attack:
            return run.method.attack(run, x, y)
        if self.attacked is not None:
            self.attacked.refresh()
            # Compilation takes half a minute per shape: too long for the last batch of an epoch.
            regular = len(y) == run.loader.batch_size
            # Its function: a module would become one of the attacked network's own.
            network = self.attacked if regular else self.attacked.evaluation.forward
            with standing_in(run.model, network):
                return run.method.attack(run, x, y)
        detached = {name: weight.detach() for name, weight in self.weights.items()}
        network = WorkingNetwork(run.model, detached, self.dtype)
        with attack_mode(run.model, run.config.attack.attack_mode), ExitStack() as stack:
            if not self.autocast:
                stack.enter_context(standing_in(run.model, network))
            return run.method.attack(run, x, y)

    @contextmanager
    def standing_in(self) -> Iterator[None]:
        """Let the run's networks compute by their working copies."""
        with ExitStack() as stack:
            stack.enter_context(standing_in(self.run.model, self.passes))
            for network, copies, computed in self.further:
                copies.refresh()
                stack.enter_context(standing_in(network, computed))
            yield

    def backward(
        self, total: Tensor, further: Mapping[str, Tensor], parameters: Sequence[Tensor]
    ) -> None:
        """Add gradients to ``.grad`` and to the run's further sets."""
        names = {id(parameter): name for name, parameter in self.named.items()}
        asked = [names[id(parameter)] for parameter in parameters]
        wanted = {"": None, **dict.fromkeys(further, frozenset(asked))}
        grads = self.passes.gradients({"": total, **further}, wanted)
        for name in further:
            self.run.add_gradients(name, [grads[name][asked_name] for asked_name in asked])
        for name, grad in wide(grads[""]).items():
            parameter = self.named[name]
            parameter.grad = grad if parameter.grad is None else parameter.grad + grad

    def judge(self, terms: Terms) -> tuple[Tensor, Tensor]:
        """Return whether the loss is finite, and whether anything is not, 0-d bool."""
        loss_is_finite = torch.stack(list(terms.values())).isfinite().all()
        going = loss_is_finite
        groups = [[p.grad for p in self.named.values() if p.grad is not None]]
        groups += self.run.gradients.values()
        for group in groups:
            # Their norms are stacked, which for more than one dtype copies each by a launch.
            for dtype in dict.fromkeys(grad.dtype for grad in group):
                alike = [grad for grad in group if grad.dtype == dtype]
                going = going & torch.nn.utils.get_total_norm(alike).isfinite()
        return loss_is_finite, ~going

    def clear(self) -> None:
        """Let go what belongs to one step."""
        self.passes.clear()
        self.run.optimizer.zero_grad(set_to_none=True)
        self.run.gradients.clear()
        self.engine.skip = None
        self.updating = False


@contextmanager
def standing_in(network: nn.Module, other: Network) -> Iterator[None]:
    """Let ``other`` compute what calls of ``network`` return."""
    assert isinstance(network, ImageClassifier)
    former, network.stand_in = network.stand_in, other
    try:
        yield
    finally:
        network.stand_in = former


def learning_rate(run: Run) -> float:
    """Return the learning rate of the step under way."""
    return run.optimizer.param_groups[0]["lr"]
