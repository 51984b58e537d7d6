"""The fast engine fed in three ways: by FFCV, from images that lie on the device, and not at all.

Natural training asks for most images a second, so there a feed that is too slow shows first.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

from bench.gpu.engines import Case, Work, check_run, first_batch, open_loader, open_run
from bench.gpu.estimates import build_seconds
from bench.gpu.plan import Plan
from bench.gpu.record import Record, Row
from bench.gpu.robin import Contender, RoundRobin
from bench.gpu.steps import COLUMNS, TEXT, start, step_figures
from cure_fast.batch import Batch
from cure_fast.loaders import Loader
from cure_fast.loaders.ffcv_reader import ffcv_problem
from cure_fast.step.state import TrainState
from cure_fast.training.trainer import next_step

MODEL, METHODS = "resnet18", ("natural", "cure")
FEEDS = ("ffcv", "resident", "static")


def measure_feeds(plan: Plan, record: Record) -> None:
    """Measure the steps of one run per method, each fed in all ways in turns."""
    start(plan, record)
    record.text = (
        f"{TEXT}\n\nHere a step's time includes the wait for its batch, a round counts by its mean "
        "step, and the feeds of a method feed one and the same run. *Static*: one batch, again and "
        "again."
    )
    # The run's memory is the same for all.
    record.columns = [column for column in COLUMNS if not column[0].endswith("_bytes")]
    robin = RoundRobin(plan, record)
    for place, method in enumerate(METHODS):
        with ExitStack() as opened:
            cache = Path(opened.enter_context(tempfile.TemporaryDirectory()))
            contenders = open_feeds(plan, record, method, cache, opened)
            robin.measure(contenders, plan.left / (len(METHODS) - place))


def open_feeds(
    plan: Plan, record: Record, method: str, cache: Path, opened: ExitStack
) -> list[Contender]:
    """Return a contender per feed; what they open is closed with ``opened``."""
    batch, model = plan.sizes.batch, plan.sizes.network(MODEL)
    case = Case(model, method, "fast", batch)
    figures = step_figures(plan, record.about["bf16_flops"], model)
    shared: list[TrainState] = []

    def run() -> TrainState:
        if not shared:
            shared.append(open_run(case, plan, open_loader(plan, batch, cache=cache)))
        return shared[0]

    contenders = []
    for feed in FEEDS:
        key: dict[str, str | int] = {"model": model, "method": method, "feed": feed, "batch": batch}
        if feed == "ffcv" and (problem := ffcv_problem()):
            record.add(Row(key, "left out", problem))
            continue
        contenders.append(
            Contender(
                key,
                partial(feeding, case, feed, run, plan, cache, opened),
                kind=f"{method} fast",
                figures=figures,
                expected=build_seconds(MODEL, "fast", first=True) if plan.on_gpu else 0.0,
                fed=True,
            )
        )
    return contenders


def feeding(
    case: Case, feed: str, run: Callable[[], TrainState], plan: Plan, cache: Path, opened: ExitStack
) -> Work:
    """Return steps of the run that wait for the batches of a feed."""
    kind = "resident" if feed == "static" else feed
    loader = open_loader(plan, case.batch, kind=kind, cache=cache)
    if feed == "static":
        batches: Iterator[Batch] = itertools.repeat(first_batch(loader))
    else:
        batches = opened.enter_context(closing(endless(loader, case.batch)))
    fed = run()

    def step() -> None:
        next_step(fed, next(batches))

    return Work(step, lambda: check_run(fed, case))


def endless(loader: Loader, size: int) -> Generator[Batch]:
    """Yield the whole batches of one epoch after another."""
    epoch = 0
    while True:
        with loader.epoch(epoch) as batches:
            yield from (batch for batch in batches if len(batch) == size)
        epoch += 1
