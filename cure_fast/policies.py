"""Policies that several methods share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from cure_fast.kernels import ema_update_
from cure_fast.method import Policy

if TYPE_CHECKING:
    from cure_fast.trainer import Run


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
        self.moves: Tensor | None = None

    @contextmanager
    def around(self, run: Run, x: Tensor, x_adv: Tensor, y: Tensor) -> Iterator[None]:
        """Move the network before the loss, where that is the order."""
        if self.order == "before":
            self.move(run)
        yield

    def on_step(self, run: Run) -> None:
        """Move the network after the optimiser's step, where that is the order."""
        if self.order == "after":
            self.move(run)

    def move(self, run: Run) -> None:
        """Toss the coin of this step and, where it lands, move every tensor."""
        rate = self.rate(run)
        if rate == 0:
            return
        averages, params = list(self.network.parameters()), list(run.model.parameters())
        if self.buffers == "average":
            averages += list(self.network.buffers())
            params += list(run.model.buffers())
        moved = ema_update_(
            averages,
            params,
            decay=self.decay_at(run.step),
            rate=rate,
            seed=run.config.run.seed,
            step=run.step,
        )
        self.moves = moved.long() if self.moves is None else self.moves + moved

    def decay_at(self, step: int) -> float:
        """Return the decay at 0-based ``step``; the public code's bound counts steps from 1."""
        return min(1 - 1 / (step + 2), self.decay) if self.warmup else self.decay

    def epoch_metrics(self, run: Run) -> dict[str, Any]:
        """Return the rate and the number of moves, as ``revision``."""
        return {"revision": self.metrics(run)}

    def metrics(self, run: Run) -> dict[str, Any]:
        """Return the rate and the number of moves so far (reads one number from the device)."""
        return {"rate": self.rate(run), "moves": 0 if self.moves is None else int(self.moves)}

    def state_dict(self) -> dict[str, Any]:
        """Return the number of moves; the network itself is stored with the run's networks."""
        return {"moves": 0 if self.moves is None else int(self.moves)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the number of moves."""
        device = next(self.network.parameters()).device
        self.moves = torch.tensor(state["moves"], device=device)


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
