"""All that a training stage moves: what a checkpoint stores, and what a step can put back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cure_fast.step.gradients import LastGradients
from cure_fast.step.method import Method
from cure_fast.step.policy import Policy
from cure_fast.step.random_state import random_state, restore_random_state
from cure_fast.step.run import Run

# What a checkpoint gives back as it was.
PLAIN = ("epoch", "batch", "step", "counted", "skipped", "skipped_in_row", "pending", "best")


class Undo:
    """What passes move besides gradients, kept so that it can be put back.

    That is BatchNorm statistics, and the random sources that passes draw from: the run's own and
    torch's. The copies are allocated once.
    """

    def __init__(self, run: Run) -> None:
        self.statistics = Statistics([run.model, *run.networks.values()])
        self.generators = [*run.generators.values(), torch.default_generator]
        if run.device.type == "cuda":
            index = run.device.index
            index = torch.cuda.current_device() if index is None else index
            self.generators.append(torch.cuda.default_generators[index])
        self.states: list[Tensor] = []

    def keep(self) -> None:
        """Keep what the passes to come can move."""
        self.statistics.keep()
        self.states = [generator.get_state() for generator in self.generators]

    def restore(self) -> None:
        """Go back to what was kept."""
        self.statistics.restore()
        for generator, state in zip(self.generators, self.states, strict=True):
            generator.set_state(state)


class Statistics:
    """The buffers of networks, such as BatchNorm's running statistics, and one copy of them.

    The buffers must stay the tensors that they are now.
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
        last_gradients: of the last step, for the epoch's row.
        undo: what the passes of attack and loss move, kept; made at the first step.
        pending: row of an epoch that is trained but not yet validated.
        best: of each network that is validated, by the name of its file, the validation accuracy
            in percent of its best epoch so far: (selected, natural), and its 1-based number.
    """

    method: Method
    scaler: torch.amp.GradScaler  # pyright: ignore[reportPrivateImportUsage]
    optimizer: torch.optim.Optimizer = field(init=False)
    last_gradients: LastGradients = field(init=False)
    policies: tuple[Policy, ...] = ()
    result: str = "model"
    sums: dict[str, Tensor] = field(default_factory=dict)
    counted: int = 0
    skipped: int = 0
    skipped_in_row: int = 0
    micro_batch_size: int | None = None
    undo: tuple[Undo, Undo] | None = None
    pending: dict[str, Any] | None = None
    best: dict[str, tuple[float, float, int]] = field(default_factory=dict)

    @property
    def all_networks(self) -> dict[str, nn.Module]:
        """The trained network, as ``model``, and the further ones, by name."""
        return {"model": self.model, **self.networks}

    @property
    def files(self) -> dict[str, str]:
        """The networks by the name of the file that keeps their weights.

        That is ``model`` for the run's result, and ``raw`` for the trained one where it is another.
        """
        others = {"raw" if name == "model" else name: name for name in self.all_networks}
        return {"model": self.result} | {k: v for k, v in others.items() if v != self.result}

    @property
    def candidates(self) -> dict[str, str]:
        """Those of :attr:`files` that are validated, so that each has a best epoch of its own.

        The trained network always is; beside the result those are that ``--networks`` names.
        """
        chosen = {"model", "raw", *self.config.eval.networks}
        return {file: name for file, name in self.files.items() if file in chosen}

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
            "random": random_state(),
            "last_gradients": self.last_gradients.state_dict(self),
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
        # Earlier versions recorded none.
        self.last_gradients.stored = state.get("last_gradients")
        if not isinstance(self.best, dict):
            # Earlier versions knew that of the result alone.
            self.best = {} if self.best is None else {"model": self.best}
        if state["micro_batch_asked"] == self.config.optim.micro_batch_size:
            self.micro_batch_size = state["micro_batch_size"]
        restore_random_state(state["random"])
