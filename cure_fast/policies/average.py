"""Averages of the trained weights over steps: CURE's revision model, SEAT's and IDBH's EMA."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

from cure_fast.batch import Batch
from cure_fast.classifier import attack_mode
from cure_fast.config import MethodSettings
from cure_fast.config.checks import Share
from cure_fast.kernels import TensorList, ema_update_
from cure_fast.step.policy import Policy, PolicyInfo
from cure_fast.step.random_state import random_state, restore_random_state
from cure_fast.step.run import Run


class Average(Policy):
    """Moves a second network towards the trained one, in each step or by the toss of a coin.

    Args:
        network: a copy of the trained one, moved in place; ``name`` is its own in checkpoints.
        decay: from the run to the share of the old average that stays, in [0, 1].
        rate: from the run to the probability of a move at this step; None moves in every step.
        buffers: ``own`` leaves the network's buffers to its own forward passes, ``average`` moves
            them like the parameters, ``estimate`` so too, and estimates statistics anew after each
            epoch.
        order: move ``after`` the optimiser's step, or ``before`` the attack.
    """

    moves_weights = False

    def __init__(
        self,
        name: str,
        network: nn.Module,
        *,
        decay: Callable[[Run], float],
        rate: Callable[[Run], float] | None = None,
        buffers: Literal["own", "average", "estimate"] = "own",
        order: Literal["after", "before"] = "after",
    ) -> None:
        super().__init__()
        self.name = name
        self.network = network
        self.networks = {name: network}
        self.decay, self.rate = decay, rate
        self.buffers, self.order = buffers, order
        self.moves = torch.zeros((), dtype=torch.int64, device=next(network.parameters()).device)
        self.state = {"moves": self.moves}
        self.lists: tuple[TensorList, TensorList] | None = None

    def before(self, run: Run, batch: Batch) -> None:
        """Move the network before the attack, where that is the order."""
        if self.order == "before":
            rate = 1.0 if self.rate is None else self.rate(run)
            self.move(run, decay=self.decay(run), rate=rate, step=run.step, skip=None)

    def on_step(self, run: Run, batch: Batch) -> None:
        """Move the network after the optimiser's step, where that is the order."""
        if self.order == "after":
            number = run.engine.number
            self.move(
                run,
                decay=number(f"{self.name} decay", self.decay),
                rate=1.0 if self.rate is None else number(f"{self.name} rate", self.rate),
                step=run.engine.step_number,
                skip=run.engine.skip,
            )

    def move(self, run: Run, *, rate: Any, **how: Any) -> None:
        """Toss the coin of this step and, where it lands, move every tensor."""
        if isinstance(rate, float) and rate == 0:
            return
        if self.lists is None:
            own, theirs = (
                [*net.parameters(), *(() if self.buffers == "own" else net.buffers())]
                for net in (self.network, run.model)
            )
            self.lists = TensorList(own), TensorList(theirs)
        self.moves += ema_update_(*self.lists, rate=rate, seed=run.config.run.seed, **how)

    def on_epoch_end(self, run: Run) -> None:
        """Estimate BatchNorm statistics anew, where they are not averaged."""
        if self.buffers == "estimate":
            estimate_statistics(run, self.network)

    def epoch_metrics(self, run: Run) -> dict[str, Any]:
        """Return the rate and the number of moves, under the network's name."""
        rate = 1.0 if self.rate is None else self.rate(run)
        return {self.name: {"rate": rate, "moves": int(self.moves)}}


def frozen_copy(network: nn.Module) -> nn.Module:
    """Return a copy with storage of its own, without gradients."""
    return copy.deepcopy(network).requires_grad_(False)


@torch.no_grad()
def estimate_statistics(run: Run, network: nn.Module) -> None:
    """Set BatchNorm statistics to the means over the epoch's natural training images.

    That is one more pass through the network, as the loader augments them; all else that the pass
    would change stays as it is, the process's random numbers included.
    """
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    momenta, before = [norm.momentum for norm in norms], random_state()
    try:
        # What draws, such as dropout, passes images on as it will when the network is evaluated.
        with attack_mode(network, "eval"), run.loader.epoch(run.epoch) as batches:
            for norm in norms:
                norm.train()
                norm.reset_running_stats()
            seen = 0
            for batch in batches:
                seen += batch.whole
                for norm in norms:
                    norm.momentum = batch.whole / seen
                network(batch.x)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        restore_random_state(before)


class EmaSettings(MethodSettings):
    """Exponential moving average of weights and buffers, which is what is evaluated."""

    ema_decay: Share = 0.999
    """Share of the average that stays in each step, 0 to 1 (SEAT: 0.999)."""
    ema_warmup: Literal["seat", "none"] = "seat"
    """Bound that share by (t+1)/(t+10) in step t (seat), or not."""
    ema_buffers: Literal["average", "estimate"] = "average"
    """BatchNorm statistics: averaged too (SEAT), or estimated anew on the natural training images
    after each epoch (IDBH)."""


def build_ema(run: Run, settings: EmaSettings) -> Policy:
    """Return the average of all parameters and buffers."""
    bound = settings.ema_warmup == "seat"

    def decay(run: Run) -> float:
        t = run.step
        return min(settings.ema_decay, (t + 1) / (t + 10)) if bound else settings.ema_decay

    return Average("ema", frozen_copy(run.model), decay=decay, buffers=settings.ema_buffers)


EMA = PolicyInfo(
    name="ema",
    label="EMA",
    title="SEAT's average of weights and buffers after every step; evaluates the average",
    paper="Wang and Wang, Self-Ensemble Adversarial Training, ICLR 2022",
    settings=EmaSettings(),
    build=build_ema,
    result="ema",
)
