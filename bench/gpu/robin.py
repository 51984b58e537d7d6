"""Figures that are compared are taken in turns: round by round, each contender a few steps.

A round robin holds as many contenders as fit into memory at once; what does not fit waits for the
next one. Before it is timed, each contender is built, warmed up, and its memory is noted.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage]
from torch.profiler import ProfilerActivity, profile

from bench.device_timing import rounds_within
from bench.gpu.engines import BatchCutError, Work
from bench.gpu.plan import Plan
from bench.gpu.record import Record, Row, reason
from cure_fast.errors import MemoryExhaustedError, is_out_of_memory

# Seconds that a contender's turn should take.
TURN = 0.1
# Seconds that building and warming up take, where no contender of its kind was built yet.
FIRST_BUILD = 5.0
# What waits is left more than it needs by estimate, as rounds may take longer than theirs.
MARGIN = 1.2
# Seconds that counting a contender's kernels takes.
COUNTING = 1.5


@dataclass(eq=False)
class Contender:
    """What takes part in a round robin.

    Attributes:
        key: of its row.
        build: makes its step.
        kind: contenders of one kind take about as long to build.
        figures: from a Row with rounds to further figures.
        expected: seconds that building the first of its kind takes.
        turn: seconds that a turn takes, by estimate.
        fed: it waits for a loader, so that a turn takes more steps and counts by its mean one.
        alone: whether it takes turns with nobody, as it runs out of memory beside others.
    """

    key: dict[str, str | int]
    build: Callable[[], Work]
    kind: str = ""
    figures: Callable[[Row], dict[str, float | None]] = lambda row: {}
    expected: float = FIRST_BUILD
    turn: float = 0.0
    fed: bool = False
    alone: bool = False


@dataclass(eq=False)
class Entry:
    """A contender that is built.

    Attributes:
        contender: who it is.
        work: its step.
        one: seconds of a step, roughly.
        count: timed steps of a turn.
        settling: steps of a turn before the timed ones.
        figures: what is known of it: ``peak_bytes``, ``held_bytes``, ``launches``.
        rounds: seconds of a step, one figure per round.
        retries: how often memory had to be collected anew within timed steps.
        notes: what to know about the figures.
    """

    contender: Contender
    work: Work
    one: float
    count: int
    settling: int
    figures: dict[str, float | None]
    rounds: list[float] = field(default_factory=list)
    retries: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def turn(self) -> float:
        """Seconds of a turn, roughly."""
        return (self.count + self.settling) * self.one


@dataclass
class RoundRobin:
    """Measures contenders within a time.

    Attributes:
        plan: device, sizes, time.
        record: receives the rows.
        built: seconds that the last build of each kind took.
        number: of round robins so far.
    """

    plan: Plan
    record: Record
    built: dict[str, float] = field(default_factory=dict)
    number: int = 0

    def measure(self, contenders: Sequence[Contender], seconds: float) -> None:
        """Measure the contenders in ``seconds``; what finds no time is recorded as left out."""
        deadline = time.monotonic() + seconds
        waiting = list(contenders)
        while waiting:
            self.number += 1
            entries: list[Entry] = []
            try:
                waiting = self._gather(waiting, entries, deadline)
                entries = self._fitting(entries, deadline)
                rounds_end = deadline - MARGIN * sum(map(self._needed, waiting))
                waiting = self._rounds(entries, rounds_end) + waiting
                self._count_launches(entries)
            finally:
                # Also after Ctrl-C: the rounds that were taken are worth keeping.
                for entry in entries:
                    self._report(entry)
                entries.clear()
                self._free()
                self.record.write(self.plan.out)

    def _gather(
        self, waiting: list[Contender], entries: list[Entry], deadline: float
    ) -> list[Contender]:
        """Build contenders into ``entries`` for as long as they fit; return those who wait."""
        for place, contender in enumerate(waiting):
            if entries and (contender.alone or entries[0].contender.alone):
                return waiting[place:]
            left = deadline - time.monotonic()
            needed = self._needed(contender)
            needed += self.plan.sizes.rounds[0] * sum(entry.turn for entry in entries)
            if needed > left:
                self._leave_out(contender, f"no time: it takes {needed:.0f} s, {left:.0f} are left")
                continue
            try:
                entries.append(self._prepare(contender))
                continue
            except Exception as error:
                full, why = lacks_memory(error), reason(error)
            # Outside the handler, whose traceback holds the tensors of the failed try.
            self._free()
            if full and entries:
                return waiting[place:]
            self._give_up(contender, full, why)
        return []

    def _needed(self, contender: Contender) -> float:
        """Return the seconds that a contender takes with the least rounds, by what is known."""
        build = self.built.get(contender.kind, contender.expected)
        return build + self.plan.sizes.rounds[0] * contender.turn

    def _prepare(self, contender: Contender) -> Entry:
        """Build a contender, warm it up, and note its memory and the time of a step."""
        began = time.monotonic()
        memory = Memory(self.plan)
        work = contender.build()
        sizes = self.plan.sizes
        for _ in range(sizes.warmups - 2):
            work.step()
        one = min(step_times(work, 2, self.plan))
        work.check()
        figures = memory.figures()
        self.built[contender.kind] = time.monotonic() - began
        count, settling = turn_steps(one, self.plan, fed=contender.fed)
        return Entry(contender, work, one, count, settling, figures)

    def _fitting(self, entries: list[Entry], deadline: float) -> list[Entry]:
        """Leave out what would not get its rounds in time, the last first; return the others."""
        entries = list(entries)
        least = self.plan.sizes.rounds[0]
        while entries:
            needed = least * sum(entry.turn for entry in entries)
            left = deadline - time.monotonic()
            if needed <= left:
                break
            last = entries.pop()
            self._leave_out(
                last.contender,
                f"no time: {least} rounds take {needed:.0f} s, {max(0, left):.0f} are left",
            )
        return entries

    def _rounds(self, entries: list[Entry], deadline: float) -> list[Contender]:
        """Take rounds in turns; return who ran out of memory and has to be alone."""
        least, most = self.plan.sizes.rounds
        turn = sum(entry.turn for entry in entries)
        # Kernels are counted behind the rounds, within the same time.
        deadline -= COUNTING * len(entries) if self.plan.on_gpu else 0
        rounds = rounds_within(deadline - time.monotonic(), turn, most=most, least=least)
        again = []
        for number in range(rounds):
            if number >= least and time.monotonic() > deadline:
                break
            # Nobody always comes after the same one.
            shift = number % max(1, len(entries))
            for entry in entries[shift:] + entries[:shift]:
                try:
                    self._take_turn(entry)
                    continue
                except Exception as error:
                    full, why = lacks_memory(error), reason(error)
                crowded = full and len(entries) > 1
                entries.remove(entry)
                entry.work = Work(lambda: None)
                self._free()
                if crowded:
                    entry.contender.alone = True
                    again.append(entry.contender)
                else:
                    self._give_up(entry.contender, full, why)
        return again

    def _take_turn(self, entry: Entry) -> None:
        for _ in range(entry.settling):
            entry.work.step()
        before = allocation_retries(self.plan)
        times = step_times(entry.work, entry.count, self.plan)
        entry.work.check()
        entry.retries += allocation_retries(self.plan) - before
        typical = statistics.fmean if entry.contender.fed else statistics.median
        entry.rounds.append(typical(times))

    def _count_launches(self, entries: Sequence[Entry]) -> None:
        """Count kernels last: a profiler may slow down what comes after it."""
        for entry in entries if self.plan.on_gpu else ():
            try:
                entry.figures["launches"] = kernel_launches(entry.work)
            except Exception as error:
                entry.notes.append(f"launches not counted: {reason(error)}")

    def _report(self, entry: Entry) -> None:
        contender = entry.contender
        if not entry.rounds:
            self._leave_out(contender, "interrupted before its first round")
            return
        notes = entry.notes
        if len(entry.rounds) < self.plan.sizes.rounds[0]:
            notes.append(f"interrupted after {len(entry.rounds)} rounds")
        if entry.retries:
            notes.append(f"memory was collected anew {entry.retries} times within timed steps")
        row = Row(
            contender.key,
            note="; ".join(notes),
            rounds=tuple(entry.rounds),
            figures=entry.figures,
            together=self.number,
        )
        row.figures.update(contender.figures(row))
        self.record.add(row)

    def _leave_out(self, contender: Contender, note: str) -> None:
        self.record.add(Row(contender.key, "left out", note))

    def _give_up(self, contender: Contender, full: bool, why: str) -> None:
        if full:
            self._leave_out(contender, f"no memory, even alone: {why}")
        else:
            self.record.add(Row(contender.key, "failed", why))

    def _free(self) -> None:
        gc.collect()
        if self.plan.on_gpu:
            torch.cuda.empty_cache()


def turn_steps(one: float, plan: Plan, *, fed: bool = False) -> tuple[int, int]:
    """Return the timed steps of a turn, and those before them, of a step that takes ``one`` s."""
    sizes = plan.sizes
    least, most = sizes.fed_steps if fed else sizes.steps
    settling = sizes.fed_settling if fed else sizes.settling
    return rounds_within(TURN, one, most=most, least=least), settling


def lacks_memory(error: BaseException) -> bool:
    """Return whether the error says that memory ran out, or that an engine worked around that."""
    return is_out_of_memory(error) or isinstance(error, (BatchCutError, MemoryExhaustedError))


def step_times(work: Work, count: int, plan: Plan) -> list[float]:
    """Return the seconds of each of ``count`` steps that follow one another.

    On a GPU they are the times between events, so a step's launches count where they hold it up.
    """
    if not plan.on_gpu:
        marks = [time.perf_counter()]
        for _ in range(count):
            work.step()
            marks.append(time.perf_counter())
        return [after - before for before, after in pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        work.step()
        event.record()
    events[-1].synchronize()
    return [before.elapsed_time(after) / 1e3 for before, after in pairwise(events)]


def kernel_launches(work: Work) -> int:
    """Return how many kernels run on the GPU in one step, those inside of CUDA graphs too."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work.step()
        torch.cuda.synchronize()
    return sum(is_kernel(event) for event in profiler.events() or ())


