"""What a run counts per step, kept on the device until somebody asks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cure_fast.errors import DivergedError
from cure_fast.step.method import Terms

if TYPE_CHECKING:
    from cure_fast.training.trainer import Run


class Counters:
    """Sums of terms, and steps that moved nothing, added up on the device.

    Args:
        run: its own counters are brought up to date by :meth:`flush`.
    """

    def __init__(self, run: Run) -> None:
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
                f"{run.step}, for {worst} steps in a row."
            )
