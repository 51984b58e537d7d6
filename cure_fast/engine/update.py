"""The update of the fast engine: selection, mask, SGD and working copies, in a few launches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cure_fast.config import OptimConfig
from cure_fast.kernels import TensorList, masked_sgd_
from cure_fast.kernels.changing import ChangingList
from cure_fast.kernels.layout import memory_order
from cure_fast.kernels.rgp import Selection
from cure_fast.kernels.update import masked_sgd_ref


@dataclass
class Part:
    """Parameters that one launch updates: all with a working copy or none, all masked or none."""

    parameters: Sequence[Tensor]
    weights: TensorList
    buffers: TensorList | None
    copies: TensorList | None
    scores: TensorList | None
    places: Tensor | None
    grads: ChangingList = field(default_factory=ChangingList)


class Update:
    """Moves the trained weights as torch.optim.SGD does, whose state it shares.

    ``copies``, by id of the parameter, take the new values of theirs.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        optim: OptimConfig,
        copies: Mapping[int, Tensor],
        *,
        fused: bool,
    ) -> None:
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.optim = optim
        self.copies = copies
        self.fused = fused
        self.buffers = momentum_buffers(optimizer, self.parameters) if optim.momentum else None
        self.parts: dict[object, list[Part]] = {}
        self.masked: tuple[Sequence[Tensor], Selection] | None = None

    def mask(self, parameters: Sequence[Tensor], selection: Selection) -> None:
        """Let the next :meth:`apply` mask these parameters by ``selection``."""
        self.masked = parameters, selection

    def apply(self, lr: Tensor, momentum: float | Tensor, skip: Tensor) -> None:
        """Update every weight but masked ones, unless ``skip`` holds; tensors are 0-d."""
        parameters, selection = self.masked or ((), None)
        self.masked = None
        scores = () if selection is None else selection.scores
        # As in torch's SGD, weights without a gradient stay as they are.
        idle = [parameter for parameter in self.parameters if parameter.grad is None]
        key = (*map(id, parameters), *map(id, scores), *map(id, idle))
        if key not in self.parts:
            self.parts[key] = self._parts(parameters, scores, set(map(id, idle)))
        for part in self.parts[key]:
            grads: list[Tensor] = [parameter.grad for parameter in part.parameters]  # pyright: ignore[reportAssignmentType]
            thresholds = None
            if selection is not None and part.places is not None:
                thresholds = selection.thresholds.index_select(0, part.places)
            (masked_sgd_ if self.fused else masked_sgd_ref)(
                part.weights,
                part.grads.of(grads),
                part.buffers,
                lr=lr,
                momentum=momentum,
                weight_decay=self.optim.weight_decay,
                nesterov=self.optim.nesterov,
                scores=part.scores,
                thresholds=thresholds,
                low_precision_copies=part.copies,
                skip=skip,
            )
            part.grads.release()

    def _parts(
        self, masked: Sequence[Tensor], scores: Sequence[Tensor | None], idle: set[int]
    ) -> list[Part]:
        """Return the parts of an update that masks these parameters by their scores."""
        place = {id(parameter): i for i, parameter in enumerate(masked)}
        kinds: dict[tuple[bool, bool], list[Tensor]] = {}
        for parameter in self.parameters:
            kind = (id(parameter) in place, id(parameter) in self.copies)
            if id(parameter) not in idle:
                kinds.setdefault(kind, []).append(parameter)
        parts = []
        for (is_masked, is_copied), chosen in kinds.items():
            places = [place[id(parameter)] for parameter in chosen] if is_masked else []
            parts.append(
                Part(
                    chosen,
                    TensorList([parameter.detach() for parameter in chosen]),
                    None if self.buffers is None else self._list(self.buffers, chosen),
                    self._list(self.copies, chosen) if is_copied else None,
                    TensorList([scores[i] for i in places]) if is_masked else None,
                    torch.tensor(places, device=chosen[0].device) if is_masked else None,
                )
            )
        return parts

    @staticmethod
    def _list(tensors: Mapping[int, Tensor], chosen: Sequence[Tensor]) -> TensorList:
        return TensorList([tensors[id(parameter)] for parameter in chosen])


def momentum_buffers(
    optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]
) -> dict[int, Tensor]:
    """Return the optimiser's momentum buffers by id of the parameter, zeros where it has none.

    With a buffer of zeros the first step is the one that torch.optim.SGD makes without a buffer.
    """
    found = {}
    for parameter in parameters:
        state = optimizer.state[parameter]
        buffer = state.get("momentum_buffer")
        if buffer is None:
            buffer = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        elif memory_order(buffer) != memory_order(parameter):
            buffer = torch.empty_like(parameter).copy_(buffer)
        state["momentum_buffer"] = found[id(parameter)] = buffer
    return found
