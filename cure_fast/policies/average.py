"""Policies that several methods share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from cure_fast.kernels import TensorList, ema_update_
from cure_fast.step.method import Policy

if TYPE_CHECKING:
    from cure_fast.training.trainer import Run


class Revision(Policy):
    """Moves a second network towards the trained one by a stochastic momentum update (CURE, Eq. 7).

    Args:
        network: the revision model, a copy of the trained one; moved in place.
        decay: share of the old average that stays, in [0, 1].
        rate: from the run to the probability of a move at this step, in [0, 1].
        warmup: bound the decay by 1 - 1/(t+1) at step t, as the public code does.
        buffers: ``own`` leaves the network's buffers to its own forward passes, ``average`` moves
            them like the parameters.
        order: move ``after`` the optimiser's step, or ``before`` the loss.
    """

    moves_weights = False

    def __init__(
        self,
        network: nn.Module,
        *,
        decay: float,
        rate: Callable[[Run], float],
        warmup: bool = False,
        buffers: Literal["own", "average"] = "own",
        order: Literal["after", "before"] = "after",
    ) -> None:
        self.network = network
        self.decay = decay
        self.rate = rate
        self.warmup = warmup
        self.buffers = buffers
        self.order = order
        device = next(network.parameters()).device
        self.moves = torch.zeros((), dtype=torch.int64, device=device)
        self.lists: tuple[TensorList, TensorList] | None = None

    @contextmanager
    def around(self, run: Run, x: Tensor, x_adv: Tensor, y: Tensor) -> Iterator[None]:
        """Move the network before the loss, where that is the order."""
        if self.order == "before":
            self.move(run)
        yield

    def moved_before_loss(self) -> Sequence[Tensor]:
        """Return the network's parameters and the count of moves, where it moves before the loss.

        Its buffers are looked after as every network's are.
        """
        return [*self.network.parameters(), self.moves] if self.order == "before" else []

    def on_step(self, run: Run) -> None:
        """Move the network after the optimiser's step, where that is the order."""
        if self.order == "after":
            self.move(run)

    def move(self, run: Run) -> None:
        """Toss the coin of this step and, where it lands, move every tensor."""
        rate = run.engine.number("revision rate", self.rate)
        if isinstance(rate, float) and rate == 0:
            return
        if self.lists is None:
            self.lists = self.tables(run)
        moved = ema_update_(
            *self.lists,
            decay=run.engine.number("revision decay", lambda run: self.decay_at(run.step)),
            rate=rate,
            seed=run.config.run.seed,
            step=run.engine.step_number,
            skip=run.engine.skip,
        )
        self.moves += moved

    def tables(self, run: Run) -> tuple[TensorList, TensorList]:
        """Return what moves, and what it moves towards."""
        averages, params = list(self.network.parameters()), list(run.model.parameters())
        if self.buffers == "average":
            averages += list(self.network.buffers())
            params += list(run.model.buffers())
        return TensorList(averages), TensorList(params)

    def decay_at(self, step: int) -> float:
        """Return the decay at 0-based ``step``; the public code's bound counts steps from 1."""
        return min(1 - 1 / (step + 2), self.decay) if self.warmup else self.decay

    def epoch_metrics(self, run: Run) -> dict[str, Any]:
        """Return the rate and the number of moves, as ``revision``."""
        return {"revision": self.metrics(run)}

    def metrics(self, run: Run) -> dict[str, Any]:
        """Return the rate and the number of moves so far (reads one number from the device)."""
        return {"rate": self.rate(run), "moves": int(self.moves)}

    def state_dict(self) -> dict[str, Any]:
        """Return the number of moves; the network itself is stored with the run's networks."""
        return {"moves": int(self.moves)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the number of moves."""
        self.moves.fill_(state["moves"])


def revision_rate(
    rate: float,
    decay: Literal["none", "freeze", "halve", "cosine"],
    start: float,
    *,
    progress: float,
    steps_past_start: int,
) -> float:
    """Return the probability of a revision move.

    The paper says that the rate decays gradually and gives no rule; the public code keeps it, or
    halves it in every step once ``start`` is passed.

    Args:
        rate: probability at the start of the run.
        decay: ``none`` keeps it, ``freeze`` sets it to 0 from ``start`` on, ``halve`` halves it in
            each step from ``start`` on, ``cosine`` lets it fall to 0 over the whole run.
        start: share of the run at which freeze and halve begin.
        progress: share of the run's steps that is done, in [0, 1).
        steps_past_start: number of steps since ``start``, 1 for the first.
    """
    if decay == "cosine":
        return rate * (1 + math.cos(math.pi * progress)) / 2
    if decay == "none" or progress < start:
        return rate
    return 0.0 if decay == "freeze" else rate * 0.5 ** min(steps_past_start, 1000)
