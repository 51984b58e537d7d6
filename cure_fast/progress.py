"""Progress of a whole job: what is done, how long it took, and what the rest will take.

Work is counted in passes: a forward pass of one image is 1, a backward pass to the image 1, one to
the weights too 2. Seconds per pass are measured as the job runs, and what comes between two rounds
of a part, such as saving, by the round. What has not begun yet is taken to cost per pass what the
last part of its kind did, and AutoAttack what other attacks do. Training of few passes per image,
such as natural training, is no measure of training of many: what an image takes beside its passes
(loading, update) is told apart by a trial of passes alone, see :attr:`Progress.paces`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from cure_fast.console import keep, say

# A call on fewer images takes about as long as on these: on small networks 1 took as long as 60.
FEW = 32
# Seconds after which a plain line says how far the job is, where nothing else was printed.
QUIET_S = 60.0
# Steps, and seconds, of which the first estimate of the whole job is made.
FIRST_STEPS, FIRST_S = 5, 1.0


@dataclass
class Part:
    """A part of a job: rounds over the same number of images, such as epochs.

    Attributes:
        kind: parts of a kind cost about the same per pass.
        costs: passes per image in each round.
        images: images of a round.
        stage: 1-based number of the stage that the part belongs to.
        bound: the cost is not known, and this is the most there can be.
        round: 0-based round under way.
        done: passes that are done, those before a resumption and those that fell away too.
        passes: passes that were measured, in so many ``seconds`` and ``steps``, with those of
            images that an attack left out.
        load: those that took the time, where a few images under attack count as :data:`FEW`.
        gaps: pauses before rounds that were measured, of so many ``idle`` seconds in all.
    """

    kind: str
    costs: Sequence[float]
    images: float
    stage: int = 1
    bound: bool = False
    round: int = 0
    done: float = 0.0
    passes: float = 0.0
    load: float = 0.0
    seconds: float = 0.0
    steps: int = 0
    idle: float = 0.0
    gaps: int = 0

    @property
    def left(self) -> float:
        """Passes that are still to do."""
        return max(0.0, self.images * sum(self.costs) - self.done)

    @property
    def gap(self) -> float:
        """Measured seconds before a round, 0 where none was measured."""
        return self.idle / self.gaps if self.gaps else 0.0

    @property
    def per_image(self) -> float:
        """Passes of an image in a round, the mean of those that there are."""
        some = [cost for cost in self.costs if cost]
        return sum(some) / len(some) if some else 1.0

    def seconds_left(self, like: Part, paces: Mapping[str, float]) -> float:
        """Return the seconds it still takes, by another part's measures where it has none.

        ``paces`` are the seconds of a pass alone, where a trial found them.
        """
        rounds = sum(cost > 0 for cost in self.costs[self.round + 1 :]) if self.left else 0
        gap = self.gap or (like.gap if like.kind == self.kind else 0.0)
        if self.load:
            rate = self.seconds / self.passes
        else:
            rate = like.seconds / like.load
            if paces and like.kind == "train":
                beside = max(0.0, rate - paces["train"]) * like.per_image
                one = paces["train"] + beside / self.per_image
                rate = one if self.kind == "train" else paces["attack"]
        return self.left * rate + rounds * gap


class Work:
    """A round of a part that is under way."""

    def __init__(self, progress: Progress, part: Part, cost: float) -> None:
        self.progress, self.part, self.cost = progress, part, cost

    def advance(self, images: float, note: str = "", *, skip: bool = False) -> None:
        """Take note of so many finished images; skipped ones took no time.

        ``note`` is shown behind the title.
        """
        least = FEW if self.part.kind == "attack" else 0
        load = 0.0 if skip else max(images, least) * self.cost
        self.progress.advance(self.part, images * self.cost, load, note)

    def expect(self, passes: float) -> None:
        """Correct what the part still has to do, in passes."""
        self.part.costs, self.part.images = (1.0,), self.part.done + passes


class Progress:
    """The parts of a job, and how long they take; as a context a bar, on terminals alone.

    The bar goes to standard error, so that standard output stays clean for pipes. Where standard
    error is no terminal, a plain line comes each minute in which nothing else was printed.
    """

    def __init__(self) -> None:
        self.parts: dict[str, Part] = {}
        self.stages: list[str] = []
        self.stage = 1
        self.title = ""
        self.started = self.clock = self.told = time.monotonic()
        self.estimated = False
        # The last part of each kind that was measured.
        self.measured: dict[str, Part] = {}
        # Seconds of a pass of one image in training's precision ("train") and in that of
        # evaluation ("attack"), where a trial found them.
        self.paces: dict[str, float] = {}
        self.bar: Any = None
        self.task: Any = None

    def plan(self, name: str, part: Part) -> None:
        """Add a part, unless there is one of that name."""
        self.parts.setdefault(name, part)

    def begin(self, stage: int) -> None:
        """Announce the 1-based stage; those before it are done."""
        self.stage = stage
        for part in self.parts.values():
            if part.stage < stage:
                part.done += part.left
        say(f"{stage} of {len(self.stages)}: {self.stages[stage - 1]}")
        self.told = time.monotonic()

    def expect(self, name: str, passes: float) -> None:
        """Correct what a part that has not begun costs, in passes."""
        if name in self.parts:
            self.parts[name].costs, self.parts[name].images = (1.0,), passes

    def finish(self, name: str) -> None:
        """Take note that nothing is left of a part."""
        if name in self.parts:
            self.parts[name].done += self.parts[name].left
            self.show("")

    @contextmanager
    def work(self, name: str, title: str, *, round: int = 0) -> Iterator[Work]:
        """Yield the 0-based round of a part, to be told what is done; ``title`` is what it is.

        A part that was not planned counts nothing.
        """
        part = self.parts.get(name) or Part("", (), 0)
        cost = part.costs[round] if part.costs else 0.0
        part.done = part.images * sum(part.costs[:round])
        part.round, self.title = round, title
        now = time.monotonic()
        if part.steps:
            part.gaps, part.idle = part.gaps + 1, part.idle + now - self.clock
        self.clock = now
        self.show("")
        yield Work(self, part, cost)

    def advance(self, part: Part, passes: float, load: float, note: str) -> None:
        """Take note of finished passes of a part, and show it; those without load took no time."""
        now = time.monotonic()
        part.done += passes
        if load:
            part.steps += 1
            # The first training step also loads, compiles and fills caches.
            if part.steps > 1 or part.kind != "train":
                part.passes, part.load = part.passes + passes, part.load + load
                part.seconds += now - self.clock
                self.measured[part.kind] = part
        elif part.kind == "attack":
            # As many as in this round will be left out of those to come.
            part.passes += passes
        if load or not part.steps:
            self.clock = now
        self.show(note)
        first = self.stages and not self.estimated
        if first and part.steps > FIRST_STEPS and part.seconds > FIRST_S:
            self.estimated = True
            say(f"time: {self.times()}")
        if now - self.told > QUIET_S:
            line = f"{self.title}{note}  {self.times()}"
            # The bar shows it already.
            (keep if self.bar else say)(line)
            self.told = now

    def line(self, text: str) -> None:
        """Print a line with the times behind it."""
        say(f"{text}  {self.times()}")
        self.told = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds since the job began in this process."""
        return time.monotonic() - self.started

    def seconds_left(self) -> tuple[float, float] | None:
        """Return the seconds that are left, and the most that parts of unknown cost may add.

        None until something was measured.
        """
        any_part = self.measured.get("train") or next(iter([*self.measured.values()]), None)
        if any_part is None:
            return None
        left = [0.0, 0.0]
        # The bar's thread asks too, while parts are added.
        for part in list(self.parts.values()):
            kind = "attack" if part.bound and part.kind not in self.measured else part.kind
            left[part.bound] += part.seconds_left(self.measured.get(kind, any_part), self.paces)
        return left[0], left[1]

    def left(self) -> str:
        """Return the time left in words."""
        known = self.seconds_left()
        if known is None:
            return "time left known soon"
        sure, most = known
        if most < 1:
            return f"{duration(sure)} left"
        if sure < 1:
            return f"AutoAttack up to {duration(most)} more"
        return f"{duration(sure)} left, AutoAttack up to {duration(most)} more"

    def times(self) -> str:
        """Return elapsed and remaining time in words."""
        return f"{duration(self.elapsed)} elapsed, {self.left()}"

    def show(self, note: str) -> None:
        """Bring the bar up to date."""
        if self.bar is None:
            return
        known = self.seconds_left()
        total = self.elapsed + sum(known) if known else 0.0
        share = self.elapsed / total if total else 0.0
        place = f"{self.stage} of {len(self.stages)}  " if len(self.stages) > 1 else ""
        self.bar.update(self.task, completed=share, description=f"{place}{self.title}{note}")

    def __enter__(self) -> Progress:
        """Open the bar, where standard error is a terminal."""
        if sys.stderr is None or not sys.stderr.isatty():
            return self
        from rich import progress as rich
        from rich.console import Console
        from rich.text import Text

        job = self

        class Times(rich.ProgressColumn):
            def render(self, task: rich.Task) -> Text:
                return Text(job.times())

        self.bar = rich.Progress(
            rich.TextColumn("{task.description}", markup=False),
            rich.BarColumn(bar_width=20),
            Times(),
            console=Console(stderr=True),
            refresh_per_second=2,
            transient=True,
            # What is printed meanwhile comes above the bar, where both are the same terminal.
            redirect_stdout=sys.stdout is not None and sys.stdout.isatty(),
        )
        self.task = self.bar.add_task("", total=1.0)
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def duration(seconds: float) -> str:
    """Return a time span in the two largest units that say something."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
