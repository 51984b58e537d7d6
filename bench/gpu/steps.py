"""Training steps: methods by engines, for one model and batch size."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.gpu.ceilings import matrix_rate
from bench.gpu.engines import Case, build, open_loader
from bench.gpu.estimates import build_seconds, fitting, step_seconds
from bench.gpu.plan import EPOCH_IMAGES, METHODS, ORDER, STEP_PARTS, Plan, passes
from bench.gpu.record import Record, Row
from bench.gpu.robin import Contender, RoundRobin, turn_steps
from cure_fast.models import build_model

COLUMNS = (
    ("steps_per_second", "steps/s", 1.0),
    ("images_per_second", "images/s", 1.0),
    ("epoch_seconds", "s/epoch", 1.0),
    ("peak_bytes", "peak GB", 1e-9),
    ("held_bytes", "held GB", 1e-9),
    ("launches", "kernels/step", 1.0),
    ("share", "% of bf16 ceiling", 100.0),
)

TEXT = """\
Times are of one training step on a batch that stays the same: the median over rounds of each
round's median, with the 20th and 80th percentile. Rows with the same number under *turns* were
measured in turns, so that they compare; others compare less well. An epoch has 50,000 images.
*Peak* is the most that torch had allocated at once for this row, building and trying out algorithms
included; *held* is what stays reserved between steps. *Kernels* are those that ran on the GPU in
one step, in CUDA graphs too, without copies and fills. The *ceiling* is the measured rate of
matrix products in bf16; its share counts the passes over the network that the method needs at
least (natural 3, PGD-AT 23, TRADES 27, CURE 33 at 10 attack steps), whatever an engine computes.\
"""
ENGINES_TEXT = """
*fast* and *eager* are this project's engines, the latter plain PyTorch under autocast but for the
kernels of the attack's step, selection, mask and averages, which it shares with *fast*.
*eager+compile* is the eager engine with torch.compile in its default mode for each network;
*eager+reduce-overhead* has that mode instead, which replays the compiled parts as CUDA graphs, and
is measured for CURE alone. *authors* computes as the public code does: float32 with TF32
convolutions, NCHW, a backward sweep per loss, NumPy's percentile.\
"""


def measure_steps(plan: Plan, record: Record) -> None:
    """Measure all steps of the part's model and batch size in turns, the most important first."""
    model, published = STEP_PARTS[record.part]
    network, batch = plan.sizes.network(model), plan.sizes.batches.get(published, published)
    methods = plan.sizes.methods.get(record.part, METHODS)
    start(plan, record)
    record.text += "\n" + ENGINES_TEXT
    figures = step_figures(plan, record.about["bf16_flops"], network)
    flops = forward_flops(network, plan)
    fits: Sequence[tuple[str, str]] = ORDER
    if plan.on_gpu:
        fits, needed = fitting(record.part, plan, flops)
        record.about["planned_seconds"] = round(needed)
        print(f"{record.part}: {len(fits)} of {len(ORDER)} rows in {needed:.0f} s by estimate")
    with tempfile.TemporaryDirectory() as cache:
        loader = open_loader(plan, batch, cache=Path(cache))
        contenders = []
        # What does not fit by estimate comes last, for the time that is left after all.
        for method, engine in [*fits, *(each for each in ORDER if each not in fits)]:
            if method not in methods:
                continue
            case = Case(network, method, engine, batch)
            first, turn = expected(model, case, plan, flops) if plan.on_gpu else (0.0, 0.0)
            contenders.append(
                Contender(
                    {"model": network, "method": method, "engine": engine, "batch": batch},
                    partial(build, case, plan, loader),
                    kind=engine,
                    figures=figures,
                    expected=first,
                    turn=turn,
                )
            )
        RoundRobin(plan, record).measure(contenders, plan.left)


def expected(model: str, case: Case, plan: Plan, flops: float) -> tuple[float, float]:
    """Return the seconds that the engine's first build and a turn of it take by estimate."""
    one = step_seconds(model, case.method, case.engine, case.batch, flops)
    first = build_seconds(model, case.engine, first=True)
    return first + plan.sizes.warmups * one, one * sum(turn_steps(one, plan))


def start(plan: Plan, record: Record) -> None:
    """Set what a training job sets, and measure the rate that steps are compared with."""
    torch.backends.cudnn.benchmark = True
    record.columns, record.text = COLUMNS, TEXT
    record.about["bf16_flops"] = matrix_rate(plan)


def step_figures(
    plan: Plan, ceiling: float, model: str
) -> Callable[[Row], dict[str, float | None]]:
    """Return the function that gives a row of this model its further figures.

    Args:
        plan: shapes of the network and the attack.
        ceiling: rate of matrix products, operations per second.
        model: which network.
    """
    forward = forward_flops(model, plan)

    def figures(row: Row) -> dict[str, float | None]:
        method, batch = str(row.key["method"]), int(row.key["batch"])
        work = forward * passes(method, plan.sizes.attack_steps) * batch
        return {
            "steps_per_second": 1 / row.median,
            "images_per_second": batch / row.median,
            "epoch_seconds": EPOCH_IMAGES / batch * row.median,
            "share": work / row.median / ceiling,
        }

    return figures


def forward_flops(model: str, plan: Plan) -> float:
    """Return the operations of one forward pass over one image, a multiply-add being two."""
    width, side = plan.sizes.widths.get(model), plan.sizes.image
    # On the CPU: torch's decompositions of BatchNorm, once imported, fail without a real device.
    network = build_model(model, num_classes=10, width=width).eval()
    image = torch.zeros(1, 3, side, side)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(image)
    return float(counter.get_total_flops())
