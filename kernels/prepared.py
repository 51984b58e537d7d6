"""Robust gradient prominence for a training loop of your own, prepared once for its model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Literal

from torch import Tensor

from . import dispatch
from .checking import check_choice, check_lists, check_number
from .rgp import SCORES, Score, Selection, mask_below_, select_in_ref
from .tables import TensorList, memory_order
from .workspace import Workspace

Scope = Literal["all", "conv", "conv+bn"] | Sequence[str]
SCOPES = ("all", "conv", "conv+bn")


class RGP:
    """Masks the gradients of weights of low prominence (Gowda et al., CURE, ICLR 2024, Eq. 6).

    Tables and memory are built here, so that a call in the training loop allocates nothing where
    the gradients stay at their addresses, and only sends the new addresses where they do not. On a
    GPU nothing is read back, and calls can be captured in a CUDA graph: call once before.

        rgp = RGP(model.named_parameters(), percentile=30, alpha=0.1)
        natural = torch.autograd.grad(natural_loss, rgp.parameters, retain_graph=True)
        adversarial = torch.autograd.grad(adversarial_loss, rgp.parameters, retain_graph=True)
        total_loss.backward()
        rgp.mask_(natural, adversarial)
        optimizer.step()

    Args:
        named_parameters: pairs of name and parameter, as ``model.named_parameters()`` gives them,
            all on one device, which they must not leave.
        percentile: percent of each tensor's weights to mask, in [0, 100].
        alpha: weight of the natural gradient in the score, in [0, 1].
        scope: which tensors take part: ``all``, ``conv`` (four or more dimensions), ``conv+bn``
            (those, and vectors such as BatchNorm's whose module has no matrix), or regular
            expressions of which one must match the whole name.
        score: how the two gradients are combined; see :mod:`cure_fast.kernels.rgp`.

    Attributes:
        names: of the tensors in scope, in the model's order.
        parameters: the tensors in scope.

    Raises:
        TypeError: for parameters that are not floating, or numbers that are none.
        ValueError: for a number out of range, an unknown scope, a scope that matches nothing, or
            parameters on several devices, empty, or with gaps in memory.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        *,
        percentile: float,
        alpha: float,
        scope: Scope = "all",
        score: Score = "abs",
    ) -> None:
        check_number("percentile", percentile, 0, 100)
        check_number("alpha", alpha, 0, 1)
        check_choice("score", score, SCORES)
        chosen = in_scope(dict(named_parameters), scope)
        self.names = tuple(chosen)
        self.parameters = tuple(chosen.values())
        check_lists({"named_parameters": self.parameters}, empty=False)
        count = len(self.names)
        self._workspace = Workspace(
            [parameter.detach() for parameter in self.parameters],
            percentiles=[percentile] * count,
            alphas=[alpha] * count,
            score=score,
        )
        self._tables: dict[str, TensorList] = {}

    def select(self, nat_grads: Sequence[Tensor], adv_grads: Sequence[Tensor]) -> Selection:
        """Return scores, thresholds and fractions kept; the next call overwrites them.

        Args:
            nat_grads: gradients of the natural loss for :attr:`parameters`, in their order.
            adv_grads: gradients of the adversarial loss.

        Raises:
            TypeError: for what is no list of floating tensors.
            ValueError: for gradients that do not match the parameters, in memory order too.
        """
        self._check("nat_grads", nat_grads)
        self._check("adv_grads", adv_grads)
        if dispatch.uses_triton(self._workspace.scores.device):
            nat_grads = self._table("nat_grads", nat_grads)
            adv_grads = self._table("adv_grads", adv_grads)
        device = self._workspace.scores.device
        return dispatch.run("select", select_in_ref, device, self._workspace, nat_grads, adv_grads)

    def mask_(
        self,
        nat_grads: Sequence[Tensor],
        adv_grads: Sequence[Tensor],
        grads: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Zero in place the gradients of low prominence; return the fraction kept, float32 [L].

        Args:
            nat_grads: gradients of the natural loss for :attr:`parameters`, in their order.
            adv_grads: gradients of the adversarial loss.
            grads: the gradients to mask; each parameter's ``.grad`` by default.

        Raises:
            TypeError: for what is no list of floating tensors.
            ValueError: for gradients that do not match the parameters, or a ``.grad`` of None.
        """
        masked = self._own_grads() if grads is None else grads
        self._check("grads", masked)
        selection = self.select(nat_grads, adv_grads)
        if dispatch.uses_triton(self._workspace.scores.device):
            masked = self._table("grads", masked)
        mask_below_(masked, selection.scores, selection.thresholds)
        return selection.kept

    def _own_grads(self) -> list[Tensor]:
        grads = [parameter.grad for parameter in self.parameters]
        for name, grad in zip(self.names, grads, strict=True):
            if grad is None:
                raise ValueError(f"{name}: expected a gradient, got None. Call backward() first.")
        return grads  # pyright: ignore[reportReturnType]

    def _check(self, what: str, grads: Sequence[Tensor]) -> None:
        check_lists({"parameters": self.parameters, what: grads})
        for name, parameter, grad in zip(self.names, self.parameters, grads, strict=True):
            if memory_order(parameter) != memory_order(grad):
                raise ValueError(
                    f"{what} of {name}: expected strides {parameter.stride()}, those of the "
                    f"parameter, got {grad.stride()}. Bring both into one memory format, for "
                    "instance by model.to(memory_format=torch.channels_last)."
                )

    def _table(self, what: str, grads: Sequence[Tensor]) -> TensorList:
        """Return the gradients with their table, the one from the last call if it still fits."""
        if isinstance(grads, TensorList):
            return grads
        table = self._tables.get(what)
        if table is None or not table.point_to(grads):
            table = self._tables[what] = TensorList(grads, names=self.names)
        return table


def in_scope(parameters: dict[str, Tensor], scope: Scope) -> dict[str, Tensor]:
    """Return the parameters that take part, by name; see :class:`RGP`.

    Raises:
        ValueError: for an unknown scope, or one that matches nothing.
    """
    if isinstance(scope, str):
        check_choice("scope", scope, SCOPES)
        chosen = [name for name, p in parameters.items() if _is_in(scope, name, p, parameters)]
    else:
        patterns = [re.compile(pattern) for pattern in scope]
        chosen = [name for name in parameters if any(p.fullmatch(name) for p in patterns)]
    if not chosen:
        raise ValueError(
            f"scope: expected one that matches a parameter, got {scope!r}, which matches none of "
            f"{len(parameters)}."
        )
    return {name: parameters[name] for name in chosen}


def _is_in(scope: str, name: str, parameter: Tensor, parameters: dict[str, Tensor]) -> bool:
    if scope == "all":
        return True
    if parameter.ndim >= 4:
        return True
    # Names alone say that a vector is a linear layer's bias: its module has a matrix too.
    module = name.rpartition(".")[0]
    weight = parameters.get(f"{module}.weight" if module else "weight", parameter)
    return scope == "conv+bn" and parameter.ndim == 1 and weight.ndim == 1
