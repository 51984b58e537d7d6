"""The forward passes of a step, and one backward pass for all the losses that use them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor

from .tape import Record, Tape

Wanted = Collection[str] | None
# Of one loss, for each part of a pass's batch: [N, K], None where it does not depend on the part.
# One of them at least is there, and those that are have no gap.
Cotangents = Sequence[Tensor | None]


class UnsupportedLossError(Exception):
    """A loss needs what the fast engine does not compute; says what."""


class Remembered(Protocol):
    """A forward pass: its logits [N, K], and the way back to the weights."""

    @property
    def logits(self) -> Tensor:
        """Logits [N, K], float32 or wider."""
        ...

    def backward(
        self, cotangents: Sequence[Cotangents], wanted: Sequence[Wanted]
    ) -> list[dict[str, Tensor]]:
        """Return the gradients for each loss, by parameter name."""
        ...


@dataclass
class TapedPass:
    """A pass on a tape: one sweep back for all cotangents."""

    tape: Tape
    record: Record

    @property
    def logits(self) -> Tensor:
        """Logits [N, K], float32 or wider."""
        return self.record.logits

    def backward(
        self, cotangents: Sequence[Cotangents], wanted: Sequence[Wanted]
    ) -> list[dict[str, Tensor]]:
        """Return the gradients for each loss, by parameter name."""
        rows = [part for loss in cotangents for part in loss if part is not None]
        if self.record.parts == 1:
            return self.tape.backward(self.record, torch.stack(rows), wanted)
        places = [[p for p, part in enumerate(loss) if part is not None] for loss in cotangents]
        spans = [range(some[0], some[-1] + 1) for some in places]
        return self.tape.backward(self.record, torch.cat(rows), wanted, spans)


@dataclass
class AutogradPass:
    """A pass in autograd's graph: a sweep back per cotangent."""

    logits: Tensor
    weights: Mapping[str, Tensor]

    def backward(
        self, cotangents: Sequence[Cotangents], wanted: Sequence[Wanted]
    ) -> list[dict[str, Tensor]]:
        """Return the gradients for each loss, by parameter name."""
        found = []
        for (cotangent,), names in zip(cotangents, wanted, strict=True):
            chosen = [name for name in self.weights if names is None or name in names]
            grads = torch.autograd.grad(
                self.logits,
                [self.weights[name] for name in chosen],
                cotangent,
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            found.append(dict(zip(chosen, grads, strict=True)))
        return found


class Passes:
    """Computes logits for a method's loss, and the gradients of the terms it makes of them.

    Each pass is cut at its logits: a loss is first derived by the logits alone, which is cheap,
    and all losses then share one way back through the network.

    Args:
        network: from images [N, C, H, W] to logits, with ``weights``.
        weights: leaves of the network by parameter name, all of them.
        tape: the same network on a tape, for one sweep back; None takes a sweep per loss.

    Attributes:
        watcher: called with the images of each pass; None lets nobody watch.
    """

    def __init__(
        self, network: Callable[[Tensor], Tensor], weights: Mapping[str, Tensor], tape: Tape | None
    ) -> None:
        self.network = network
        self.weights = weights
        self.tape = tape
        self.watcher: Callable[[Tensor], None] | None = None
        # Each with a leaf for the logits of each part of its batch.
        self.done: list[tuple[Remembered, list[Tensor]]] = []
        # Images that share a pass, and their leaves by id once it is computed, until asked for.
        self.joined: Sequence[Tensor] = ()
        self.waiting: dict[int, Tensor] | None = None

    def join(self, images: Sequence[Tensor]) -> None:
        """Compute these images in one pass as soon as the first of them is asked for.

        That pass serves each of them once; further calls with them have passes of their own.
        It is for the passes until :meth:`clear`, and for passes with a tape.

        Args:
            images: tensors of one shape and dtype, in the order in which they move BatchNorms'
                running statistics; calls are known by these very tensors.
        """
        self.joined, self.waiting = images, None

    def __call__(self, x: Tensor) -> Tensor:
        """Return logits [N, K] of images [N, C, H, W]; where gradients are on, remember the pass.

        Raises:
            UnsupportedLossError: for images that need a gradient themselves.
        """
        if self.watcher is not None:
            self.watcher(x)
        if not torch.is_grad_enabled():
            return self.network(x)
        if x.requires_grad:
            raise UnsupportedLossError("a loss with the gradient of its images")
        if self.waiting is None and any(x is images for images in self.joined):
            leaves = self._computed(self.joined)
            self.waiting = dict(zip(map(id, self.joined), leaves, strict=True))
        if self.waiting and id(x) in self.waiting:
            return self.waiting.pop(id(x))
        return self._computed([x])[0]

    def _computed(self, batches: Sequence[Tensor]) -> list[Tensor]:
        """Compute a pass; return a leaf for the logits of each batch."""
        made: Remembered
        if self.tape is None:
            (x,) = batches
            made = AutogradPass(self.network(x), self.weights)
        else:
            x = batches[0] if len(batches) == 1 else torch.cat(list(batches))
            made = TapedPass(self.tape, self.tape.forward(x, len(batches)))
        logits = made.logits.detach().chunk(len(batches))
        leaves = [part.detach().requires_grad_() for part in logits]
        self.done.append((made, leaves))
        return leaves

    def gradients(
        self, losses: Mapping[str, Tensor], wanted: Mapping[str, Wanted]
    ) -> dict[str, dict[str, Tensor]]:
        """Return the gradients of each loss by parameter name.

        A gradient that two passes add to is float32 or wider; others have the dtype of the weights.

        Args:
            losses: scalars by name.
            wanted: for each of them the names of the parameters; None for all.

        Raises:
            UnsupportedLossError: for a loss that depends on a weight, or on another tensor with a
                gradient, other than through the logits of the passes.
        """
        every = [leaf for _, leaves in self.done for leaf in leaves]
        self._check_leaves(losses, every)
        cotangents = {
            name: iter(torch.autograd.grad(loss, every, retain_graph=True, allow_unused=True))
            for name, loss in losses.items()
        }
        parts: dict[str, list[dict[str, Tensor]]] = {name: [] for name in losses}
        for made, leaves in self.done:
            given = {name: list(islice(found, len(leaves))) for name, found in cotangents.items()}
            used = {name: some for name, some in given.items() if any(c is not None for c in some)}
            if not used:
                continue
            grads = made.backward(list(used.values()), [wanted[name] for name in used])
            for name, part in zip(used, grads, strict=True):
                parts[name].append(part)
        return {name: _summed(found) for name, found in parts.items()}

    def _check_leaves(self, losses: Mapping[str, Tensor], known: Sequence[Tensor]) -> None:
        """Refuse losses whose gradient does not go back through these logits alone."""
        logits = set(map(id, known))
        for name, loss in losses.items():
            others = set(map(id, leaves_of(loss))) - logits
            if others:
                reached = (name for name, weight in self.weights.items() if id(weight) in others)
                term = f"loss {name!r}" if name else "a loss"
                raise UnsupportedLossError(
                    f"{term} that reaches {next(reached, 'a tensor')} other than through the "
                    "network's logits"
                )

    def clear(self) -> None:
        """Let the passes go, and what they keep in memory."""
        self.done.clear()
        self.joined, self.waiting = (), None


def leaves_of(loss: Tensor) -> list[Tensor]:
    """Return the tensors whose ``.grad`` a backward pass from ``loss`` would fill."""
    if loss.grad_fn is None:
        return [loss] if loss.requires_grad else []
    found, seen, left = [], {loss.grad_fn}, [loss.grad_fn]
    while left:
        node = left.pop()
        # What ends a graph adds to the gradient of a leaf.
        if (leaf := getattr(node, "variable", None)) is not None:
            found.append(leaf)
        for before, _ in node.next_functions:
            if before is not None and before not in seen:
                seen.add(before)
                left.append(before)
    return found


def _summed(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the sums by name, in float32 at least where there is anything to add."""
    if len(parts) == 1:
        return parts[0]
    total = wide(parts[0]) if parts else {}
    for part in parts[1:]:
        others = wide(part)
        torch._foreach_add_(  # pyright: ignore[reportPrivateImportUsage]
            list(total.values()), [others[name] for name in total]
        )
    return total


def wide(grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradients in float32, those that are float32 or wider as they are."""
    narrow = [name for name, grad in grads.items() if grad.dtype.itemsize < 4]
    if not narrow:
        return dict(grads)
    widened = [torch.empty_like(grads[name], dtype=torch.float32) for name in narrow]
    # One launch for all of them.
    torch._foreach_copy_(widened, [grads[name] for name in narrow])  # pyright: ignore[reportPrivateImportUsage]
    return {**grads, **dict(zip(narrow, widened, strict=True))}
