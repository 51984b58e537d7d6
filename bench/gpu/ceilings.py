"""What the device can do: copies, matrix products and the convolutions of the networks."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.capture import captured
from bench.device_timing import (
    COPY_BYTES,
    COPY_BYTES_ON_CPU,
    DeviceTimer,
    copy_bandwidth,
    rounds_within,
)
from bench.gpu.engines import Work
from bench.gpu.plan import Plan
from bench.gpu.record import Record, Row, reason
from bench.gpu.robin import lacks_memory, step_times
from cure_fast.models import build_model

NETWORKS = ("resnet18", "wrn34-10")
# Seconds of the timed calls of one row.
BUDGET = 0.2
ROUNDS = (5, 50)
# Least and most calls of a round, and the seconds it should take on a GPU: far more than the host
# takes to launch it.
CALLS, REPLAY = (5, 200), 2e-3
DTYPE = torch.bfloat16

COLUMNS = (("bytes_per_second", "GB/s", 1e-9), ("flops_per_second", "TFLOP/s", 1e-12))
TEXT = """\
Times are of one call among several that follow one another: the median over rounds, with the 20th
and 80th percentile. On a GPU the products and convolutions of a round are replayed from one CUDA
graph, so that none waits for Python; what passes between two kernels of a graph counts. The caches
are warm. The copy counts the bytes read and those written. Products and convolutions are in bf16,
convolutions channels_last, with cuDNN's fastest algorithm; a multiply-add counts as two
operations.\
"""


@dataclass(frozen=True)
class Convolution:
    """The shape of a convolution, but for the batch: square images and filters, no bias."""

    inputs: int
    outputs: int
    filter: int
    stride: int
    padding: int
    side: int

    @property
    def name(self) -> str:
        """Such as ``64>128 3x3/2 at 32``."""
        kind = f"{self.filter}x{self.filter}" + (f"/{self.stride}" if self.stride > 1 else "")
        return f"{self.inputs}>{self.outputs} {kind} at {self.side}"

    def flops(self, batch: int) -> float:
        """Return the operations of a pass, which are the same for all three of them."""
        side = (self.side + 2 * self.padding - self.filter) // self.stride + 1
        return 2.0 * batch * side**2 * self.outputs * self.inputs * self.filter**2


def measure_ceilings(plan: Plan, record: Record) -> None:
    """Measure the copy, the matrix products, and each convolution forward and backward."""
    torch.backends.cudnn.benchmark = True
    record.columns, record.text = COLUMNS, TEXT
    _copy(plan, record)
    for side in plan.sizes.matrices:
        _time(plan, record, {"operation": "matrix product", "shape": f"{side}^3"},
              lambda side=side: matrix_product(plan, side), 2.0 * side**3)  # fmt: skip
    for batch in plan.sizes.convolution_batches:
        for network in map(plan.sizes.network, NETWORKS):
            for shape in convolutions(network, plan):
                for part in ("forward", "to inputs", "to weights"):
                    key = {"network": network, "shape": shape.name, "pass": part, "batch": batch}
                    _time(plan, record, key,
                          lambda s=shape, b=batch, p=part: convolution(plan, s, b, p),
                          shape.flops(batch))  # fmt: skip
        record.write(plan.out)


def _copy(plan: Plan, record: Record) -> None:
    timer = DeviceTimer(plan.device)
    timer.cold = False
    rate = copy_bandwidth(timer)
    size = COPY_BYTES if plan.on_gpu else COPY_BYTES_ON_CPU
    record.add(
        Row(
            {"operation": "copy", "shape": f"{size / 2**20:.0f} MiB"},
            note="median of 20 copies",
            rounds=(2 * size / rate,),
            figures={"bytes_per_second": rate},
        )
    )


def _time(
    plan: Plan,
    record: Record,
    key: dict[str, str | int],
    prepare: Callable[[], Callable[[], Any]],
    flops: float,
) -> None:
    """Time what ``prepare`` returns and record it, or why that cannot be."""
    if plan.left < 2 * BUDGET:
        record.add(Row(key, "left out", "no time is left"))
        return
    try:
        times = call_times(prepare(), plan)
    except Exception as error:
        full = lacks_memory(error)
        record.add(Row(key, "left out" if full else "failed", reason(error)))
        return
    rate = flops / statistics.median(times)
    record.add(Row(key, rounds=tuple(times), figures={"flops_per_second": rate}))


def call_times(call: Callable[[], Any], plan: Plan) -> list[float]:
    """Return the seconds of one call, a figure per round of several.

    Raises:
        RuntimeError: on a GPU, for a call that a CUDA graph cannot hold.
    """
    call()
    count, most = CALLS
    if plan.on_gpu:
        one = min(step_times(Work(call), 2, plan))
        count = rounds_within(REPLAY, one, most=most, least=count)
    calls = repeated(call, count)
    work = Work(captured(calls) if plan.on_gpu else calls)
    one = min(step_times(work, 2, plan))
    least, most = ROUNDS
    rounds = rounds_within(BUDGET, one, most=most, least=least) if plan.on_gpu else 2
    return [seconds / count for seconds in step_times(work, rounds, plan)]


def repeated(call: Callable[[], Any], count: int) -> Callable[[], None]:
    """Return what makes ``count`` calls; the results of each are let go before the next."""

    def calls() -> None:
        for _ in range(count):
            call()

    return calls


def matrix_product(plan: Plan, side: int) -> Callable[[], Tensor]:
    """Return a product of two square matrices of this side."""
    generator = torch.Generator(plan.device).manual_seed(0)
    left, right = (
        torch.randn(side, side, generator=generator, device=plan.device).to(DTYPE) for _ in range(2)
    )
    target = torch.empty_like(left)
    return lambda: torch.mm(left, right, out=target)


def matrix_rate(plan: Plan) -> float:
    """Return the highest rate of the matrix products, operations per second."""
    rates = []
    for side in plan.sizes.matrices:
        times = call_times(matrix_product(plan, side), plan)
        rates.append(2.0 * side**3 / statistics.median(times))
    return max(rates)


def convolutions(network: str, plan: Plan) -> Iterator[Convolution]:
    """Yield the distinct shapes of a network's convolutions in their order."""
    sizes = plan.sizes
    model = build_model(network, num_classes=10, width=sizes.widths.get(network)).eval()
    image = torch.zeros(1, 3, sizes.image, sizes.image)
    found: list[Convolution] = []

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(layer, nn.Conv2d) and isinstance(layer.padding, tuple)
        assert layer.bias is None and layer.groups == 1
        shape = (layer.in_channels, layer.out_channels, layer.kernel_size[0], layer.stride[0])
        found.append(Convolution(*shape, layer.padding[0], inputs[0].shape[-1]))

    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(note)
    with torch.no_grad():
        model(image)
    yield from dict.fromkeys(found)


def convolution(plan: Plan, shape: Convolution, batch: int, part: str) -> Callable[[], Any]:
    """Return one pass of a convolution: ``forward``, ``to inputs`` or ``to weights``."""
    generator = torch.Generator(plan.device).manual_seed(0)

    def tensor(*size: int) -> Tensor:
        values = torch.randn(size, generator=generator, device=plan.device).to(DTYPE)
        return values.contiguous(memory_format=torch.channels_last)

    x = tensor(batch, shape.inputs, shape.side, shape.side)
    weight = tensor(shape.outputs, shape.inputs, shape.filter, shape.filter)
    stride, padding = [shape.stride] * 2, [shape.padding] * 2
    if part == "forward":
        return lambda: torch.nn.functional.conv2d(x, weight, None, stride, padding)
    slope = torch.randn_like(torch.nn.functional.conv2d(x, weight, None, stride, padding))
    wanted = [part == "to inputs", part == "to weights", False]

    def backward() -> Any:
        return torch.ops.aten.convolution_backward(
            slope, x, weight, None, stride, padding, [1, 1], False, [0, 0], 1, wanted
        )

    return backward
