"""Training steps: methods by engines by batch sizes, for one model."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.gpu.ceilings import matrix_rate
from bench.gpu.engines import Case, build, open_loader
from bench.gpu.plan import ENGINES, EPOCH_IMAGES, METHODS, MODELS, Plan, passes
from bench.gpu.record import Record, Row
from bench.gpu.robin import Contender, RoundRobin
from cure_fast.models import build_model

# Seconds that building the first contender of an engine takes on a GPU; what compiles, compiles
# several graphs.
FIRST_BUILDS = {"fast": 30.0, "eager+compile": 60.0}

COLUMNS = (
    ("steps_per_second", "steps/s", 1.0),
    ("images_per_second", "images/s", 1.0),
    ("epoch_seconds", "s/epoch", 1.0),
    ("peak_bytes", "peak GB", 1e-9),
    ("held_bytes", "held GB", 1e-9),
    ("launches", "kernels/step", 1.0),
    ("share", "% of bf16 ceiling", 100.0),
)

Figures = Callable[[Row], dict[str, float | None]]

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


def measure_steps(plan: Plan, record: Record) -> None:
    """Measure all steps of the part's model, batch size by batch size."""
    methods = plan.sizes.methods.get(MODELS[record.part], METHODS)
    model = plan.sizes.network(MODELS[record.part])
    start(plan, record)
    robin = RoundRobin(plan, record)
    figures = step_figures(plan, record.about["bf16_flops"], model)
    sizes = plan.sizes
    with tempfile.TemporaryDirectory() as cache:
        for place, batch in enumerate(sizes.batches):
            loader = open_loader(plan, batch, cache=Path(cache))
            contenders = []
            for method in methods:
                for engine in ENGINES:
                    case = Case(model, method, engine, batch)
                    contenders.append(
                        Contender(
                            {"model": model, "method": method, "engine": engine, "batch": batch},
                            partial(build, case, plan, loader),
                            kind=engine,
                            figures=figures,
                            expected=FIRST_BUILDS.get(engine, 5.0) if plan.on_gpu else 0.0,
                        )
                    )
            share = sizes.shares[place] / sum(sizes.shares[place:])
            robin.measure(contenders, plan.left * share)
            # Compiled code of this batch size is of no further use.
            torch.compiler.reset()


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
