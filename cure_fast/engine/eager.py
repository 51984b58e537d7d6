"""What computes a training step; here operation by operation, the oracle of every other engine.

Operations are PyTorch's and those of :mod:`cure_fast.kernels`: on a GPU these are kernels, which
the fast engine shares, so that there they are judged by their own tests against their references.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cure_fast import distributed
from cure_fast.batch import Batch, weighed
from cure_fast.kernels import Selection, mask_below_
from cure_fast.kernels.changing import ChangingList
from cure_fast.step.run import Terms
from cure_fast.step.state import TrainState, Undo
from cure_fast.step.train_step import fitting, loss_of, train_step

from .selector import Selectors


class Engine:
    """Computes the steps of a run eagerly, as :class:`cure_fast.step.run.Engine` asks for."""

    name = "eager"

    def __init__(self, run: TrainState, *, reason: str | None = None) -> None:
        self.run = run
        self.reason = reason
        self.skip: Tensor | None = None
        # A GPU's host would spend some milliseconds a step, by estimate, on building tables anew.
        self.selectors = Selectors(fused=True)
        self._masked = ChangingList()
        # For :meth:`gradients`: that of the step under way is in use.
        self._undo: Undo | None = None

    @property
    def description(self) -> str:
        """What rows and reports call it, with what it goes without and why."""
        return self.name if self.reason is None else f"{self.name} ({self.reason})"

    def step(self, batch: Batch) -> Terms | None:
        """Train on one batch by :func:`.train_step`, and add its terms to the epoch's sums."""
        run = self.run
        terms = train_step(run, batch)
        if terms is not None:
            for name, term in terms.items():
                run.sums[name] = run.sums[name] + term if name in run.sums else term
            run.counted += 1
        return terms

    def reset_sums(self) -> None:
        """Begin the sums and counts of another epoch."""
        self.run.sums, self.run.counted, self.run.skipped = {}, 0, 0

    def flush(self) -> None:
        """Bring the run's counters and sums up to date; they are already."""

    def forget(self) -> None:
        """Give up what was prepared for the run's tensors, as they are replaced."""
        self.selectors, self._masked = Selectors(fused=True), ChangingList()

    def derive(self, term: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Return the gradients of a term; its passes can be used again."""
        term = weighed(term, self.run.part)
        grads = list(torch.autograd.grad(term, parameters, retain_graph=True))
        distributed.sum_(grads)
        return grads

    def gradients(self, batch: Batch, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Return the gradients of the method's total; statistics stay as they are."""
        run = self.run
        if self._undo is None:
            self._undo = Undo(run)
        undo = self._undo
        undo.keep()

        def compute(pieces: int) -> list[Tensor]:
            sums: list[Tensor] = []
            for part in batch.split(pieces):
                total = len(part) / batch.whole * loss_of(run, part)["total"]
                grads = torch.autograd.grad(
                    run.scaler.scale(total), parameters, allow_unused=True, materialize_grads=True
                )
                sums = [a + b for a, b in zip(sums, grads, strict=True)] if sums else list(grads)
            return sums

        found = fitting(run, undo.restore, len(batch), compute)
        distributed.sum_(found)
        undo.statistics.restore()
        scale = run.scaler.get_scale()
        return found if scale == 1 else [grad / scale for grad in found]

    def weights_moved(self) -> None:
        """Take note that weights were changed between two steps."""

    def select(self, *lists: Sequence[Tensor], **settings: Any) -> Selection:
        """Return which weights may move."""
        return self.selectors.select(*lists, **settings)

    def mask(self, parameters: Sequence[Tensor], selection: Selection) -> None:
        """Zero the gradients of weights that may not move, by a selection of now or before."""
        grads: list[Tensor] = [parameter.grad for parameter in parameters]  # pyright: ignore[reportAssignmentType]
        mask_below_(self._masked.of(grads), selection.scores, selection.thresholds)
        self._masked.release()

    def number(self, name: str, function: Callable[[TrainState], float]) -> float | Tensor:
        """Return ``function(run)``."""
        return function(self.run)

    @property
    def step_number(self) -> int | Tensor:
        """The 0-based step under way."""
        return self.run.step