def is_kernel(event: object) -> bool:
    """Return whether a profiler's event is a kernel, and not a copy, a fill or a label."""
    name = str(getattr(event, "name", ""))
    on_gpu = getattr(event, "device_type", None) == DeviceType.CUDA
    label = getattr(event, "is_user_annotation", False)
    return on_gpu and not label and not name.startswith(("Memcpy", "Memset"))


def allocation_retries(plan: Plan) -> int:
    """Return how often torch has given cached memory back to have enough for a request."""
    if not plan.on_gpu:
        return 0
    return int(torch.cuda.memory_stats(plan.device).get("num_alloc_retries", 0))


class Memory:
    """The memory that one contender takes on the GPU, whatever else is there.

    Args:
        plan: the device; on a CPU nothing is known.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        if plan.on_gpu:
            gc.collect()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(plan.device)
            self.allocated = torch.cuda.memory_allocated(plan.device)
            self.reserved = torch.cuda.memory_reserved(plan.device)

    def figures(self) -> dict[str, float | None]:
        """Return the bytes at the peak, and those that stay reserved between its steps."""
        if not self.plan.on_gpu:
            return {"peak_bytes": None, "held_bytes": None}
        peak = torch.cuda.max_memory_allocated(self.plan.device) - self.allocated
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        held = torch.cuda.memory_reserved(self.plan.device) - self.reserved
        return {"peak_bytes": float(peak), "held_bytes": float(held)}
