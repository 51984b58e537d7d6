"""Numbers on the device: those sent before a step, and those that it counts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cure_fast.errors import DivergedError
from cure_fast.kernels.tables import is_capturing
from cure_fast.step.run import Terms
from cure_fast.step.state import TrainState

# Numbers of one run: learning rate, step, and what policies ask for.
CAPACITY = 64


class Numbers:
    """Numbers that the host computes for each step and sends in one copy.

    A CUDA graph reads them where they are, so that its replays take new ones. The host does not
    wait, and the device does not either.
    """

    def __init__(self, run: TrainState) -> None:
        self.run = run
        self.values = torch.zeros(CAPACITY, dtype=torch.float64, device=run.device)
        # The first place holds the step: the bits of an integer among floats.
        self.step = self.values.view(torch.int64)[0]
        self.functions: dict[str, Callable[[TrainState], float]] = {}

    def get(self, name: str, function: Callable[[TrainState], float], *, send: bool) -> Tensor:
        """Return a 0-d float64 tensor that holds ``function(run)`` in each step.

        A new one is sent now, or without ``send`` by the caller before it is read.

        Raises:
            RuntimeError: for a new name while a CUDA graph is captured, or too many of them.
        """
        new = name not in self.functions
        if new and len(self.functions) + 1 == CAPACITY:
            raise RuntimeError(f"{name}: expected at most {CAPACITY - 1} numbers.")
        self.functions[name] = function
        if new and send:
            self.send()
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


class Counters:
    """Sums of terms, and steps that moved nothing; :meth:`flush` brings them to the run."""

    def __init__(self, run: TrainState) -> None:
        self.run = run
        # They go on from the run's, so that a resumed run adds up in the same order.
        self.sums = {name: value.clone() for name, value in run.sums.items()}
        self.seen = set(self.sums)
        # Steps whose loss was finite, steps skipped, how many of the last steps were, and the
        # most in a row.
        self.counts = torch.zeros(4, dtype=torch.int64, device=run.device)
        self.counts[2] = run.skipped_in_row
        self.loss_is_finite = torch.ones((), dtype=torch.bool, device=run.device)

    def add(self, terms: Terms, loss_is_finite: Tensor, skip: Tensor) -> None:
        """Count a step."""
        self.loss_is_finite.copy_(loss_is_finite)
        for name, term in terms.items():
            if name not in self.sums:
                self.sums[name] = torch.zeros_like(term)
            self.sums[name] += torch.where(loss_is_finite, term, 0)
        counted, skipped, in_row, worst = self.counts.unbind()
        counted += loss_is_finite
        skipped += skip
        in_row += 1
        in_row *= skip
        torch.maximum(worst, in_row, out=worst)

    def reset_sums(self) -> None:
        """Begin the sums of another epoch, where graphs expect them."""
        self.seen.clear()
        for value in self.sums.values():
            value.zero_()

    def flush(self) -> None:
        """Bring the run's own counters up to date; reads the device once.

        Raises:
            DivergedError: if there were more than ``--max-skipped`` skipped steps in a row.
        """
        run = self.run
        counted, skipped, in_row, worst = self.counts.tolist()
        run.counted += counted
        # As in the eager engine, a term has a sum once a step was counted that has it.
        names = [name for name in self.sums if name in self.seen and run.counted]
        run.sums = {name: self.sums[name].clone() for name in names}
        run.skipped += skipped
        run.skipped_in_row = in_row
        self.counts.zero_()
        self.counts[2] = in_row
        if worst > run.config.run.max_skipped:
            raise DivergedError(
                f"loss or gradient were not finite in epoch {run.epoch + 1}, up to step "
                f"{run.step}, for {worst} step{'s' * (worst > 1)} in a row."
            )
