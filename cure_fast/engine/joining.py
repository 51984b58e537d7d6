"""Passes over the graph of a loss: one input gradient for several sweeps, and a cut in two.

Sweeps back through one forward pass meet each convolution with the same weights, and what a
compiler does not see is that their input gradients are rows of one larger batch.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten


def join(graph: fx.Graph) -> fx.Graph:
    """Return a graph of ATen operations with one input gradient for all sweeps through a pass.

    Where a sweep needs the result of another, it is returned as it is.
    """
    joined = fx.Graph()
    joined.output(joined.graph_copy(graph, {}))
    groups: defaultdict[object, list[fx.Node]] = defaultdict(list)
    for node in joined.find_nodes(op="call_function", target=aten.convolution_backward.default):
        above, *options, wanted = arguments(node)
        if wanted[0]:
            groups[str(options), value_of(above).dtype].append(node)
    for nodes in groups.values():
        if len(nodes) > 1:
            _share_input_gradient(joined, nodes)
    if not _sort(joined):
        return graph
    joined.eliminate_dead_code(is_impure_node=changes)
    return joined


def changes(node: fx.Node) -> bool:
    """Return whether an operation changes a tensor that it is given."""
    # A BatchNorm changes its statistics, of which most of its operations' schemas say nothing.
    return node.is_impure() or (
        "batch_norm" in str(node.target) and "backward" not in str(node.target)
    )


def arguments(node: fx.Node) -> tuple[Any, ...]:
    """Return the arguments of a node whose operation is known, and with it their types."""
    return node.args


def value_of(node: fx.Node) -> Tensor:
    """Return the fake tensor that a node computed when it was recorded."""
    return node.meta["val"]


def _part(graph: fx.Graph, whole: fx.Node, place: int, like: fx.Node) -> fx.Node:
    size = len(value_of(like))
    part = graph.call_function(aten.slice.Tensor, (whole, 0, place * size, (place + 1) * size))
    part.meta["val"] = value_of(like)
    return part


def _share_input_gradient(graph: fx.Graph, nodes: list[fx.Node]) -> None:
    features, weight, *options = arguments(nodes[0])[1:10]
    assert isinstance(features, fx.Node)
    like = value_of(features)
    shape = (len(nodes) * len(like), *like.shape[1:])
    with graph.inserting_before(nodes[-1]):
        rows = [node.args[0] for node in nodes]
        stack = graph.call_function(aten.cat.default, (rows,))
        # Of the features the input gradient reads the layout alone.
        unread = graph.call_function(
            aten.new_empty_strided.default,
            (features, shape, (like[0].numel(), *like.stride()[1:])),
        )
        whole = graph.call_function(
            aten.convolution_backward.default,
            (stack, unread, weight, *options, [True, False, False]),
        )
        below = graph.call_function(operator.getitem, (whole, 0))
        for place, node in enumerate(nodes):
            for user in [user for user in node.users if user.args[1] == 0]:
                user.replace_all_uses_with(_part(graph, below, place, user))
                graph.erase_node(user)
            node.args = (*node.args[:10], [False, *arguments(node)[10][1:]])
        # Who else reads a row reads it in the stack: else what computes it would write it twice.
        for place, row in enumerate(rows):
            if isinstance(row, fx.Node) and row.op == "call_function":
                part = _part(graph, stack, place, row)
                row.replace_all_uses_with(part, delete_user_cb=lambda user: user is not stack)


def _needs(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Return what each operation needs: what it reads, and its place among changes of that.

    What changes a tensor stays behind those that read it before, and before those behind it.
    """
    needs: dict[fx.Node, list[fx.Node]] = {}
    readers: defaultdict[int, list[fx.Node]] = defaultdict(list)
    changed: dict[int, fx.Node] = {}
    for node in graph.nodes:
        needs[node] = list(node.all_input_nodes)
        read = [given.meta.get("val") for given in node.all_input_nodes]
        for memory in {t.untyped_storage()._cdata for t in read if isinstance(t, Tensor)}:
            if memory in changed:
                needs[node].append(changed[memory])
            if changes(node):
                needs[node] += readers.pop(memory, [])
                changed[memory] = node
            readers[memory].append(node)
    return needs


def _sort(graph: fx.Graph) -> bool:
    """Let each operation come after those it needs, and otherwise where it is.

    False where operations need one another's results; the graph is of no use then.
    """
    needs = _needs(graph)
    done: dict[fx.Node, None] = {}
    begun: set[fx.Node] = set()
    for root in list(graph.nodes):
        left = [root]
        while left:
            node = left[-1]
            before = [read for read in needs[node] if read not in done]
            if node in done or not before:
                done[left.pop()] = None
                continue
            if node in begun and not begun.isdisjoint(before):
                return False
            begun.add(node)
            left += reversed(before)
    place = next(iter(done))
    for node in done:
        if node is not place:
            place.append(node)
            place = node
    return True


def cut(graph: fx.Graph, first: int) -> tuple[fx.Graph, ...]:
    """Return what computes the first outputs, and the others, as autograd would cut the graph.

    The first also returns what it saves, which the second takes behind the graph's own inputs. A
    compiler that sees both at once computes some of that anew instead, and reads more. Where the
    way back changes a tensor, the graph is returned as it is.
    """
    (outputs,) = arguments(graph.output_node())
    needs, given = _needs(graph), graph.find_nodes(op="placeholder")
    there, back = list(outputs[:first]), list(outputs[first:])
    ahead = _reaching(there, needs)
    ahead |= {n for n in graph.nodes if n.target is operator.getitem and n.args[0] in ahead}
    if any(changes(node) for node in graph.nodes if node not in ahead and node.op != "output"):
        return (graph,)
    saved = [
        node
        for node in graph.nodes
        if node in ahead
        and node.op == "call_function"
        and isinstance(node.meta.get("val"), Tensor)
        and any(user not in ahead and user.op != "output" for user in node.users)
    ]
    behind = _reaching(back, needs, ahead) - ahead
    return (
        _part_of(graph, ahead, given, [*there, *saved]),
        _part_of(graph, behind, [*given, *saved], back),
    )


def _part_of(
    graph: fx.Graph, nodes: set[fx.Node], inputs: list[fx.Node], outputs: list[fx.Node]
) -> fx.Graph:
    """Return a graph of some nodes of another."""
    part = fx.Graph()
    copied = {node: part.placeholder(node.name) for node in inputs}
    for node in graph.nodes:
        if node in nodes and node not in copied:
            copied[node] = part.node_copy(node, lambda read: copied[read])
    part.output([copied[node] for node in outputs])
    return part


def _reaching(
    nodes: Sequence[fx.Node],
    needs: Mapping[fx.Node, list[fx.Node]],
    known: Collection[fx.Node] = (),
) -> set[fx.Node]:
    """Return what nodes need, themselves included; not what those that are known need."""
    found: set[fx.Node] = set()
    left = list(nodes)
    while left:
        node = left.pop()
        if node not in found:
            found.add(node)
            left += () if node in known else needs[node]
    return found
