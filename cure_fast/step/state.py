"""All that a training stage moves, which is what a checkpoint stores."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cure_fast.step.method import Method
from cure_fast.step.policy import Policy
from cure_fast.step.random_state import random_state, restore_random_state
from cure_fast.step.run import Run
from cure_fast.step.undo import Undo

# What a checkpoint gives back as it was.
PLAIN = ("epoch", "batch", "step", "counted", "skipped", "skipped_in_row", "pending")


@dataclass(kw_only=True)
class TrainState(Run):
    """What the trainer and the engines move, beside what methods see of it.

    Attributes:
        method: the training method.
        optimizer: moves the parameters that take gradients.
        scaler: loss scaling for fp16; passes everything through in other precisions.
        result: name of the network that is the run's result; ``model`` is the trained one.
        sums: sums of the terms over the epoch under way, and in ``counted`` of how many steps.
        skipped: steps of the epoch under way that moved nothing, as something was not finite.
        skipped_in_row: how many of the last steps that holds for.
        micro_batch_size: images per pass; None for the whole batch.
        undo: what the passes of attack and loss move, kept; made at the first step.
        pending: row of an epoch that is trained but not yet validated.
        best: validation accuracy in percent of the best epoch so far: (selected, natural), and
            its 1-based number.
    """

    method: Method
    scaler: torch.amp.GradScaler  # pyright: ignore[reportPrivateImportUsage]
    optimizer: torch.optim.Optimizer = field(init=False)
    policies: tuple[Policy, ...] = ()
    result: str = "model"
    sums: dict[str, Tensor] = field(default_factory=dict)
    counted: int = 0
    skipped: int = 0
    skipped_in_row: int = 0
    micro_batch_size: int | None = None
    undo: tuple[Undo, Undo] | None = None
    pending: dict[str, Any] | None = None
    best: tuple[float, float, int] | None = None

    @property
    def all_networks(self) -> dict[str, nn.Module]:
        """The trained network, as ``model``, and the further ones, by name."""
        return {"model": self.model, **self.networks}

    @property
    def trained_parameters(self) -> list[Tensor]:
        """What the optimiser moves."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def state_dict(self) -> dict[str, Any]:
        """Return all that :meth:`load_state_dict` needs to continue: tensors and plain values."""
        self.engine.flush()
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "generators": {name: g.get_state() for name, g in self.generators.items()},
            "networks": {name: net.state_dict() for name, net in self.networks.items()},
            "policies": [policy.state_dict() for policy in self.policies],
            **{name: getattr(self, name) for name in PLAIN},
            "sums": self.sums,
            "micro_batch_size": self.micro_batch_size,
            "micro_batch_asked": self.config.optim.micro_batch_size,
            "best": self.best,
            "random": random_state(),
            # Its name alone, to say so where another one goes on.
            "engine": self.engine.name,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned."""
        groups = self.optimizer.param_groups
        self.engine.forget()
        self.model.load_state_dict(state["model"])
        # The configuration decides, which --override may have changed; the rate is set each step.
        own = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, settings in zip(self.optimizer.param_groups, own, strict=True):
            group.update(settings)
        self.scaler.load_state_dict(state["scaler"])
        for name, generator in self.generators.items():
            generator.set_state(state["generators"][name].cpu())
        for name, network in self.networks.items():
            network.load_state_dict(state["networks"][name])
        for policy, policy_state in zip(self.policies, state["policies"], strict=True):
            policy.load_state_dict(policy_state)
        self.sums = {name: value.to(self.device) for name, value in state["sums"].items()}
        for name in PLAIN:
            setattr(self, name, state[name])
        if state["micro_batch_asked"] == self.config.optim.micro_batch_size:
            self.micro_batch_size = state["micro_batch_size"]
        self.best = None if state["best"] is None else tuple(state["best"])
        restore_random_state(state["random"])
