"""The fast engine: a whole step in one CUDA graph of few, fused operations.

docs/engine.md lists its parts, each of which ``--engine-without`` switches off. Whether a step is
finite is decided on the device, and statistics are taken back there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cure_fast import distributed
from cure_fast.batch import Batch, weighed
from cure_fast.config import EngineFeature
from cure_fast.console import warn
from cure_fast.errors import is_out_of_memory
from cure_fast.kernels import Selection
from cure_fast.step.run import Terms
from cure_fast.step.state import TrainState
from cure_fast.step.train_step import no_memory_for_update

from .cuda_graph import CapturedStep
from .eager import Engine
from .prepared import Kind, Prepared, kind_of
from .recorded import RecordingError, failed_features
from .selector import Selectors

# Steps of a kind that are computed before one is captured: libraries choose algorithms in the
# first, and tables of addresses settle in the second.
WARM_UP = 3
COMPILED = ("compile", "compile-loss")
# On a CPU a loss is not recorded either: fewer launches gain nothing there.
ON_GPU = ("graph", "stack", *COMPILED)
# What several processes add up in the middle of a loss is in no recorded one.
ALONE = ("stack", *COMPILED)


class FastEngine(Engine):
    """Computes the steps of a run on the device alone, and replays them as CUDA graphs."""

    name = "fast"

    def __init__(self, run: TrainState) -> None:
        super().__init__(run)
        self.without = set(run.config.run.engine_without)
        self.selectors = Selectors(fused=self.has("fuse"))
        self.prepared: Prepared | None = None
        self.warmed: dict[Kind, int] = {}
        self.captured: dict[Kind, CapturedStep] = {}

    @property
    def description(self) -> str:
        """What rows and reports call it, with what it goes without."""
        without = f" without {', '.join(sorted(self.without))}" if self.without else ""
        return f"{self.name}{without}"

    def has(self, feature: str) -> bool:
        """Return whether a feature is on; some need a GPU, some a process by itself."""
        missing = [] if self.run.device.type == "cuda" else [*ON_GPU]
        missing += ALONE if distributed.processes() > 1 else ()
        return feature not in self.without and feature not in missing

    def step(self, batch: Batch) -> Terms | None:
        """Train on one batch; return its terms, which the next step overwrites.

        Only a step that is logged is looked at: there None stands for terms that are not finite,
        and too many such steps in a row raise :class:`DivergedError`. Where the passes do not fit
        into memory, the eager engine takes over.
        """
        prepared = self.prepare()
        prepared.numbers.send()
        try:
            terms = self._computed(prepared, batch)
        except Exception as error:
            features = failed_features(error)
            if not self.without.issuperset(features) and not prepared.updating:
                prepared.restore()
                return self._do_without(features, error).step(batch)
            if not is_out_of_memory(error):
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
        eager = self.give_up("a step did not fit into memory, and it takes whole batches")
        return eager.step(batch)

    def prepare(self) -> Prepared:
        """Return what steps need, made for the run's tensors as they are now."""
        if self.prepared is None:
            self.prepared = Prepared(self.run, self.has)
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

    def _do_without(self, features: Sequence[EngineFeature], error: Exception) -> FastEngine:
        """Leave out what cannot be computed here, and say why."""
        graphless = isinstance(error, RecordingError)
        what = "the loss has no graph" if graphless else "torch.compile failed"
        # The first line names what failed, the second says why.
        reason = " ".join(str(error).strip().split("\n")[:2])
        warn(f"the fast engine goes on without {' and '.join(features)}, as {what}: {reason}")
        self.flush()
        self.without.update(features)
        self.forget()
        return self

    def _computed(self, prepared: Prepared, batch: Batch) -> Terms:
        """Replay the step, or compute it until it has been seen often enough to capture it."""
        run = self.run
        key = kind_of(run, batch)
        if key in self.captured:
            return self.captured[key].replay(batch)
        seen = self.warmed.get(key, 0)
        prepared.undo.keep()
        # The last batch of an epoch may be smaller: a graph for one step would hold its memory.
        regular = batch.whole == self.run.loader.batch_size
        if self.has("graph") and regular and seen >= WARM_UP:
            self._drop_graphs_of_fewer_attack_steps()
            try:
                captured = CapturedStep(prepared.compute, batch, self.run.generators.values())
            except RuntimeError as error:
                prepared.clear()
                if is_out_of_memory(error) or failed_features(error):
                    raise
                self.without.add("graph")
                # Former graphs draw from the random sources as they were before the failure.
                self.captured.clear()
                reason = str(error).split("\n")[0]
                warn(f"the fast engine runs without a CUDA graph, as the step has none: {reason}")
            else:
                self.captured[key] = captured
                return captured.replay(batch)
        self.warmed[key] = seen + 1
        return prepared.compute(batch)

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
        self.prepared = self.skip = None
        self.selectors = Selectors(fused=self.has("fuse"))
        self.warmed.clear()
        self.captured.clear()

    def gradients(self, batch: Batch, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Return the gradients of the method's total; statistics stay as they are."""
        return self.prepare().gradients(batch, parameters)

    def weights_moved(self) -> None:
        """Write the half-precision copies anew."""
        if self.prepared is not None:
            for copies in self.prepared.moving:
                copies.refresh()

    def derive(self, term: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Return the gradients of a term; its passes can be used again."""
        grads = self.prepare().loss.within(weighed(term, self.run.part), parameters)
        distributed.sum_(grads)
        return grads

    def mask(self, parameters: Sequence[Tensor], selection: Selection) -> None:
        """Let the update mask by ``selection``; ``.grad`` stays, unless its norm is asked for."""
        if self.run.config.optim.clip_grad is not None:
            super().mask(parameters, selection)
            return
        self.prepare().update.mask(parameters, selection)

    def number(self, name: str, function: Callable[[TrainState], float]) -> Tensor:
        """Return a 0-d float64 tensor that holds ``function(run)`` in each step."""
        prepared = self.prepare()
        # What a loss that is being recorded asks for is sent when it has been.
        return prepared.numbers.get(name, function, send=not prepared.loss.leaves)

    @property
    def step_number(self) -> Tensor:
        """The 0-based step under way, 0-d int64 on the device."""
        return self.prepare().numbers.step
