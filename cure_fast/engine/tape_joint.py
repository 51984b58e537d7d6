"""One pass for natural and adversarial images, where a loss takes the logits of both."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cure_fast.step.train_step import Undo

from .passes import Passes

if TYPE_CHECKING:
    from cure_fast.training.trainer import Run

# Places of the images among (natural, adversarial), in the order of their passes; empty where they
# cannot be one.
Order = tuple[int, ...]


class Joint:
    """Lets natural and adversarial images go through the network in one pass.

    Which images a method's loss asks for is not known before it does. So the first loss of each of
    the method's phases is computed twice: once to watch it, and once for the step. That way every
    step is computed alike, and a run that stops and resumes stays the run that it was.

    Args:
        run: whose method is watched.
        passes: of the run's loss; they have a tape.
    """

    def __init__(self, run: Run, passes: Passes) -> None:
        self.run, self.passes = run, passes
        self.norms = [m for m in run.model.modules() if isinstance(m, nn.BatchNorm2d)]
        self.orders: dict[Hashable, Order] = {}

    def offer(self, x: Tensor, x_adv: Tensor, y: Tensor) -> None:
        """Let the loss that follows compute both images in one pass, if it takes both.

        Args:
            x: natural images [N, C, H, W], the very tensor that the loss is given.
            x_adv: adversarial images; those of another shape, or ``x`` itself, have their own pass.
            y: labels [N] int64.
        """
        images = (x, x_adv)
        alike = x.shape == x_adv.shape and x.dtype == x_adv.dtype
        if x is x_adv or not alike or any(some.requires_grad for some in images):
            return
        kind = self.run.method.phase(self.run)
        if kind not in self.orders:
            self.orders[kind] = self._watch(x, x_adv, y)
        if order := self.orders[kind]:
            self.passes.join([images[place] for place in order])

    def _watch(self, x: Tensor, x_adv: Tensor, y: Tensor) -> Order:
        """Compute the loss and take back what it moved; return what it asked for."""
        undo = Undo(self.run)
        undo.keep_before_loss()
        calls: list[tuple[int | None, list[bool]]] = []

        def note(images: Tensor) -> None:
            places = [place for place, some in enumerate((x, x_adv)) if images is some]
            with_grad = places and torch.is_grad_enabled()
            calls.append((places[0] if with_grad else None, [m.training for m in self.norms]))

        self.passes.watcher = note
        try:
            self.run.method.loss(self.run, x, x_adv, y)
        finally:
            self.passes.watcher = None
            self.passes.clear()
        undo.restore_loss()
        return order_of(calls)


def order_of(calls: list[tuple[int | None, list[bool]]]) -> Order:
    """Return the order of the first passes of both images if these can be one, else nothing.

    They can where they follow one another with the BatchNorms in the same modes, so that running
    statistics move as they would have.

    Args:
        calls: for each pass of a loss the place of its images, None for others or without
            gradients; and which BatchNorms were in training mode.
    """
    places = [place for place, _ in calls]
    if not {0, 1} <= set(places):
        return ()
    first, second = sorted(places.index(place) for place in (0, 1))
    if second - first > 1 or calls[first][1] != calls[second][1]:
        return ()
    return calls[first][0] or 0, calls[second][0] or 0
