"""What each feature of the fast engine gains: CURE's step with all of them, and without each."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import get_args

from bench.gpu.engines import Case, build, open_loader
from bench.gpu.estimates import build_seconds
from bench.gpu.plan import Plan
from bench.gpu.record import Record
from bench.gpu.robin import Contender, RoundRobin
from bench.gpu.steps import COLUMNS, TEXT, start, step_figures
from cure_fast.config import EngineFeature

MODEL, METHOD = "resnet18", "cure"
ALL = "all features"


def measure_ablation(plan: Plan, record: Record) -> None:
    """Measure the step with all features, and with each of them off in turn."""
    start(plan, record)
    batch, model = plan.sizes.batch, plan.sizes.network(MODEL)
    figures = step_figures(plan, record.about["bf16_flops"], model)
    with tempfile.TemporaryDirectory() as cache:
        loader = open_loader(plan, batch, cache=Path(cache))
        contenders = []
        for without in ((), *((feature,) for feature in get_args(EngineFeature))):
            engine = f"without {without[0]}" if without else ALL
            case = Case(model, METHOD, "fast", batch, without)
            contenders.append(
                Contender(
                    {"model": model, "method": METHOD, "engine": engine, "batch": batch},
                    partial(build, case, plan, loader),
                    kind="fast",
                    figures=figures,
                    expected=build_seconds(MODEL, "fast", first=True) if plan.on_gpu else 0.0,
                )
            )
        RoundRobin(plan, record).measure(contenders, plan.left)
    record.columns = (*COLUMNS, ("gain", "gain of the feature, x", 1.0))
    record.text = f"{TEXT}\n\n*Gain*: the step's time without the feature over that with all."
    add_gains(record)


def add_gains(record: Record) -> None:
    """Give each row the step's time over that with all features, where both took turns."""
    whole = [row for row in record.rows if row.key["engine"] == ALL and row.rounds]
    for row in record.rows:
        if row.rounds and whole and row.together == whole[0].together:
            row.figures["gain"] = row.median / whole[0].median
