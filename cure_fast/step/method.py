"""What training is made of: a method (what to optimise) and policies (what else moves weights).

A method is one frozen record of functions in one file of ``cure_fast/methods``. A policy
touches weights or gradients across steps; policies combine as a tuple whose order is the
order of application. Neither knows about devices, precision or loaders.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from cure_fast.config import Config, MethodSettings

if TYPE_CHECKING:
    from cure_fast.training.trainer import Run

# Named scalars of one step, each a mean over the images of a pass, so that passes add up by their
# share of the batch; "total" is the one that is minimised.
Terms = dict[str, Tensor]


class Policy:
    """Touches weights or gradients across steps; every hook does nothing by default.

    The fast engine decides on the device whether a step is finite. It calls every hook all the
    same and holds the answer in ``run.engine.skip``, a 0-d bool tensor, None in the eager engine.
    Gradients of a skipped step move nothing; what a hook moves itself it must leave as it is.

    Attributes:
        moves_weights: whether :meth:`around` or :meth:`on_step` changes weights of the trained
            network, of which the fast engine then makes its copies anew.
    """

    moves_weights: bool = True

    def around(self, run: Run, x: Tensor, x_adv: Tensor, y: Tensor) -> AbstractContextManager[None]:
        """Return a context that spans the loss, the backward pass and the optimiser's step."""
        return nullcontext()

    def moved_before_loss(self) -> Sequence[Tensor]:
        """Return the tensors that :meth:`around` moves before the loss, other than by setting them
        to what they are set to if it is entered again: so that a failed step can be taken back.
        """
        return ()

    def on_grads(self, run: Run) -> None:
        """Change the gradients, which are complete and unscaled, and finite unless
        ``run.engine.skip`` says otherwise.

        Sets in ``run.gradients`` still have the loss scale of fp16.
        """

    def on_step(self, run: Run) -> None:
        """Act after the optimiser's step."""

    def epoch_metrics(self, run: Run) -> dict[str, Any]:
        """Return what the epoch's row of metrics shall hold of this policy."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold: tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""


@contextmanager
def around(
    policies: Sequence[Policy], run: Run, x: Tensor, x_adv: Tensor, y: Tensor
) -> Iterator[None]:
    """Enter every policy's :meth:`Policy.around` in order, and leave them in reverse."""
    with ExitStack() as stack:
        for policy in policies:
            stack.enter_context(policy.around(run, x, x_adv, y))
        yield


def no_policies(run: Run) -> tuple[Policy, ...]:
    """Return no policy."""
    return ()


def no_networks(run: Run) -> dict[str, nn.Module]:
    """Return no further network."""
    return {}


def backward_total(run: Run, terms: Terms) -> None:
    """Accumulate the gradient of ``terms["total"]`` into every parameter's ``.grad``."""
    run.backward(terms["total"])


def one_phase(run: Run) -> Hashable:
    """Return the same for every step."""
    return None


def accept(config: Config) -> None:
    """Accept every configuration."""


def keep_config(config: Config) -> Config:
    """Return the configuration as it is."""
    return config


@dataclass(frozen=True, kw_only=True)
class Method:
    """A training method as a record of functions.

    Attributes:
        name: what ``--method`` takes.
        label: name as papers write it, for reports.
        title: one line for ``cure-fast list``.
        paper: authors, title, venue.
        settings: default settings; their type holds the method's flags.
        attack: from (run, x, y) to adversarial images inside the eps-ball and [0, 1]; called with
            the model in ``attack_mode``.
        loss: from (run, x, x_adv, y) to :data:`Terms`.
        backward: adds the gradients of the terms to ``.grad``, and further sets of gradients to
            ``run.gradients``; called once per pass over a part of the batch. The default takes the
            total.
        networks: builds further networks (a teacher, an average), which checkpoints store.
        policies: builds the policies of a run.
        check: raises ``InputError`` for a configuration the method cannot run.
        preset: changes other parts of the configuration when the method is chosen by name.
        phase: from the run to what its functions and policies branch on besides the settings, such
            as the epoch. Steps of equal phase must do the same operations: the fast engine replays
            them. Numbers that change are asked of ``run.engine.number`` instead.
        uses_attack: False for a method that trains on natural images alone.
    """

    name: str
    label: str
    title: str
    paper: str
    settings: MethodSettings
    attack: Callable[[Run, Tensor, Tensor], Tensor]
    loss: Callable[[Run, Tensor, Tensor, Tensor], Terms]
    backward: Callable[[Run, Terms], None] = backward_total
    networks: Callable[[Run], dict[str, nn.Module]] = no_networks
    policies: Callable[[Run], tuple[Policy, ...]] = no_policies
    check: Callable[[Config], None] = accept
    preset: Callable[[Config], Config] = keep_config
    phase: Callable[[Run], Hashable] = one_phase
    uses_attack: bool = True
