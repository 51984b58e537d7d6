"""Selections over parameters that stay the same: their memory and tables are built once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from cure_fast.kernels.changing import ChangingList
from cure_fast.kernels.rgp import Score, Selection, select_in, select_in_ref
from cure_fast.kernels.tables import laid_out_like, without_gaps
from cure_fast.kernels.workspace import Workspace


@dataclass
class Selector:
    """What the selections over one set of parameters need."""

    # Found by their identities, which must not become another tensor's.
    parameters: Sequence[Tensor]
    workspace: Workspace
    natural: ChangingList = field(default_factory=ChangingList)
    adversarial: ChangingList = field(default_factory=ChangingList)


class Selectors:
    """A :class:`Selector` for each set of parameters and settings that was asked for.

    Parameters keep their memory: after a ``.to()`` or an assignment to ``.data`` build it anew.
    """

    def __init__(self, *, fused: bool) -> None:
        self.select_in = select_in if fused else select_in_ref
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
        """Return which of the parameters' weights may move; the next call overwrites it.

        For gradients and settings see :func:`cure_fast.kernels.rgp_select`.
        """
        key = (*map(id, parameters), percentile, alpha, score)
        if key not in self.built:
            count = len(parameters)
            weights = [parameter.detach() for parameter in parameters]
            workspace = Workspace(
                weights, percentiles=[percentile] * count, alphas=[alpha] * count, score=score
            )
            self.built[key] = Selector(tuple(parameters), workspace)
        own = self.built[key]
        # Autograd may hand out a gradient in another memory order than its parameter's, or spread
        # one number over many by strides of 0.
        scores = own.workspace.scores
        tables = (
            own.natural.of(laid_out_like(without_gaps(natural), scores)),
            own.adversarial.of(laid_out_like(without_gaps(adversarial), scores)),
        )
        selection = self.select_in(own.workspace, *tables)
        own.natural.release()
        own.adversarial.release()
        return selection
