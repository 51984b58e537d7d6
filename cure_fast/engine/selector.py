"""Selections over parameters that stay the same: their memory and tables are built once."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from cure_fast.kernels.changing import ChangingList
from cure_fast.kernels.rgp import Score, Selection, select_in, select_in_ref
from cure_fast.kernels.tables import laid_out_like, without_gaps
from cure_fast.kernels.workspace import Workspace


class Selector:
    """The selection over parameters that stay the same.

    Args:
        parameters: L weight tensors.
        percentile: percent of each tensor's weights to mask, in [0, 100].
        alpha: weight of the natural gradient in the score, in [0, 1].
        score: how the two gradients are combined.
        fused: whether kernels select, or their references.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        *,
        percentile: float,
        alpha: float,
        score: Score,
        fused: bool,
    ) -> None:
        # Selectors finds it by their identities, which must not become another tensor's.
        self.parameters = tuple(parameters)
        count = len(parameters)
        self.workspace = Workspace(
            [parameter.detach() for parameter in parameters],
            percentiles=[percentile] * count,
            alphas=[alpha] * count,
            score=score,
        )
        self.fused = fused
        self.natural, self.adversarial = ChangingList(), ChangingList()

    def select(self, natural: Sequence[Tensor], adversarial: Sequence[Tensor]) -> Selection:
        """Return scores, thresholds and fractions kept; the next call overwrites them."""
        # Autograd may hand out a gradient in another memory order than its parameter's, or spread
        # one number over many by strides of 0.
        scores = self.workspace.scores
        tables = (
            self.natural.of(laid_out_like(without_gaps(natural), scores)),
            self.adversarial.of(laid_out_like(without_gaps(adversarial), scores)),
        )
        selection = (select_in if self.fused else select_in_ref)(self.workspace, *tables)
        self.natural.release()
        self.adversarial.release()
        return selection


class Selectors:
    """A :class:`Selector` for each set of parameters and settings that was asked for.

    Parameters keep their memory: after a ``.to()`` or an assignment to ``.data`` build it anew.

    Args:
        fused: whether kernels select, or their references.

    Attributes:
        built: the selectors, in the order of their first use.
    """

    def __init__(self, *, fused: bool) -> None:
        self.fused = fused
        self.built: dict[object, Selector] = {}

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
        """Return which weights may move; see :meth:`cure_fast.engine.Engine.select`."""
        key = (*map(id, parameters), percentile, alpha, score)
        if key not in self.built:
            self.built[key] = Selector(
                parameters, percentile=percentile, alpha=alpha, score=score, fused=self.fused
            )
        return self.built[key].select(natural, adversarial)
