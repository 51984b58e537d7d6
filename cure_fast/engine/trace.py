"""The operations of a network in order, for whoever computes it in another way than its layers."""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from cure_fast.models import ImageClassifier

# What a trace may hold besides layers: residual sums, activations, and the mean over positions.
SUMS = (operator.add, operator.iadd, torch.add)
RELUS = (F.relu, torch.relu)


class UnsupportedNetworkError(Exception):
    """A network has an operation that only its own layers can compute; says which."""


def trace(model: ImageClassifier) -> fx.Graph:
    """Return the graph of ``model.logits``: from normalised images to logits.

    Its nodes are calls of the network's layers (``call_module``, named as in ``model``), sums,
    ReLUs, and the mean over positions (``call_method`` mean).

    Raises:
        UnsupportedNetworkError: for a network that branches on its input's values, or has a layer
            or function of another kind.
    """
    tracer = fx.Tracer()
    try:
        graph = tracer.trace(_Logits(model))
    except (ValueError, TypeError, RuntimeError) as error:
        raise UnsupportedNetworkError(
            f"{type(model).__name__} cannot be traced: {error}"
        ) from error
    for node in graph.nodes:
        if node.op == "call_module":
            node.target = str(node.target).removeprefix("model.")
        if not _is_known(node, model):
            raise UnsupportedNetworkError(
                f"{type(model).__name__} computes {_described(node, model)}, which the fast engine "
                "does not know"
            )
    return graph


def reaching(value: fx.Node) -> set[fx.Node]:
    """Return the nodes that a value is computed from, itself included."""
    found, left = set(), [value]
    while left:
        node = left.pop()
        if node not in found:
            found.add(node)
            left += node.all_input_nodes
    return found


class _Logits(nn.Module):
    """Stands for ``model.logits``, as a tracer follows ``forward``."""

    def __init__(self, model: ImageClassifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model.logits(x)


LAYERS = (nn.Conv2d, nn.BatchNorm2d, nn.Linear, nn.ReLU, nn.MaxPool2d, nn.Identity)


def _is_known(node: fx.Node, model: ImageClassifier) -> bool:
    if node.op in ("placeholder", "output"):
        return True
    if node.op == "call_module":
        return type(model.get_submodule(str(node.target))) in LAYERS
    if node.op == "call_method":
        return node.target == "mean" and node.kwargs == {"dim": (2, 3)} and len(node.args) == 1
    return node.op == "call_function" and node.target in (*SUMS, *RELUS)


def _described(node: fx.Node, model: ImageClassifier) -> str:
    if node.op == "call_module":
        return f"{node.target} ({type(model.get_submodule(str(node.target))).__name__})"
    return str(getattr(node.target, "__name__", node.target))
