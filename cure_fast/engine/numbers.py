"""Numbers that change from step to step, on the device before the step begins."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cure_fast.kernels.tables import is_capturing

if TYPE_CHECKING:
    from cure_fast.training.trainer import Run

# Numbers of one run: learning rate, step, and what policies ask for.
CAPACITY = 64


class DeviceNumbers:
    """Numbers that the host computes for each step and sends in one copy.

    A CUDA graph reads them where they are, so that its replays take new ones. The host does not
    wait, and the device does not either.

    Args:
        run: what the numbers are computed from.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.values = torch.zeros(CAPACITY, dtype=torch.float64, device=run.device)
        # The first place holds the step: the bits of an integer among floats.
        self.step = self.values.view(torch.int64)[0]
        self.functions: dict[str, Callable[[Run], float]] = {}

    def get(self, name: str, function: Callable[[Run], float]) -> Tensor:
        """Return a 0-d float64 tensor that holds ``function(run)`` in each step.

        Raises:
            RuntimeError: for a new name while a CUDA graph is captured, or too many of them.
        """
        if name not in self.functions:
            if len(self.functions) + 1 == CAPACITY:
                raise RuntimeError(f"{name}: expected at most {CAPACITY - 1} numbers.")
            self.functions[name] = function
            self.send()
        self.functions[name] = function
        return self.values[list(self.functions).index(name) + 1]

    def send(self) -> None:
        """Compute all numbers for the step that comes next, and send them."""
        if is_capturing(self.values.device):
            raise RuntimeError("a number was asked for that no step before had needed.")
        host = torch.zeros(CAPACITY, dtype=torch.float64)
        host.view(torch.int64)[0] = self.run.step
        for place, function in enumerate(self.functions.values(), 1):
            host[place] = function(self.run)
        # Pinned memory is handed out again only when the copy from it is done.
        host = host.pin_memory() if self.values.is_cuda else host
        self.values.copy_(host, non_blocking=True)
