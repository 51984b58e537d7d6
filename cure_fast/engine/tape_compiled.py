"""A tape whose passes torch.compile compiles, so that what lies between convolutions is fused."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from cure_fast.errors import is_out_of_memory
from cure_fast.models import ImageClassifier

from .compile import CompiledPassError, compile_static
from .tape import Tape, widened
from .tape_base import Layer, Pullback, Stack
from .tape_formulas import formula_of

# A BatchNorm's way back adds up more values than Inductor keeps in one kernel by default: it would
# store them in float32, and in another memory order, for the next kernel to read.
OPTIONS = {"realize_acc_reads_threshold": 64}


class CompiledTape(Tape):
    """A tape that compiles its passes of whole batches; others are computed as they are.

    Both ways are compiled when they are first used, anew for each shape, mode of the BatchNorms and
    set of wanted gradients. Convolutions stay the library's.

    Args:
        model: the network.
        weights: tensors to compute with; see :class:`Tape`.
        batch_size: images of a whole batch, or of each of its parts.
    """

    def __init__(
        self, model: ImageClassifier, weights: Mapping[str, Tensor], *, batch_size: int
    ) -> None:
        super().__init__(model, weights)
        self.batch_size = batch_size
        self._formulas = {node: formula_of(layer) for node, layer in self._layers.items()}
        self._norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        self._programs: dict[Hashable, Program] = {}

    def _through(
        self,
        layers: Mapping[fx.Node, Layer],
        tensors: Mapping[str, Tensor],
        images: Tensor,
        parts: int,
    ) -> tuple[Tensor, dict[fx.Node, Pullback]]:
        if len(images) != parts * self.batch_size:
            return super()._through(layers, tensors, images, parts)
        compute = super()._through

        def forward(x: Tensor, *values: Tensor) -> object:
            named = dict(zip(tensors, values, strict=True))
            logits, pullbacks = compute(self._formulas, named, x, parts)
            return logits, [_parted(pullback) for pullback in pullbacks.values()]

        key = self._key(images, parts)
        logits, ways = self._run(key, forward, [images, *tensors.values()])
        pullbacks = (partial(function, *kept) for function, kept in ways)
        return logits, Way(key, zip(layers, pullbacks, strict=True))

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """Return the logits of a forward pass that keeps nothing; see :meth:`Tape.forward`.

        Args:
            x: a whole batch of images.
        """
        images, compute = self._prepared(x), super()._through

        def forward(x: Tensor, *values: Tensor) -> object:
            named = dict(zip(self._tensors, values, strict=True))
            return compute(self._formulas, named, x, 1)[0]

        key = ("logits", *self._key(images, 1))
        logits = self._run(key, forward, [images, *self._tensors.values()])
        self._count(1)
        return widened(logits)

    def _key(self, images: Tensor, parts: int) -> tuple[Hashable, ...]:
        """Return what a compiled forward pass depends on besides the network."""
        modes = tuple(norm.training for norm in self._norms)
        return images.shape, images.stride(), parts, modes

    def _back(
        self, pullbacks: Mapping[fx.Node, Pullback], stack: Stack, names: Sequence[AbstractSet[str]]
    ) -> list[dict[str, Tensor]]:
        if not isinstance(pullbacks, Way):
            return super()._back(pullbacks, stack, names)
        key = (pullbacks.key, stack.rows.stride(), stack.of, tuple(names))
        ways = [_parted(pullback) for pullback in pullbacks.values()]
        kept, structure = tree_flatten(ways)
        places = [place for place, leaf in enumerate(kept) if isinstance(leaf, Tensor)]
        compute = super()._back

        def backward(rows: Tensor, *values: Tensor) -> object:
            leaves = list(kept)
            for place, value in zip(places, values, strict=True):
                leaves[place] = value
            restored = (partial(f, *own) for f, own in tree_unflatten(leaves, structure))
            found = dict(zip(pullbacks, restored, strict=True))
            return compute(found, Stack(rows, stack.of), names)

        return self._run(key, backward, [stack.rows, *(kept[place] for place in places)])

    def _run(
        self, key: Hashable, function: Callable[..., object], tensors: Sequence[Tensor]
    ) -> Any:
        """Return what the function returns of the tensors, by a program kept under the key."""
        if key not in self._programs:
            self._programs[key] = Program(function, tensors)
        return self._programs[key](tensors)


class CompiledNetwork:
    """A further network of a run, whose logits a compiled tape computes where it can.

    That is for whole batches of images that take no gradient.

    Args:
        network: what computes the others.
        tape: of the same network with the same weights.
    """

    def __init__(self, network: Callable[[Tensor], Tensor], tape: CompiledTape) -> None:
        self.network = network
        self.tape = tape

    def __call__(self, x: Tensor) -> Tensor:
        """Return logits [N, K], float32 or wider, of images [N, C, H, W] in [0, 1]."""
        if x.requires_grad or len(x) != self.tape.batch_size:
            return self.network(x)
        return self.tape.logits(x)


class Way(dict[fx.Node, Pullback]):
    """What leads back from a compiled forward pass, each part of it a function's partial call.

    Attributes:
        key: of the forward pass.
    """

    def __init__(self, key: Hashable, pullbacks: Any) -> None:
        super().__init__(pullbacks)
        self.key = key


def _parted(pullback: Pullback) -> tuple[Callable[..., Stack | None], tuple[object, ...]]:
    """Return a pullback's function, and what it holds of the forward pass."""
    if not isinstance(pullback, partial):
        return pullback, ()
    return pullback.func, pullback.args


