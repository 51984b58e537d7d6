"""A function of tensors as a graph of operations, recorded by running it once, and compiled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from cure_fast.config import EngineFeature
from cure_fast.errors import is_out_of_memory

from .joining import arguments, changes, cut, join, value_of

T = TypeVar("T")
aten = torch.ops.aten
# Tensors by what they are and which: ("term", "total"), ("grad", 3).
Named = dict[tuple[Any, ...], Tensor]

# By default Inductor stores intermediates of long formulas, such as those of a BatchNorm's way
# back, in float32.
OPTIONS = {"realize_acc_reads_threshold": 64, "realize_opcount_threshold": 200}


class RecordingError(Exception):
    """A loss has no graph; says why."""


class CompiledLossError(Exception):
    """The loss could not be compiled, or failed when it first ran compiled; says why."""


def compile_static(
    function: Callable[..., T], options: Mapping[str, int] | None = None
) -> Callable[..., T]:
    """Return what torch.compile makes of a function, or of a module, for tensors of one shape.

    It makes no CUDA graphs of its own. Where torch is set to deterministic algorithms, kernels are
    chosen without timing them, so that every process sums in the same order.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    return torch.compile(
        function,
        dynamic=False,
        options={"triton.cudagraphs": False, "deterministic": deterministic, **(options or {})},
    )


def failed_features(error: Exception) -> tuple[EngineFeature, ...]:
    """Return which features of the fast engine an error rules out."""
    if isinstance(error, RecordingError):
        return "stack", "compile-loss"
    if isinstance(error, CompiledLossError):
        return ("compile-loss",)
    # Here, as it takes seconds to import.
    from torch._dynamo.exc import TorchDynamoException

    return ("compile",) if isinstance(error, TorchDynamoException) else ()


class Recorded:
    """A function of named tensors as a graph, with autograd's operations in it.

    It runs once, with fake tensors, so what it branches on must be the same in every call. Tensors
    that it finds elsewhere are read where they are in each call. Nothing is computed here.

    Args:
        function: from tensors by name to tensors by name: first those that are computed on the
            way there, for which ``ahead`` holds, then those of the way back.
        given: tensors by name, which calls replace by others of the same layout.
        ahead: from a name to whether that output is of the way there.
        stacked: one input gradient of a convolution for all sweeps through a pass.
        in_two: whether there and back are graphs of their own, as a compiler wants them.

    Attributes:
        parts: the graphs, one or two. Each takes the tensors of :meth:`inputs`, the second also
            what the first returns behind its outputs.

    Raises:
        RecordingError: for a function that reads values, draws from a generator, or holds a tensor
            that takes a gradient.
    """

    def __init__(
        self,
        function: Callable[[Named], Named],
        given: Named,
        *,
        ahead: Callable[[tuple[Any, ...]], bool],
        stacked: bool,
        in_two: bool,
    ) -> None:
        self.names: list[tuple[Any, ...]] = []

        def flat(*tensors: Tensor) -> list[Tensor]:
            found = function(dict(zip(given, tensors, strict=True)))
            self.names = list(found)
            return list(found.values())

        try:
            with torch.enable_grad():
                recorded = make_fx(flat, tracing_mode="fake", _allow_non_fake_inputs=True)(
                    *given.values()
                )
        except Exception as error:
            if is_out_of_memory(error):
                raise
            reason = str(error).strip().split("\n")[0]
            raise RecordingError(f"{type(error).__name__}: {reason}") from error
        graph = recorded.graph
        values = [node.meta.get("val") for node in graph.nodes]
        if any(isinstance(value, torch.SymInt | torch.SymFloat) for value in values):
            raise RecordingError("the loss reads the value of a tensor")
        self.first = sum(map(ahead, self.names))
        self.sources: list[tuple[Any, ...] | Tensor] = [*given, *_as_inputs(recorded)]
        _drop_views_of_all(graph)
        self.counted = self._taken_counters(graph)
        _narrow_outputs(graph, self.first)
        graph.eliminate_dead_code(is_impure_node=changes)
        if stacked:
            graph = join(graph)
        for place, node in reversed([*enumerate(graph.find_nodes(op="placeholder"))]):
            if not node.users:
                graph.erase_node(node)
                del self.sources[place]
        graphs = cut(graph, self.first) if in_two else (graph,)
        self.parts = [fx.GraphModule(recorded, part) for part in graphs]
        self.runs: list[Callable[..., list[Tensor]]] = [*self.parts]
        self.ran = True

    def compile(self) -> None:
        """Let torch.compile fuse the operations of each part."""
        self.runs = [compile_static(part, OPTIONS) for part in self.parts]
        self.ran = False

    def inputs(self, given: Named) -> list[Tensor]:
        """Return the tensors that the graphs take."""
        return [s if isinstance(s, Tensor) else given[s] for s in self.sources]

    @torch.no_grad()
    def __call__(self, given: Named) -> Named:
        """Return what the function returns of other tensors.

        Raises:
            CompiledLossError: where it was to be compiled, and fails in its first call.
        """
        tensors = self.inputs(given)
        try:
            found = list(self.runs[0](*tensors))
            for run in self.runs[1:]:
                found[self.first :] = run(*tensors, *found[self.first :])
        except Exception as error:
            if self.ran or is_out_of_memory(error):
                raise
            raise CompiledLossError(f"{type(error).__name__}: {error}") from error
        self.ran = True
        if self.counted:
            counters = [given[name] for name in self.counted]
            torch._foreach_add_(counters, list(self.counted.values()))  # pyright: ignore[reportPrivateImportUsage]
        return dict(zip(self.names, found, strict=True))

    def _taken_counters(self, graph: fx.Graph) -> Counter[tuple[Any, ...]]:
        """Take out what adds one to a given integer: BatchNorms' counts, a launch each."""
        counted: Counter[tuple[Any, ...]] = Counter()
        names = dict(zip(graph.find_nodes(op="placeholder"), self.sources, strict=True))
        added = graph.find_nodes(op="call_function", target=aten.add_.Tensor)
        for node in added:
            counter, number = arguments(node)
            name = names.get(counter)
            # A network's next pass counts on from what this one left.
            if (
                isinstance(name, tuple)
                and (number, node.kwargs) == (1, {})
                and all(user in added for user in node.users)
            ):
                counted[name] += 1
                node.replace_all_uses_with(counter)
                graph.erase_node(node)
        return counted


