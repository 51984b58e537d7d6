"""The loss of a step and its gradients: as the method wrote them, or recorded as one graph.

A recorded loss runs as Python once per kind of step. Autograd writes the way back into the graph,
so what a loss is made of is up to it: any network, penalties on weights or features, gradients of
images.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cure_fast.batch import Batch, weighed
from cure_fast.step.run import Terms
from cure_fast.step.state import TrainState
from cure_fast.step.train_step import loss_of, wanted_gradients

from .copies import Copies, standing_in
from .recorded import Named, Recorded


class Loss:
    """Computes the terms of a run's loss and their gradients, by networks with ``copies``.

    :meth:`step` and :meth:`derive` take a kind of steps, for which they record what they compute at
    the first call; with None they compute as the method wrote it. Steps of a kind do the same
    operations.

    A recorded loss has one input gradient for all sweeps through a pass where it is ``stacked``,
    and torch.compile fuses its operations where it is ``compiled``. ``recorded`` is called before
    it is first computed. A loss that has no graph raises :class:`RecordingError`.
    """

    def __init__(
        self,
        run: TrainState,
        copies: Sequence[Copies] = (),
        *,
        stacked: bool,
        compiled: bool,
        recorded: Callable[[], None] = lambda: None,
    ) -> None:
        self.run, self.copies = run, copies
        self.stacked, self.compiled, self.after_recording = stacked, compiled, recorded
        # While a loss is recorded, what stands for parameters, by their ids.
        self.leaves: dict[int, Tensor] = {}
        self.networks = _Networks([run.model, *run.networks.values(), *run.teachers.values()])
        self.recorded: dict[Hashable, Recorded] = {}

    def step(self, batch: Batch, kind: Hashable | None = None) -> Terms:
        """Fill ``.grad`` and the run's further gradients; return the detached terms.

        Of a part of a step all of them count by its share.
        """
        if kind is None:
            terms, grads = self._computed(batch)
            for parameter, grad in zip(self.run.trained_parameters, grads, strict=True):
                parameter.grad = grad
            return terms
        found = self._graph((kind, "step"), self._step, batch)(self._given(batch))
        batch.notes.update(_of(found, "note"))
        grads, trained = _of(found, "grad"), self.run.trained_parameters
        for place, grad in zip(grads, wide([*grads.values()]), strict=True):
            trained[place].grad = grad
        for (_, name, *_), grad in _of(found, "further", whole=True).items():
            self.run.gradients.setdefault(name, []).append(grad)
        return _of(found, "term")

    def derive(
        self, batch: Batch, parameters: Sequence[Tensor], kind: Hashable | None = None
    ) -> list[Tensor]:
        """Return the gradients of the total by parameters; ``.grad`` stays as it is."""

        def compute(batch: Batch) -> Named:
            with self._standing_in():
                total = weighed(loss_of(self.run, batch)["total"], batch.part)
                grads = self.within(total, parameters)
            named: Named = {("grad", place): grad for place, grad in enumerate(grads)}
            return {("term", "total"): total.detach(), **named}

        if kind is None:
            # A part, whose notes are its own: those of the step are the step's.
            found = compute(*batch.split(1))
        else:
            key = (kind, *map(id, parameters))
            found = self._graph(key, compute, batch)(self._given(batch))
        return wide([*_of(found, "grad").values()])

    def within(self, term: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Return the gradients of a term in the middle of a loss; its passes can be used again."""
        leaves = self._leaves_of(parameters)
        found = torch.autograd.grad(
            term, leaves, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return list(found)

    def _graph(self, key: Hashable, compute: Callable[[Batch], Named], batch: Batch) -> Recorded:
        modes = [(m.training, getattr(m, "momentum", None)) for m in self.networks.modules()]
        key = (key, tuple(modes), batch.x_adv is batch.x, *sorted(batch.notes))
        if key not in self.recorded:
            graph = self.record(batch, compute)
            if self.compiled:
                graph.compile()
            self.recorded[key] = graph
            self.after_recording()
        return self.recorded[key]

    def record(self, batch: Batch, compute: Callable[[Batch], Named] | None = None) -> Recorded:
        """Return the graph of a function, by default :meth:`step`, for batches like this one."""
        run, compute = self.run, compute or self._step
        trained = set(map(id, run.trained_parameters))

        def function(given: Named) -> Named:
            tensors = _of(given, "network")
            for name, parameter in self.networks.named_parameters():
                leaf = nn.Parameter(tensors[name], requires_grad=id(parameter) in trained)
                tensors[name] = self.leaves[id(parameter)] = leaf
            images: dict[str, Any] = _of(given, "batch")
            inner = type(batch)(**images, notes=_of(given, "note"))
            try:
                return functional_call(self.networks, tensors, (compute, inner))
            finally:
                self.leaves.clear()
                run.gradients.clear()

        return Recorded(
            function,
            self._given(batch),
            ahead=lambda key: key[0] in ("term", "note"),
            stacked=self.stacked,
            in_two=self.compiled,
        )

    def _step(self, batch: Batch) -> Named:
        noted = dict(batch.notes)
        terms, grads = self._computed(batch)
        found: Named = {("term", name): term for name, term in terms.items()}
        found |= {("note", n): note for n, note in batch.notes.items() if note is not noted.get(n)}
        found |= {("grad", place): grad for place, grad in enumerate(grads) if grad is not None}
        for name, further in self.run.gradients.items():
            found |= {("further", name, place): grad for place, grad in enumerate(further)}
        return found

    def _computed(self, batch: Batch) -> tuple[Terms, list[Tensor | None]]:
        """Return detached terms and the gradients of the total; fill the run's further ones."""
        run = self.run
        trained = self._leaves_of(run.trained_parameters)
        with self._standing_in():
            terms = {name: weighed(t, batch.part) for name, t in loss_of(run, batch).items()}
            for name, (of, parameters) in wanted_gradients(run).items():
                run.gradients[name] = self.within(of(terms), parameters)
            grads = torch.autograd.grad(terms["total"], trained, allow_unused=True)
        batch.join([batch])
        detached = {name: term.detach() for name, term in terms.items()}
        return detached, list(grads)

    def _leaves_of(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Return what the loss under way computes with for parameters: mostly themselves."""
        return [self.leaves.get(id(parameter), parameter) for parameter in parameters]

    def _given(self, batch: Batch) -> Named:
        """Return the tensors that a recorded loss takes anew in each step."""
        found: Named = {
            ("batch", name): tensor
            for name, tensor in vars(batch).items()
            # Natural training has the images themselves for adversarial ones.
            if isinstance(tensor, Tensor) and (name == "x" or tensor is not batch.x)
        }
        found |= {("note", name): note for name, note in batch.notes.items()}
        for tensors in (self.networks.named_parameters(), self.networks.named_buffers()):
            found |= {("network", name): tensor.detach() for name, tensor in tensors}
        return found

    @contextmanager
    def _standing_in(self) -> Iterator[None]:
        """Let networks compute with their copies."""
        with ExitStack() as stack:
            for copies in self.copies:
                stack.enter_context(standing_in(copies.network, copies.logits))
            yield


class _Networks(nn.Module):
    """Networks whose tensors are replaced together, while a function is called."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, function: Callable[[Batch], Named], batch: Batch) -> Named:
        return function(batch)


def _of(found: Named, kind: str, *, whole: bool = False) -> dict[Any, Tensor]:
    """Return the tensors of a kind, by the rest of their names or the whole of them."""
    return {key if whole else key[1]: t for key, t in found.items() if key[0] == kind}


def wide(grads: Sequence[Tensor]) -> list[Tensor]:
    """Return gradients in float32, those that are float32 or wider as they are."""
    found = [g if g.itemsize >= 4 else torch.empty_like(g, dtype=torch.float32) for g in grads]
    narrow = [(new, old) for new, old in zip(found, grads, strict=True) if new is not old]
    if narrow:
        # One launch for all of them.
        new, old = zip(*narrow, strict=True)
        torch._foreach_copy_(new, old)  # pyright: ignore[reportPrivateImportUsage]
    return found
