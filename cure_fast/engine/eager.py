"""What computes a training step; here operation by operation, the oracle of every other engine.

Operations are PyTorch's and those of :mod:`cure_fast.kernels`: on a GPU these are kernels, which
the fast engine shares, so that there they are judged by their own tests against their references.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cure_fast.kernels import Selection, mask_below_
from cure_fast.kernels.changing import ChangingList
from cure_fast.kernels.rgp import Score
from cure_fast.step.method import Terms
from cure_fast.step.train_step import train_step

from .selector import Selectors

if TYPE_CHECKING:
    from cure_fast.training.trainer import Run


class Engine:
    """Computes the steps of a run eagerly, kernel by kernel.

    Methods and policies ask it for what engines do in different ways: gradients, masks, and numbers
    that change from step to step.

    Args:
        run: whose steps it computes.
        reason: why it is not the engine that was asked for; None where it is.

    Attributes:
        name: as ``--engine`` takes it.
        skip: 0-d bool tensor that tells whether the step under way moves nothing, where that is
            decided on the device; None where only finite steps come as far as the policies.
    """

    name = "eager"

    def __init__(self, run: Run, *, reason: str | None = None) -> None:
        self.run = run
        self.reason = reason
        self.skip: Tensor | None = None
        # A GPU's host would spend some milliseconds a step, by estimate, on building tables anew.
        self._selectors = Selectors(fused=True)
        self._masked = ChangingList()

    @property
    def description(self) -> str:
        """What rows and reports call it, with what it goes without and why."""
        return self.name if self.reason is None else f"{self.name} ({self.reason})"

    def step(self, x: Tensor, y: Tensor) -> Terms | None:
        """Train on one batch, and add its terms to the sums of the epoch.

        Args:
            x: natural images [N, C, H, W] in [0, 1], float32, channels_last.
            y: labels [N] int64.

        Returns:
            The detached terms of the loss; None where they are not finite.

        Raises:
            DivergedError: after more than ``--max-skipped`` steps in a row that are not finite.
            MemoryExhaustedError: if not even two images fit into memory.
        """
        run = self.run
        terms = train_step(run, x, y)
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
        self._selectors, self._masked = Selectors(fused=True), ChangingList()

    def backward(
        self, total: Tensor, further: Mapping[str, Tensor], parameters: Sequence[Tensor]
    ) -> None:
        """Add the gradient of ``total`` to every parameter's ``.grad``, and further gradients.

        Args:
            total: scalar to minimise.
            further: scalars whose gradients are added to ``run.gradients`` under their names.
            parameters: what these are taken for, in this order.
        """
        run = self.run
        for name, term in further.items():
            grads = torch.autograd.grad(
                run.scale(term),
                parameters,
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            run.add_gradients(name, list(grads))
        run.scale(total).backward()

    @property
    def selectors(self) -> Selectors:
        """Memory and tables of the selections, kept from step to step."""
        return self._selectors

    def select(
        self,
        parameters: Sequence[Tensor],
        natural: Sequence[Tensor],
        adversarial: Sequence[Tensor],
        *,
        percentile: float,
        alpha: float,
        score: Score,
    ) -> Selection:
        """Return which weights may move; the next call may overwrite it.

        Args:
            parameters: L parameters.
            natural: their gradients of the natural loss.
            adversarial: their gradients of the adversarial loss.
            percentile: percent of each tensor's weights to mask, in [0, 100].
            alpha: weight of the natural gradient in the score, in [0, 1].
            score: how the two are combined.
        """
        return self.selectors.select(
            parameters, natural, adversarial, percentile=percentile, alpha=alpha, score=score
        )

    def mask(self, parameters: Sequence[Tensor], selection: Selection) -> None:
        """Let the step's update see no gradient where a weight may not move.

        Args:
            parameters: L parameters, whose ``.grad`` may be changed.
            selection: what :meth:`select` returned for them, now or in an earlier step.
        """
        grads: list[Tensor] = [parameter.grad for parameter in parameters]  # pyright: ignore[reportAssignmentType]
        mask_below_(self._masked.of(grads), selection.scores, selection.thresholds)
        self._masked.release()

    def number(self, name: str, function: Callable[[Run], float]) -> float | Tensor:
        """Return ``function(run)``, or a 0-d tensor that holds it in each step.

        Args:
            name: of the number, one per run.
            function: from the run to the number at the current step; cheap.
        """
        return function(self.run)

    @property
    def step_number(self) -> int | Tensor:
        """The 0-based step under way: an int, or a 0-d int64 tensor that holds it in each step."""
        return self.run.step