def _as_inputs(module: fx.GraphModule) -> list[Tensor]:
    """Let a graph take the tensors that it holds as further inputs; return them.

    A compiler might take the values of what a graph holds for constants.
    """
    graph = module.graph
    held: dict[str, fx.Node] = {}
    tensors = []
    last = graph.find_nodes(op="placeholder")[-1]
    for node in graph.find_nodes(op="get_attr"):
        name = str(node.target)
        if name not in held:
            tensor = getattr(module, name)
            if tensor.requires_grad:
                raise RecordingError("the loss holds a tensor itself that takes a gradient")
            tensors.append(tensor)
            with graph.inserting_after(last):
                last = held[name] = graph.placeholder(name)
            last.meta["val"] = tensor
        node.replace_all_uses_with(held[name])
        graph.erase_node(node)
    return tensors


def _drop_views_of_all(graph: fx.Graph) -> None:
    """Take out views of all of a tensor as it is, which autograd makes many of."""
    for node in list(graph.nodes):
        detached = node.target in (aten.detach.default, aten.alias.default)
        if detached or (
            node.target is aten.view.default
            and value_of(node).shape == value_of(arguments(node)[0]).shape
        ):
            node.replace_all_uses_with(arguments(node)[0])
            graph.erase_node(node)


def _narrow_outputs(graph: fx.Graph, first: int) -> None:
    """Return gradients as they are computed: whoever needs them wider widens them in one launch."""
    output = graph.output_node()
    (outputs,) = arguments(output)
    # What is computed on the way there, terms and notes, is as wide as the loss made it.
    for node in set(outputs[first:]) - set(outputs[:first]):
        if node.target is aten._to_copy.default and set(node.kwargs) == {"dtype"}:
            (narrow,) = node.all_input_nodes
            if value_of(narrow).itemsize < value_of(node).itemsize:
                output.replace_input_with(node, narrow)
