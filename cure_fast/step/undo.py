"""What a step moves besides weights, kept so that it can be put back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cure_fast.step.run import Run


class Undo:
    """What passes move besides gradients, kept so that it can be put back.

    That is BatchNorm statistics, and the random sources that passes draw from: the run's own and
    torch's. The copies are allocated once.
    """

    def __init__(self, run: Run) -> None:
        self.statistics = Statistics([run.model, *run.networks.values()])
        self.device = run.device
        self.generators = list(run.generators.values())
        self.states: list[Tensor] = []

    def keep(self) -> None:
        """Keep what the passes to come can move."""
        self.statistics.keep()
        self.states = [generator.get_state() for generator in self.generators]
        self.torch_state = torch.get_rng_state()
        if self.device.type == "cuda":
            self.cuda_state = torch.cuda.get_rng_state(self.device)

    def restore(self) -> None:
        """Go back to what was kept."""
        self.statistics.restore()
        for generator, state in zip(self.generators, self.states, strict=True):
            generator.set_state(state)
        torch.set_rng_state(self.torch_state)
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(self.cuda_state, self.device)


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
