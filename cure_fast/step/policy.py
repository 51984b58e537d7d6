"""Policies: what touches weights or gradients across steps, besides the optimiser."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cure_fast.batch import Batch
from cure_fast.config import MethodSettings
from cure_fast.step.run import Run, Terms


class Wanted(NamedTuple):
    """Gradients that a policy asks for.

    Attributes:
        of: from the terms of the loss to a 0-d tensor, linear in them: passes add up.
        parameters: what the gradients are taken for.
    """

    of: Callable[[Terms], Tensor]
    parameters: Sequence[Tensor]


class Policy:
    """Touches weights or gradients across steps; every hook does nothing by default.

    The order of a step, in which the hooks are called, is a table in docs/design.md. The fast
    engine decides on the device whether a step is finite. It calls every hook all the same and
    holds the answer in ``run.engine.skip``, a 0-d bool tensor, None in the eager engine. Gradients
    of a skipped step move nothing; what a hook moves itself it must leave as it is.

    Attributes:
        moves_weights: whether :meth:`around` or :meth:`on_step` changes weights of the trained
            network, of which the fast engine then makes its copies anew.
        period: after how many steps it has done once all that it does.
        networks: its own networks by name, which checkpoints store and no optimiser moves.
        state: its own tensors by name, changed in place, which checkpoints store.
        optimizers: what moves its own networks, by name, with states that checkpoints store.
    """

    moves_weights: bool = True
    period: int = 1

    def __init__(self) -> None:
        self.networks: dict[str, nn.Module] = {}
        self.state: dict[str, Tensor] = {}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}

    def before(self, run: Run, batch: Batch) -> Batch | None:
        """Act before the attack, once per step, on the host: no engine captures or repeats it.

        What it returns is trained on in place of the batch: other images of the same shape, and
        notes of the same names in each step.
        """

    def around(self, run: Run, batch: Batch) -> AbstractContextManager[None]:
        """Return a context that spans the loss, the backward pass and the optimiser's step."""
        return nullcontext()

    def on_loss(
        self, run: Run, batch: Batch, terms: Terms, logits: Callable[[Tensor], Tensor]
    ) -> None:
        """Add terms of its own to those of the method's loss, and what it weighs to ``total``.

        Called in each pass over a part of the batch, in which ``logits`` gives the trained
        network's of the images: those that the method's loss computed, else it computes them.
        """

    def wants(self, run: Run) -> dict[str, Wanted]:
        """Return which gradients it wants besides the total's.

        They are in ``run.gradients`` when :meth:`on_grads` is called, by the same names and in the
        order of the parameters; the fast engine leaves them in half precision where they are.
        """
        return {}

    def on_grads(self, run: Run) -> None:
        """Change the gradients, which are complete and unscaled, and finite unless
        ``run.engine.skip`` says otherwise.

        Sets in ``run.gradients`` still have the loss scale of fp16.
        """

    def on_step(self, run: Run, batch: Batch) -> None:
        """Act after the optimiser's step, with the notes that the batch came to hold.

        Where it holds some, they and labels and places are those of all processes.
        """

    def on_epoch_end(self, run: Run) -> None:
        """Act after the epoch's last step, before validation; ``run.epoch`` is still that epoch."""

    def on_validation(self, run: Run, found: dict[str, Any]) -> None:
        """Act on what the trained network reached on the validation images, in percent."""

    def masks(self, run: Run) -> dict[int, Tensor]:
        """Return what it zeroed of gradients in the last step, bool, by id of the parameter.

        The fast engine does that in its update, and leaves ``.grad`` as it is.
        """
        return {}

    def phase(self, run: Run) -> Hashable:
        """Return what the hooks branch on besides the settings; see :class:`Method`."""
        return None

    def epoch_metrics(self, run: Run) -> dict[str, Any]:
        """Return what the epoch's row of metrics shall hold of this policy."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold besides its networks: tensors and plain values."""
        moments = {f"optimizer {name}": own.state_dict() for name, own in self.optimizers.items()}
        return {**self.state, **moments}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        for name, tensor in self.state.items():
            # Earlier versions stored counts as numbers.
            tensor.copy_(torch.as_tensor(state[name]))
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state[f"optimizer {name}"])


@contextmanager
def around(policies: Sequence[Policy], run: Run, batch: Batch) -> Iterator[None]:
    """Enter every policy's :meth:`Policy.around` in order, and leave them in reverse."""
    with ExitStack() as stack:
        for policy in policies:
            stack.enter_context(policy.around(run, batch))
        yield


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a method and a policy have as a choice of the command line.

    Attributes:
        name: what ``--method`` or ``--policies`` takes.
        label: name as papers write it, for reports.
        title: one line for ``cure-fast list``.
        paper: authors, title, venue with the year.
        arxiv: its number there, for links; empty where it has none or is not known.
        settings: default settings; the fields of their type are flags, those of a policy begin with
            its name.
        result: name of its network that is the run's result; None for the trained one.
        fixed: settings that a checkpoint cannot follow, as they decide what it holds.
    """

    name: str
    label: str
    title: str
    paper: str
    arxiv: str = ""
    settings: MethodSettings = field(default_factory=MethodSettings)
    result: str | None = None
    fixed: tuple[str, ...] = ()

    @property
    def year(self) -> int | None:
        """Year of the paper, or None where ``paper`` ends with none."""
        found = re.search(r"\b(?:19|20)\d\d$", self.paper)
        return int(found[0]) if found else None


@dataclass(frozen=True, kw_only=True)
class PolicyInfo(Choice):
    """A policy that ``--policies`` adds to any method, built from the run and its settings."""

    build: Callable[[Run, Any], Policy]
