"""Forward passes that are kept, and one backward pass for several cotangents at once.

Gradients of several losses of the same logits need several cotangents to go back through the same
network. Here they go together, stacked along the batch: one input gradient per convolution and one
mask per ReLU serve all of them. Batches that BatchNorm must not mix, such as natural and
adversarial images, can be the parts of a single forward pass.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor, fx, nn

from cure_fast.models import ImageClassifier

from .tape_base import Ask, Block, Layer, Pullback, Stack
from .tape_layers import Convolution, layer_of
from .trace import UnsupportedNetworkError, reaching, trace


@dataclass(frozen=True, eq=False)
class Record:
    """One forward pass; its activations live as long as it does.

    Attributes:
        logits: [N, K], float32 or wider, without a graph.
        pullbacks: what each operation needs on the way back.
        dtype: of the logits before they were widened.
        parts: equal parts of the batch.
    """

    logits: Tensor
    pullbacks: Mapping[fx.Node, Pullback]
    dtype: torch.dtype
    parts: int


class Tape:
    """Computes a network's logits, and gradients of its parameters for several cotangents at once.

    Nothing here waits for the device, so that both passes can be captured in a CUDA graph.

    Args:
        model: the network; its BatchNorms lend their statistics and modes, and its ``normalize``
            is applied.
        weights: tensors to compute with, by the names of the model's parameters: the parameters
            themselves, or copies in another precision. Convolutions and linear layers share one
            dtype; BatchNorms may keep float32. Read at each forward pass, so they may change in
            place between one record and the next, but not before a record's last backward pass.
            Nor may running statistics, where BatchNorms were in evaluation mode.

    Raises:
        UnsupportedNetworkError: for a network with an operation that the tape does not know.
        ValueError: if ``weights`` lacks a parameter.
    """

    def __init__(self, model: ImageClassifier, weights: Mapping[str, Tensor]) -> None:
        graph = trace(model)
        for node in list(graph.nodes):
            if _is_identity(node, model):
                node.replace_all_uses_with(node.all_input_nodes[0])
                graph.erase_node(node)
        self.model = model
        self.weights = weights
        self._tensors = {**weights, **dict(model.named_buffers())}
        self._graph = graph
        self._layers: dict[fx.Node, Layer] = {
            node: layer_of(node, model)
            for node in graph.nodes
            if node.op not in ("placeholder", "output")
        }
        self._logits: fx.Node = next(iter(graph.output_node().all_input_nodes))
        self._last_uses = _last_uses(self._layers, self._logits)
        used = [name for layer in self._layers.values() for name in layer.names]
        if len(used) != len(set(used)):
            raise UnsupportedNetworkError(
                f"{type(model).__name__} uses a layer twice, which no tape knows"
            )
        if missing := sorted(set(used) - set(weights)):
            raise ValueError(f"weights: expected every parameter, got none for {missing[0]}")
        leading = reaching(self._logits)
        lead = {n for node, layer in self._layers.items() if node in leading for n in layer.names}
        self._names = [name for name, _ in model.named_parameters() if name in lead]
        first = [layer for layer in self._layers.values() if isinstance(layer, Convolution)][:1]
        if not first:
            raise UnsupportedNetworkError(f"{type(model).__name__} has no convolution")
        self._first_weight = first[0].names[0]

    @torch.no_grad()
    def forward(self, x: Tensor, parts: int = 1) -> Record:
        """Return the record of a forward pass of images ``x`` [N, 3, H, W] in [0, 1].

        BatchNorms in training mode use the batch's statistics and update their running ones, as
        ``nn.BatchNorm2d`` does; those in evaluation mode use their running ones. Of several parts
        each has its own statistics, as in passes one after the other.

        Args:
            x: the images, those of the first part first.
            parts: equal parts of the batch, 1 or more.

        Raises:
            ValueError: if the parts are not equal, or a BatchNorm in training mode has one value
                per channel.
        """
        if parts < 1 or len(x) % parts:
            raise ValueError(f"parts: expected equal parts of {len(x)} images, got {parts}")
        images = self._prepared(x)
        logits, pullbacks = self._through(self._layers, self._tensors, images, parts)
        self._count(parts)
        return Record(widened(logits), pullbacks, logits.dtype, parts)

    def _prepared(self, x: Tensor) -> Tensor:
        return self.model.normalize(x).to(self.weights[self._first_weight].dtype)

    def _count(self, batches: int) -> None:
        """Count batches that BatchNorms in training mode have seen."""
        counters = [layer.counter for layer in self._layers.values()]
        if counted := [counter for counter in counters if counter is not None]:
            torch.ops.aten._foreach_add_.Scalar(counted, batches)

    def _through(
        self,
        layers: Mapping[fx.Node, Layer],
        tensors: Mapping[str, Tensor],
        images: Tensor,
        parts: int,
    ) -> tuple[Tensor, dict[fx.Node, Pullback]]:
        """Return the logits of prepared images, and what leads back from them.

        Args:
            layers: what computes each operation.
            tensors: weights and running statistics by name.
            images: [N, 3, H, W], normalised, in the dtype of the first weight.
            parts: equal parts of the batch.
        """
        image = next(node for node in self._graph.nodes if node.op == "placeholder")
        values: dict[fx.Node, Tensor] = {image: images}
        pullbacks: dict[fx.Node, Pullback] = {}
        for node, layer in layers.items():
            inputs = [values[source] for source in _sources(node)]
            values[node], pullbacks[node] = layer.forward(tensors, parts, *inputs)
            for read in self._last_uses[node]:
                del values[read]
        return values[self._logits], pullbacks

    @torch.no_grad()
    def backward(
        self,
        record: Record,
        cotangents: Tensor,
        wanted: Sequence[Collection[str] | None],
        spans: Sequence[range] | None = None,
    ) -> list[dict[str, Tensor]]:
        """Return, for each cotangent of the logits, gradients of parameters by name.

        Each has the dtype and the memory order of its weight. What no wanted gradient needs is not
        computed. A record can be used several times.

        Args:
            record: of a forward pass of this tape.
            cotangents: [S, N, K], the derivatives of S losses with respect to ``record.logits``;
                with ``spans`` [R, K], the derivatives of one loss after the other, each with
                respect to the logits of its parts alone.
            wanted: for each of them the names of parameters, ``None`` for all.
            spans: for each of them the parts of the batch that its loss depends on, at least one;
                ``None`` stands for all.

        Raises:
            ValueError: for cotangents of another shape, parts that there are not, or a name of no
                parameter that the logits depend on.
        """
        names = [frozenset(self._names if some is None else some) for some in wanted]
        self._check(record, cotangents, names, spans)
        whole = [range(record.parts)] * len(names)
        blocks = tuple(
            (number, part) for number, span in enumerate(spans or whole) for part in span
        )
        if not any(names):
            return [{} for _ in names]
        rows = cotangents.flatten(0, 1) if spans is None else cotangents
        totals = self._back(record.pullbacks, Stack(rows.to(record.dtype), blocks), names)
        return [{name: own[name] for name in self._names if name in own} for own in totals]

    def _back(
        self, pullbacks: Mapping[fx.Node, Pullback], stack: Stack, names: Sequence[AbstractSet[str]]
    ) -> list[dict[str, Tensor]]:
        """Return for each cotangent the gradients of parameters by name."""
        found: list[dict[str, list[Tensor]]] = [{} for _ in names]
        needed = self._needed(names, stack.of)
        gradients: dict[fx.Node, Stack] = {}
        if needed[self._logits]:
            gradients[self._logits] = stack.only(needed[self._logits])
            del stack
        for node in reversed(self._layers):
            if node not in gradients:
                continue
            sources = _sources(node)
            below = _union(needed[source] for source in sources)
            ask = Ask(names, below, found)
            gradient = pullbacks[node](gradients.pop(node), ask)
            for source in sources:
                if gradient is not None and needed[source]:
                    _add(gradients, source, gradient.only(needed[source]))
            del gradient
        return _totals(found)

    def _needed(
        self, names: Sequence[AbstractSet[str]], blocks: tuple[Block, ...]
    ) -> dict[fx.Node, tuple[Block, ...]]:
        """Return for each value the blocks with a wanted parameter in what computes it."""
        needed: dict[fx.Node, tuple[Block, ...]] = {}
        for node in self._graph.nodes:
            if node.op == "placeholder":
                needed[node] = ()
            elif node in self._layers:
                own = self._layers[node].names
                here = tuple(block for block in blocks if not names[block[0]].isdisjoint(own))
                needed[node] = _union([here, *(needed[source] for source in _sources(node))])
        return needed

    def _check(
        self,
        record: Record,
        cotangents: Tensor,
        names: Sequence[AbstractSet[str]],
        spans: Sequence[range] | None,
    ) -> None:
        shape = (len(names), *record.logits.shape)
        if spans is not None:
            inside = all(
                span and range(record.parts)[span[0] : span[-1] + 1] == span for span in spans
            )
            if len(spans) != len(names) or not inside:
                raise ValueError(
                    f"spans: expected parts of {record.parts} in order, one range per entry of "
                    f"wanted, got {list(spans)}"
                )
            size = len(record.logits) // record.parts
            shape = (sum(map(len, spans)) * size, *record.logits.shape[1:])
        if cotangents.shape != shape:
            raise ValueError(
                f"cotangents: expected {list(shape)}, one per entry of wanted, "
                f"got {list(cotangents.shape)}"
            )
        if unknown := sorted(frozenset().union(*names) - set(self._names)):
            raise ValueError(
                f"wanted: expected parameters that the logits depend on, got {unknown[0]!r}"
            )


def _sources(node: fx.Node) -> list[fx.Node]:
    """Return the values that an operation reads, one twice where it is both operands of a sum."""
    return [value for value in node.args if isinstance(value, fx.Node)]


def widened(logits: Tensor) -> Tensor:
    """Return logits in float32 or wider."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _is_identity(node: fx.Node, model: ImageClassifier) -> bool:
    return node.op == "call_module" and isinstance(
        model.get_submodule(str(node.target)), nn.Identity
    )


