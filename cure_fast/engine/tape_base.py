"""What the layers of a tape share, and the gradients that they hand on.

A layer's ``forward`` returns its output and a function, its pullback, that holds what the backward
pass needs. The pullback takes the gradients of the output for several cotangents, fills in the
gradients of the layer's parameters, and returns those of the layer's input.

The batch has equal parts, and a cotangent may be for some of them alone: a loss of natural images
has nothing for the adversarial ones. What one cotangent has for one part is a block, and blocks lie
one after the other in a single tensor, so that one operation serves them all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

# The number of a cotangent, and that of a part of the batch.
Block = tuple[int, int]


@dataclass(frozen=True)
class Stack:
    """Gradients of one value [N, ...], in blocks of M images.

    Attributes:
        rows: [len(of) * M, ...], one block after the other.
        of: the blocks, ascending, at least one; the parts of a cotangent have no gap.
    """

    rows: Tensor
    of: tuple[Block, ...]

    @property
    def size(self) -> int:
        """Images in a block, M."""
        return len(self.rows) // len(self.of)

    def blocks(self) -> Iterator[tuple[int, range, Tensor]]:
        """Yield for each block the cotangent, its part alone, and the gradient [M, ...]."""
        for (number, part), rows in zip(self.of, self.rows.chunk(len(self.of)), strict=True):
            yield number, range(part, part + 1), rows

    def each(self) -> Iterator[tuple[int, range, Tensor]]:
        """Yield each cotangent, its parts, and the gradient [len(parts) * M, ...]."""
        first = 0
        for number, blocks in groupby(self.of, key=lambda block: block[0]):
            parts = [part for _, part in blocks]
            yield number, range(parts[0], parts[-1] + 1), self._narrow(first, len(parts))
            first += len(parts)

    def repeats(self) -> Iterator[tuple[int, range, Tensor]]:
        """Yield how often a range of parts comes in a row, the range, and all those gradients.

        What is read of the batch is then read once, and for as many images as can be. A range may
        begin in one cotangent and end in the next.
        """
        ranges: list[range] = []
        for _, part in self.of:
            if ranges and ranges[-1].stop == part:
                ranges[-1] = range(ranges[-1].start, part + 1)
            else:
                ranges.append(range(part, part + 1))
        first = 0
        for parts, same in groupby(ranges):
            count = len(list(same))
            yield count, parts, self._narrow(first, count * len(parts))
            first += count * len(parts)

    def only(self, kept: tuple[Block, ...]) -> Stack:
        """Return the gradients for ``kept``, some of ``of``; a view where those are neighbours."""
        if kept == self.of:
            return self
        first = self.of.index(kept[0])
        if self.of[first : first + len(kept)] == kept:
            return Stack(self._narrow(first, len(kept)), kept)
        pairs = zip(self.of, self.rows.chunk(len(self.of)), strict=True)
        return Stack(torch.cat([rows for block, rows in pairs if block in kept]), kept)

    def _narrow(self, first: int, count: int) -> Tensor:
        if count == len(self.of):
            return self.rows
        return self.rows.narrow(0, first * self.size, count * self.size)


@dataclass(frozen=True)
class Ask:
    """What a pullback shall compute.

    Attributes:
        wanted: for every cotangent, names of the parameters to differentiate.
        below: the blocks whose gradients of the input are needed, ascending; of a cotangent either
            all or none.
        found: for every cotangent, where gradients of parameters are put, by name; what is put
            under one name is added up.
    """

    wanted: Sequence[AbstractSet[str]]
    below: tuple[Block, ...]
    found: Sequence[dict[str, list[Tensor]]]


Pullback = Callable[[Stack, Ask], Stack | None]


class Layer:
    """One operation of a network.

    Attributes:
        names: the parameters it uses.
    """

    names: tuple[str, ...] = ()

    @property
    def counter(self) -> Tensor | None:
        """What counts the batches seen, int64 []; ``None`` where there is nothing to count."""
        return None

    def forward(
        self, weights: Mapping[str, Tensor], parts: int, *inputs: Tensor
    ) -> tuple[Tensor, Pullback]:
        """Return the output of this layer with ``weights``, and its pullback.

        Args:
            weights: tensors by the names of parameters.
            parts: equal parts of the batch, whose statistics are taken apart.
            inputs: one tensor per operand, images outermost.
        """
        raise NotImplementedError


def taken(x: Tensor, parts: range, size: int) -> Tensor:
    """Return these parts of a batch, of ``size`` images each; ``x`` itself where that is all."""
    if len(parts) * size == len(x):
        return x
    return x.narrow(0, parts.start * size, len(parts) * size)


def empty_rows(x: Tensor, count: int) -> Tensor:
    """Return uninitialised memory [count, ...] with images laid out as those of ``x``."""
    stride = (math.prod(x.shape[1:]), *x.stride()[1:])
    return x.new_empty_strided((count, *x.shape[1:]), stride)


def joined(gradients: list[Tensor], of: tuple[Block, ...]) -> Stack | None:
    """Return the stack of gradients that come one by one, or None where there are none."""
    if not gradients:
        return None
    return Stack(gradients[0] if len(gradients) == 1 else torch.cat(gradients), of)


def names_of(name: str, module: nn.Module) -> tuple[str, ...]:
    """Return the names of a layer's weight and, if it has one, bias."""
    return tuple(f"{name}.{own}" for own, _ in module.named_parameters(recurse=False))


def tensors_of(
    weights: Mapping[str, Tensor], names: tuple[str, ...]
) -> tuple[Tensor, Tensor | None]:
    """Return a layer's weight and, if it has one, bias."""
    weight, *bias = (weights[name] for name in names)
    return weight, bias[0] if bias else None


def put(
    found: dict[str, list[Tensor]],
    names: tuple[str, ...],
    gradients: Sequence[Tensor | None],
    weight: Tensor,
) -> None:
    """Keep the gradients that there are; the first is the weight's, and gets its memory order."""
    for name, gradient in zip(names, gradients, strict=False):
        if gradient is not None:
            laid_out = _laid_out_as(weight, gradient) if gradient.dim() > 1 else gradient
            found.setdefault(name, []).append(laid_out)


def _laid_out_as(weight: Tensor, gradient: Tensor) -> Tensor:
    """Return ``gradient`` with the strides of ``weight``, copied only if in another order."""
    pairs = zip(weight.shape, weight.stride(), gradient.stride(), strict=True)
    if all(size == 1 or stride == own for size, stride, own in pairs):
        return gradient.as_strided(weight.shape, weight.stride())
    return torch.empty_like(weight).copy_(gradient)
