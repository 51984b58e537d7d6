"""Robust gradient prominence for a training loop of your own, prepared once for its model."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, TypeGuard

from torch import Tensor, nn

from . import dispatch
from .changing import ChangingList
from .checking import check_choice, check_lists, check_number
from .layout import check_dense, memory_order
from .rgp import SCORES, Score, Selection, mask_below_, select_in
from .tables import TensorList
from .workspace import Workspace

Scope = Literal["all", "conv", "conv+bn"] | Sequence[str]
SCOPES = ("all", "conv", "conv+bn")


class RGP:
    """Masks the gradients of weights of low prominence (Gowda et al., CURE, ICLR 2024, Eq. 6).

    Tables and memory are built here, so that a call in the training loop allocates nothing where
    the gradients stay at their addresses, and only sends the new addresses where they do not. On a
    GPU nothing is read back, and calls can be captured in a CUDA graph: call once before, and keep
    the object as long as the graph, which reads its tables and memory at each replay.

        rgp = RGP(model.named_parameters(), percentile=30, alpha=0.1)
        natural = torch.autograd.grad(natural_loss, rgp.parameters, retain_graph=True)
        adversarial = torch.autograd.grad(adversarial_loss, rgp.parameters, retain_graph=True)
        optimizer.zero_grad()
        total_loss.backward()
        rgp.mask_(natural, adversarial)
        optimizer.step()

    Args:
        named_parameters: pairs of name and parameter, as ``model.named_parameters()`` gives them,
            or a dictionary of them; all on one device, which they must not leave.
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
        TypeError: for what are no pairs, parameters that are not floating, numbers that are none,
            or a scope that is neither a name nor a list of strings.
        ValueError: for a number out of range, an unknown scope, a scope that matches nothing or is
            no regular expression, a name that comes twice, or parameters on several devices, empty,
            or with gaps in memory.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]] | Mapping[str, Tensor],
        *,
        percentile: float,
        alpha: float,
        scope: Scope = "all",
        score: Score = "abs",
    ) -> None:
        check_number("percentile", percentile, 0, 100)
        check_number("alpha", alpha, 0, 1)
        check_choice("score", score, SCORES)
        chosen = in_scope(_by_name(named_parameters), scope)
        self.names = tuple(chosen)
        self.parameters = tuple(chosen.values())
        check_lists({"named_parameters": self.parameters}, empty=False)
        for name, parameter in chosen.items():
            check_dense(name, parameter)
        self._shapes = tuple(parameter.shape for parameter in self.parameters)
        self._orders = tuple(map(memory_order, self.parameters))
        count = len(self.names)
        self._workspace = Workspace(
            [parameter.detach() for parameter in self.parameters],
            percentiles=[percentile] * count,
            alphas=[alpha] * count,
            score=score,
        )
        self._tables: defaultdict[str, ChangingList] = defaultdict(ChangingList)

    @property
    def nonfinite(self) -> Tensor:
        """Number of NaN or infinite scores per tensor at the last call, int32 [L] on the device.

        The next call overwrites it. ``rgp.nonfinite.any()`` is a flag for the ``skip`` of
        :func:`cure_fast.kernels.masked_sgd_`. Where ``percentile`` is 0 nothing is scored or
        counted.
        """
        return self._workspace.nonfinite

    def select(self, nat_grads: Sequence[Tensor], adv_grads: Sequence[Tensor]) -> Selection:
        """Return scores, thresholds and fractions kept; the next call overwrites them.

        Args:
            nat_grads: gradients of the natural loss for :attr:`parameters`, in their order.
            adv_grads: gradients of the adversarial loss.

        Raises:
            TypeError: for what is no list of floating tensors.
            ValueError: for gradients that do not match the parameters, in memory order too.
        """
        try:
            nat_grads = self._checked("nat_grads", nat_grads)
            adv_grads = self._checked("adv_grads", adv_grads)
            return select_in(self._workspace, nat_grads, adv_grads)
        finally:
            self._tables["nat_grads"].release()
            self._tables["adv_grads"].release()

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
        try:
            masked = self._checked("grads", self._own_grads() if grads is None else grads)
            selection = self.select(nat_grads, adv_grads)
            mask_below_(masked, selection.scores, selection.thresholds)
        finally:
            self._tables["grads"].release()
        return selection.kept.clone()  # The next call overwrites it.

    def _own_grads(self) -> list[Tensor]:
        grads = [parameter.grad for parameter in self.parameters]
        for name, grad in zip(self.names, grads, strict=True):
            if grad is None:
                raise ValueError(f"{name}: expected a gradient, got None. Call backward() first.")
        return grads  # pyright: ignore[reportReturnType]

    def _checked(self, what: str, grads: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return gradients that fit the parameters; with their table where kernels run.

        What fits a TensorList or a former table has the right shapes and memory order, which
        spares a look at each tensor.
        """
        if isinstance(grads, TensorList):
            if (grads.layout.shapes, grads.layout.orders) != (self._shapes, self._orders):
                self._check(what, grads)
            return grads
        if not dispatch.uses_triton(self._workspace.device):
            self._check(what, grads)
            return grads
        tables = self._tables[what]
        is_list = isinstance(grads, Sequence) and not isinstance(grads, Tensor)
        known = tables.find(grads) if is_list else None
        if known is None:
            self._check(what, grads)
            known = tables.build(grads, names=[f"{what} of {name}" for name in self.names])
        return known

    def _check(self, what: str, grads: Sequence[Tensor]) -> None:
        check_lists({"parameters": self.parameters, what: grads})
        for name, parameter, grad in zip(self.names, self.parameters, grads, strict=True):
            if memory_order(parameter) != memory_order(grad):
                advice = (
                    "Bring both into one memory format, for instance by "
                    "model.to(memory_format=torch.channels_last)."
                    if grad.ndim == 4
                    else "Copy it by torch.empty_like(parameter).copy_(gradient)."
                )
                raise ValueError(
                    f"{what} of {name}: expected strides {parameter.stride()}, those of the "
                    f"parameter, got {grad.stride()}. {advice}"
                )


def _by_name(
    named_parameters: Iterable[tuple[str, Tensor]] | Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Return the parameters by name.

    Raises:
        TypeError: for what are no pairs of a name and a tensor.
        ValueError: for none at all, or a name that comes twice.
    """
    what = "named_parameters: expected pairs of name and parameter"
    advice = "Pass model.named_parameters()."
    pairs: object = named_parameters
    if isinstance(named_parameters, Mapping):
        pairs = named_parameters.items()
    if isinstance(pairs, nn.Module | Tensor | str) or not isinstance(pairs, Iterable):
        raise TypeError(f"{what}, got {type(named_parameters).__name__}. {advice}")
    found: dict[str, Tensor] = {}
    for pair in pairs:
        if not _is_pair(pair):
            raise TypeError(f"{what}, got an item of type {type(pair).__name__}. {advice}")
        name, parameter = pair
        if name in found:
            raise ValueError(f"named_parameters: expected each name once, got {name!r} twice.")
        found[name] = parameter
    if not found:
        raise ValueError(
            f"{what}, got none. {advice} What it returns is empty once it has been read."
        )
    return found


def _is_pair(pair: object) -> TypeGuard[tuple[str, Tensor]]:
    return (
        isinstance(pair, tuple | list)
        and len(pair) == 2
        and isinstance(pair[0], str)
        and isinstance(pair[1], Tensor)
    )


def in_scope(parameters: dict[str, Tensor], scope: Scope) -> dict[str, Tensor]:
    """Return the parameters that take part, by name; see :class:`RGP`.

    Raises:
        TypeError: for a scope that is neither a name nor a list of strings.
        ValueError: for an unknown scope, one that matches nothing, or no regular expression.
    """
    if isinstance(scope, str):
        if scope not in SCOPES:
            raise ValueError(
                f"scope: expected one of {', '.join(SCOPES)}, or a list of regular expressions, "
                f"got {scope!r}. For a regular expression pass [{scope!r}]."
            )
        chosen = [name for name, p in parameters.items() if _is_in(scope, name, p, parameters)]
    else:
        patterns = _patterns(scope)
        chosen = [name for name in parameters if any(p.fullmatch(name) for p in patterns)]
    if not chosen:
        raise ValueError(
            f"scope: expected one that matches a parameter, got {scope!r}, which matches none of "
            f"{len(parameters)}."
        )
    return {name: parameters[name] for name in chosen}


def _patterns(scope: Sequence[str]) -> list[re.Pattern[str]]:
    if not isinstance(scope, Sequence) or isinstance(scope, bytes):
        raise TypeError(
            f"scope: expected one of {', '.join(SCOPES)}, or a list of regular expressions, got "
            f"{type(scope).__name__}."
        )
    patterns = []
    for i, pattern in enumerate(scope):
        if not isinstance(pattern, str):
            raise TypeError(f"scope[{i}]: expected a string, got {type(pattern).__name__}.")
        try:
            patterns.append(re.compile(pattern))
        except re.error as error:
            raise ValueError(
                f"scope[{i}]: expected a regular expression, got {pattern!r}: {error}."
            ) from error
    return patterns


def _is_in(scope: str, name: str, parameter: Tensor, parameters: dict[str, Tensor]) -> bool:
    if scope == "all":
        return True
    if parameter.ndim >= 4:
        return True
    # Names alone say that a vector is a linear layer's bias: its module has a matrix too.
    module = name.rpartition(".")[0]
    weight = parameters.get(f"{module}.weight" if module else "weight", parameter)
    return scope == "conv+bn" and parameter.ndim == 1 and weight.ndim == 1