class Program:
    """A function of tensors, compiled for tensors of these shapes, memory orders and dtypes.

    Args:
        function: from tensors to a tree of tensors and other things, which depend on the kinds of
            its tensors alone. It may change its tensors in place.
        tensors: examples, which are left as they are.

    Raises:
        CompiledPassError: for whatever fails here or at the first call, but for lack of memory: a
            compiler's faults show in many ways.
    """

    def __init__(self, function: Callable[..., object], tensors: Sequence[Tensor]) -> None:
        # Of each leaf: a given tensor's or a made one's number, or the leaf itself.
        self._given: dict[int, int] = {}
        self._made: dict[int, int] = {}
        self._leaves: list[object] = []
        self._structure: TreeSpec | None = None

        def flat(*given: Tensor) -> list[Tensor]:
            leaves, self._structure = tree_flatten(function(*given))
            numbers = {id(tensor): number for number, tensor in enumerate(given)}
            made: dict[int, tuple[int, Tensor]] = {}
            self._leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            for place, leaf in enumerate(leaves):
                if id(leaf) in numbers:
                    self._given[place] = numbers[id(leaf)]
                elif isinstance(leaf, Tensor):
                    number, _ = made.setdefault(id(leaf), (len(made), leaf))
                    self._made[place] = number
            return [leaf for _, leaf in made.values()]

        with _failing_as_pass():
            graph = make_fx(flat, tracing_mode="fake")(*(tensor.detach() for tensor in tensors))
            self._compiled = compile_static(graph, OPTIONS)
        self._ran = False

    def __call__(self, tensors: Sequence[Tensor]) -> Any:
        """Return what the function returns of these tensors."""
        detached = [tensor.detach() for tensor in tensors]
        with nullcontext() if self._ran else _failing_as_pass():
            made = self._compiled(*detached)
        self._ran = True
        leaves = list(self._leaves)
        for place, number in self._given.items():
            leaves[place] = tensors[number]
        for place, number in self._made.items():
            leaves[place] = made[number]
        assert self._structure is not None
        return tree_unflatten(leaves, self._structure)


@contextmanager
def _failing_as_pass() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise CompiledPassError(f"{type(error).__name__}: {error}") from error
