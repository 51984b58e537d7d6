"""The fast engine: a whole step in one CUDA graph of few, fused operations.

What differs from the eager engine, each part switched off by ``--engine-without``:

- ``graph``: the step is captured once and replayed; nothing waits for the device.
- ``fold``: the attack runs on a copy of the network with BatchNorm folded in, without gradients of
  weights; where the attack is in train mode, on the network itself.
- ``copies``: convolutions compute with half-precision copies of their weights, which the update
  writes; autocast would cast them in each of a step's two dozen passes.
- ``stack``: the losses of a forward pass share one way back (see ``tape.py``).
- ``fuse``: selection, mask, SGD and copies in kernels of ours (see :mod:`cure_fast.kernels`).
- ``compile``: torch.compile fuses what is between the attack's convolutions.
- ``compile-loss``: the same for the passes of the loss, there and back (see ``tape_compiled.py``).

Whether a step is finite is decided on the device; statistics are taken back there.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from cure_fast.config import EngineFeature
from cure_fast.console import warn
from cure_fast.errors import is_out_of_memory
from cure_fast.kernels import Selection
from cure_fast.step.method import Terms
from cure_fast.step.train_step import no_memory_for_update

from .compile import failed_feature
from .eager import Engine
from .graph import CapturedStep
from .passes import UnsupportedLossError
from .prepared import Prepared
from .selector import Selectors

if TYPE_CHECKING:
    from cure_fast.training.trainer import Run

# Steps of a kind that are computed before one is captured: libraries choose algorithms in the
# first, and tables of addresses settle in the second.
WARM_UP = 3
COMPILED = ("compile", "compile-loss")
ON_GPU = ("graph", *COMPILED)


class Kind(NamedTuple):
    """What steps that one graph can compute have in common."""

    phase: Hashable
    attack_steps: int
    shape: torch.Size
    stride: tuple[int, ...]


class FastEngine(Engine):
    """Computes the steps of a run on the device alone, and replays them as CUDA graphs.

    Args:
        run: whose steps it computes; its network passes :func:`cure_fast.engine.trace.trace`.
    """

    name = "fast"

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.without = set(run.config.run.engine_without)
        self.prepared: Prepared | None = None
        self.warmed: dict[Kind, int] = {}
        self.captured: dict[Kind, CapturedStep] = {}

    @property
    def description(self) -> str:
        """What rows and reports call it, with what it goes without."""
        without = f" without {', '.join(sorted(self.without))}" if self.without else ""
        return f"{self.name}{without}"

    def has(self, feature: str) -> bool:
        """Return whether a feature is on; graphs and compilation need a GPU."""
        on_gpu = self.run.device.type == "cuda"
        return feature not in self.without and (on_gpu or feature not in ON_GPU)

    def step(self, x: Tensor, y: Tensor) -> Terms | None:
        """Train on one batch; see :meth:`Engine.step`.

        Returns:
            The terms, which the next step overwrites; None in a step that is logged, where they are
            not finite. Other steps are not looked at.

        Raises:
            DivergedError: in a step that is logged, after too many steps that were not finite.
            MemoryExhaustedError: if the update does not fit into memory, or the eager engine, which
                takes over where the passes do not, finds no way either.
        """
        prepared = self.prepare()
        prepared.numbers.send()
        try:
            terms = self._computed(prepared, x, y)
        except Exception as error:
            feature = failed_feature(error)
            if feature is not None and feature not in self.without and not prepared.updating:
                prepared.restore()
                return self._do_without(feature, error).step(x, y)
            obstacle = obstacle_in(error)
            if obstacle is None or (prepared.updating and not is_out_of_memory(error)):
                raise
            if prepared.updating:
                raise no_memory_for_update(self.run, error) from error
        else:
            prepared.counters.seen |= terms.keys()
            if self.run.step % self.run.config.run.log_every:
                return terms
            self.flush()
            return terms if prepared.counters.loss_is_finite else None
        prepared.restore()
        return self.give_up(obstacle).step(x, y)

    def prepare(self) -> Prepared:
        """Return what steps need, made for the run's tensors as they are now."""
        if self.prepared is None:
            self.prepared = Prepared(self.run, self)
        return self.prepared

    def give_up(self, obstacle: str) -> Engine:
        """Leave the run to the eager engine, and say why."""
        self.flush()
        self.run.optimizer.zero_grad(set_to_none=True)
        self.run.gradients.clear()
        self.forget()
        warn(f"the fast engine gives way to the eager one: {obstacle}")
        self.run.engine = Engine(self.run, reason=obstacle)
        return self.run.engine

    def _do_without(self, feature: EngineFeature, error: Exception) -> FastEngine:
        """Leave out what torch.compile cannot compile here, and say why."""
        # The first line names what failed, the second says why.
        reason = " ".join(str(error).strip().split("\n")[:2])
        warn(f"the fast engine goes on without {feature}, as torch.compile failed: {reason}")
        self.flush()
        self.without.add(feature)
        self.forget()
        return self

    def _computed(self, prepared: Prepared, x: Tensor, y: Tensor) -> Terms:
        """Replay the step, or compute it until it has been seen often enough to capture it."""
        phase, attack_steps = self.run.method.phase(self.run), self.run.attack_steps
        key = Kind(phase, attack_steps, x.shape, x.stride())
        if key in self.captured:
            return self.captured[key].replay(x, y)
        seen = self.warmed.get(key, 0)
        prepared.keep()
        # The last batch of an epoch may be smaller: a graph for one step would hold its memory.
        regular = len(y) == self.run.loader.batch_size
        if self.has("graph") and regular and seen >= WARM_UP:
            self._drop_graphs_of_fewer_attack_steps()
            try:
                captured = CapturedStep(prepared.compute, x, y, self.run.generators.values())
            except RuntimeError as error:
                prepared.clear()
                if is_out_of_memory(error) or failed_feature(error) is not None:
                    raise
                self.without.add("graph")
                # Former graphs draw from the random sources as they were before the failure.
                self.captured.clear()
                reason = str(error).split("\n")[0]
                warn(f"the fast engine runs without a CUDA graph, as the step has none: {reason}")
            else:
                self.captured[key] = captured
                return captured.replay(x, y)
        self.warmed[key] = seen + 1
        return prepared.compute(x, y)

    def _drop_graphs_of_fewer_attack_steps(self) -> None:
        """Free what is not needed again: a graph keeps a step's memory, and attacks only grow."""
        former = [key for key in self.captured if key.attack_steps != self.run.attack_steps]
        if former:
            self._wait_for_replays()
        for key in former:
            del self.captured[key]

    def _wait_for_replays(self) -> None:
        """Let replays under way end: they read tables in the host's memory."""
        if self.captured and self.run.device.type == "cuda":
            torch.cuda.synchronize(self.run.device)

    def flush(self) -> None:
        """Bring the run's counters and sums up to date; reads the device once."""
        if self.prepared is not None:
            self.prepared.counters.flush()

    def reset_sums(self) -> None:
        """Begin the sums and counts of another epoch."""
        super().reset_sums()
        if self.prepared is not None:
            self.prepared.counters.reset_sums()

    def forget(self) -> None:
        """Give up graphs, tables and copies, as the run's tensors are replaced."""
        self._wait_for_replays()
        self.prepared = None
        self.warmed.clear()
        self.captured.clear()
        self.skip = None

    def backward(
        self, total: Tensor, further: Mapping[str, Tensor], parameters: Sequence[Tensor]
    ) -> None:
        """Add the gradients of all losses in one way back; see :meth:`Engine.backward`."""
        self.prepare().backward(total, further, parameters)

    @property
    def selectors(self) -> Selectors:
        """Memory and tables of the selections, which the captured steps use."""
        return self.prepare().update.selectors

    def mask(self, parameters: Sequence[Tensor], selection: Selection) -> None:
        """Let the update mask by ``selection``; ``.grad`` stays as it is."""
        self.prepare().update.mask(parameters, selection)

    def number(self, name: str, function: Callable[[Run], float]) -> Tensor:
        """Return a 0-d float64 tensor that holds ``function(run)`` in each step."""
        return self.prepare().numbers.get(name, function)

    @property
    def step_number(self) -> Tensor:
        """The 0-based step under way, 0-d int64 on the device."""
        return self.prepare().numbers.step


def obstacle_in(error: Exception) -> str | None:
    """Return why the eager engine has to take over, or None for an error that it would have too."""
    if isinstance(error, UnsupportedLossError):
        return str(error)
    if is_out_of_memory(error):
        return "a step did not fit into memory, and it takes whole batches"
    return None