def _last_uses(nodes: Collection[fx.Node], kept: fx.Node) -> dict[fx.Node, list[fx.Node]]:
    """Return the values that each operation is the last to read, or makes for nobody."""
    last = {value: node for node in nodes for value in (node, *_sources(node))}
    uses: dict[fx.Node, list[fx.Node]] = {node: [] for node in nodes}
    for value, node in last.items():
        if value is not kept:
            uses[node].append(value)
    return uses


def _union(sets: Iterable[tuple[Block, ...]]) -> tuple[Block, ...]:
    return tuple(sorted(frozenset().union(*sets)))


def _totals(found: Sequence[Mapping[str, list[Tensor]]]) -> list[dict[str, Tensor]]:
    """Return the gradients by name, sums of what the parts of a batch give one by one."""
    several = [some for own in found for some in own.values() if len(some) > 1]
    for more in zip_longest(*(some[1:] for some in several)):
        pairs = [(some[0], one) for some, one in zip(several, more, strict=True) if one is not None]
        # One launch for all of them.
        torch.ops.aten._foreach_add_.List([total for total, _ in pairs], [one for _, one in pairs])
    return [{name: some[0] for name, some in own.items()} for own in found]


def _add(gradients: dict[fx.Node, Stack], value: fx.Node, more: Stack) -> None:
    """Add to the gradients of a value, which are for the same cotangents from whoever reads it."""
    held = gradients.get(value)
    gradients[value] = more if held is None else Stack(held.rows + more.rows, more.of)
