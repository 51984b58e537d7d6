"""What a computation launches on a GPU, and the bytes that it moves: counted, without a GPU.

Graphs of operations are lowered by Inductor for a pretended GPU, up to the code of their kernels;
other operations are counted as they are dispatched.
"""

from __future__ import annotations

import copy
import re
import types
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

COLUMNS = (
    *("launches", "of them eager", "layout copies", "GB", "GB read", "GB written"),
    *("convolution calls", "GB of convolutions", "other library calls"),
)
CONVOLUTIONS = ("convolution", "input gradient", "weight gradient")


@dataclass(frozen=True)
class Launch:
    """One kernel of Inductor's, one call of a library, or one operation outside of both.

    Attributes:
        kind: ``kernel``, ``library``, ``eager``, or one of :data:`CONVOLUTIONS`.
        name: the operations of which it is made.
        read: bytes that it reads.
        written: bytes that it writes.
        reorders: whether it does nothing but store a tensor in another memory order.
    """

    kind: str
    name: str
    read: int
    written: int
    reorders: bool = False


@dataclass
class Cost:
    """What a computation launches.

    Attributes:
        launches: what is launched, in order.
        kernels: launches of Inductor's kernels in the generated code.
    """

    launches: list[Launch] = field(default_factory=list)
    kernels: int = 0

    def add(self, other: Cost) -> None:
        """Add another computation's."""
        self.launches += other.launches
        self.kernels += other.kernels

    def figures(self) -> dict[str, float]:
        """Return the sums by name, as in :data:`COLUMNS`: numbers of launches, and GB."""
        calls = Counter(one.kind for one in self.launches)
        own = [one for one in self.launches if one.kind in ("kernel", "eager")]
        convolved = [one for one in self.launches if one.kind in CONVOLUTIONS]
        read, written = (sum(getattr(o, way) for o in own) / 1e9 for way in ("read", "written"))
        return {
            "launches": self.kernels + calls["eager"],
            "of them eager": calls["eager"],
            "layout copies": sum(one.reorders for one in own),
            "GB": read + written,
            "GB read": read,
            "GB written": written,
            "convolution calls": len(convolved),
            **{kind: calls[kind] for kind in CONVOLUTIONS},
            "GB of convolutions": sum(one.read + one.written for one in convolved) / 1e9,
            "other library calls": calls["library"],
        }


def lower(graph: fx.GraphModule, inputs: Sequence[Tensor], options: Mapping[str, Any]) -> Cost:
    """Return what the code launches that Inductor generates for a graph.

    Args:
        graph: a module of ATen operations that returns a list of tensors.
        inputs: fake tensors on the pretended GPU.
        options: Inductor's.
    """
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.graph import GraphLowering

    cost = Cost()

    def counted(lowering: GraphLowering) -> Any:
        code, _ = lowering.codegen()
        cost.kernels += len(re.findall(r"^\s+triton_\w+\.run\(", code.value, re.MULTILINE))
        for node in lowering.scheduler.nodes:
            cost.launches += _launches(node)
        # In place of the module of this code, which nobody calls.
        return types.SimpleNamespace(call=lambda inputs: [])

    fixed = {"compile_threads": 1, "force_disable_caches": True, "triton.cudagraphs": False}
    with (
        _disable_current_modes(),
        config.patch({**options, **fixed}),
        mock.patch.object(GraphLowering, "compile_to_module", counted),
    ):
        compile_fx(*_moved(graph, inputs))
    return cost


def _moved(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> tuple[fx.GraphModule, list[Tensor]]:
    """Return a graph of the CPU's for the GPU, and its inputs there."""
    gpu = torch.device("cuda", 0)
    mode = detect_fake_mode(inputs)
    assert mode is not None

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return gpu if isinstance(value, torch.device) else value
        with mode:
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=gpu)

    own = copy.deepcopy(graph.graph)
    constants = {str(node.target) for node in own.nodes if node.op == "get_attr"}
    module = fx.GraphModule({name: moved(getattr(graph, name)) for name in constants}, own)
    for node in own.nodes:
        node.args, node.kwargs = tree_map(moved, (node.args, node.kwargs))
        node.meta.clear()
    module.recompile()
    return module, [moved(tensor) for tensor in inputs]


def _launches(node: Any) -> list[Launch]:
    """Return what a node of Inductor's schedule launches."""
    from torch._inductor.ir import MultiOutput
    from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode

    if isinstance(node, NopKernelSchedulerNode) or isinstance(node.node, MultiOutput):
        return []
    read, written = node.get_read_buffer_sizes(), node.get_write_buffer_sizes()
    if not isinstance(node, ExternKernelSchedulerNode):
        origins = [origin for part in node.get_nodes() for origin in part.node.get_origins()]
        name = " ".join(sorted({str(origin.target) for origin in origins}))
        return [Launch("kernel", name, read, written, _reorders(node))]
    called: Any = node.node
    name = str(getattr(called, "op_overload", None) or called.python_kernel_name)
    if "convolution" not in name:
        return [Launch("library", name, read, written)]
    sizes = [_size(tensor) for tensor in called.inputs]
    if "backward" not in name:
        return [Launch("convolution", name, sum(sizes), _size(called))]
    grad, features, weight = sizes[:3]
    arguments, _ = called.unflatten_args(called.inputs, called.constant_args)
    to_input, to_weight, _ = arguments[-1]
    found = []
    if to_input:
        found.append(Launch("input gradient", name, grad + weight, features))
    if to_weight:
        found.append(Launch("weight gradient", name, grad + features, weight))
    return found


def _size(tensor: Any) -> int:
    return int(tensor.get_numel()) * tensor.get_dtype().itemsize


def _reorders(node: Any) -> bool:
    """Return whether a kernel reads one tensor and writes it in another memory order."""
    reads, writes = list(node.read_writes.reads), list(node.read_writes.writes)
    if len(reads) != 1 or len(writes) != 1 or node.is_reduction():
        return False
    # Without what is before the first element: a part of a tensor has the tensor's order.
    read, written = (dep.index - dep.get_offset() for dep in (*reads, *writes))
    return read != written


class Operations(TorchDispatchMode):
    """Counts operations that are computed one by one: a launch each."""

    def __init__(self) -> None:
        super().__init__()
        self.cost = Cost()
        self.counting = True

    @contextmanager
    def instead(self, cost: Cost) -> Iterator[None]:
        """Count this, and no operation meanwhile."""
        self.cost.add(cost)
        self.counting = False
        try:
            yield
        finally:
            self.counting = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if self.counting and not _only_views(func):
            if "convolution" in str(func):
                raise RuntimeError(f"{func}: expected convolutions only in what is compiled.")
            arguments = zip(args, func._schema.arguments, strict=False)
            changed = [value for value, kind in arguments if kind.is_write]
            if written := _bytes((changed, found)):
                read = _bytes((args, kwargs))
                self.cost.launches.append(Launch("eager", str(func), read, written))
        return found


def _only_views(operation: Any) -> bool:
    """Return whether an operation makes no values: a view, or memory alone."""
    returned = [value.alias_info for value in operation._schema.returns]
    views = any(alias is not None and not alias.is_write for alias in returned)
    return views or "empty" in operation._schema.name


def _bytes(tree: Any) -> int:
    tensors = {id(leaf): leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
