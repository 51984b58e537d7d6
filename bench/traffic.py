"""Bytes that operations must move through a GPU's memory, and bytes that their kernels move.

    python bench/traffic.py --model wrn34-10

The kernels run in Triton's interpreter on small tensors (no GPU is needed), and every load and
store is counted. From two sizes follows what each further element costs, so that tables, counters
and results of fixed size drop out. What an operation must move is each input read once and each
output written once. Atomic additions go to small counters that stay in the cache; they are listed
by number. A stream of bytes at the given bandwidth is a bound, not a measured time: launches take
about 2 us each, and a GPU can find in its cache what an earlier launch of the same step wrote.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from cure_fast.kernels.augment import augment_crop_flip
from cure_fast.kernels.batchnorm import fold_batchnorm
from cure_fast.kernels.ema import ema_update_
from cure_fast.kernels.pgd import Norm, pgd_init, pgd_step_
from cure_fast.kernels.rgp import rgp_mask_, rgp_select
from cure_fast.kernels.update import masked_sgd_
from cure_fast.models import MODELS, build_model

# Assumed where none is given: that of an H200, measured on one.
BANDWIDTH = 4.3e12
# Elements of the two sizes that are compared: multiples of every kernel's chunk, and of an image.
SIZES = {"weight": (8192, 16384), "pixel": (6144, 12288)}
IMAGE = (3, 32, 32)
BATCH = 128


@dataclass
class Accesses:
    """What kernels did to memory.

    Attributes:
        launches: kernels started.
        read: bytes loaded.
        written: bytes stored.
        atomics: atomic operations on one number each.
        touched: names of the watched tensors that were loaded from, and stored to.
    """

    launches: int = 0
    read: int = 0
    written: int = 0
    atomics: int = 0
    touched: dict[str, set[str]] = field(default_factory=lambda: {"read": set(), "written": set()})


@dataclass(frozen=True)
class Work:
    """One call of an operation on tensors of some size.

    Attributes:
        reads: tensors that the result depends on, by name.
        writes: tensors that the result is written to, by name.
        call: does it; returns the results that it allocates.
    """

    reads: dict[str, Tensor]
    writes: dict[str, Tensor]
    call: Callable[[], Sequence[Tensor]]

    @property
    def watched(self) -> dict[str, Tensor]:
        """All of them by name."""
        return {**self.reads, **self.writes}


@dataclass(frozen=True)
class Operation:
    """An operation to count.

    Attributes:
        name: shown in the table.
        make: from a number of elements to the call.
        unit: what an element is: a weight of the model, or a pixel of a batch.
    """

    name: str
    make: Callable[[int], Work]
    unit: str = "weight"


@dataclass(frozen=True)
class Cost:
    """Of one element of an operation.

    Attributes:
        floor: bytes that must move.
        moved: bytes that the kernels load and store.
        atomics: atomic operations.
        launches: of the whole call.
    """

    floor: float
    moved: float
    atomics: float
    launches: int


@contextmanager
def counted(watched: dict[str, Tensor]) -> Iterator[Accesses]:
    """Count what interpreted kernels do to memory, and which of the ``watched`` tensors they use.

    Raises:
        RuntimeError: if Triton is not interpreting.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("kernels are counted in Triton's interpreter: set TRITON_INTERPRET=1.")
    from triton.runtime.interpreter import InterpreterBuilder

    from cure_fast.kernels.device.launching import Launch

    accesses = Accesses()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    atomic, run = InterpreterBuilder.create_atomic_rmw, Launch.run

    def note(kind: str, pointers: Any, mask: Any) -> int:
        # Lanes that take the same number at once are served by one access.
        addresses = np.unique(pointers.data[np.broadcast_to(mask.data, pointers.data.shape)])
        for name, tensor in watched.items():
            first = tensor.data_ptr()
            if ((addresses >= first) & (addresses < first + tensor.nbytes)).any():
                accesses.touched[kind].add(name)
        return addresses.size * (pointers.get_element_ty().primitive_bitwidth // 8)

    def counting_load(builder: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        accesses.read += note("read", pointers, mask)
        return load(builder, pointers, mask, *rest)

    def counting_store(builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        accesses.written += note("written", pointers, mask)
        return store(builder, pointers, value, mask, *rest)

    def counting_atomic(builder: Any, kind: Any, pointers: Any, value: Any, *rest: Any) -> Any:
        accesses.atomics += int(np.count_nonzero(rest[0].data))
        return atomic(builder, kind, pointers, value, *rest)

    def counting_run(launch: Launch) -> None:
        accesses.launches += 1
        run(launch)

    with (
        mock.patch.object(InterpreterBuilder, "create_masked_load", counting_load),
        mock.patch.object(InterpreterBuilder, "create_masked_store", counting_store),
        mock.patch.object(InterpreterBuilder, "create_atomic_rmw", counting_atomic),
        mock.patch.object(Launch, "run", counting_run),
        mock.patch.dict(os.environ, CURE_FAST_KERNELS="triton"),
    ):
        yield accesses


def measure(work: Work) -> tuple[Accesses, int]:
    """Run a call; return what it did, and the bytes that it must move."""
    with counted(work.watched) as accesses:
        results = work.call()
    tensors = (*work.reads.values(), *work.writes.values(), *results)
    return accesses, sum(tensor.nbytes for tensor in tensors)


def cost(operation: Operation) -> Cost:
    """Return what each further element costs."""
    sizes = SIZES[operation.unit]
    (small, small_floor), (large, large_floor) = (measure(operation.make(n)) for n in sizes)
    more = sizes[1] - sizes[0]
    return Cost(
        floor=(large_floor - small_floor) / more,
        moved=(large.read + large.written - small.read - small.written) / more,
        atomics=(large.atomics - small.atomics) / more,
        launches=large.launches,
    )


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def select(n: int) -> Work:
    nat, adv = random(n), random(n)

    def call() -> Sequence[Tensor]:
        return [s for s in rgp_select([nat], [adv], **RGP).scores if s is not None]

    return Work({"nat": nat, "adv": adv}, {}, call)


def mask(n: int) -> Work:
    nat, adv, grad = random(n), random(n), random(n)

    def call() -> Sequence[Tensor]:
        rgp_mask_([grad], [nat], [adv], **RGP)
        return ()

    return Work({"nat": nat, "adv": adv, "grad": grad}, {"grad": grad}, call)


def update(
    n: int, *, moved: bool | None = None, dtype: torch.dtype = torch.float32, copied: bool = False
) -> Work:
    """Return the update of a whole step: selection, mask, SGD with momentum, average, copy."""
    nat, adv, grad = (random(n, dtype=dtype) for _ in range(3))
    param, momentum, average = random(n), random(n), random(n)
    copy = random(n, dtype=torch.bfloat16)

    def call() -> Sequence[Tensor]:
        selection = rgp_select([nat], [adv], **RGP)
        masked_sgd_(
            *([param], [grad], [momentum]),
            lr=0.1,
            momentum=0.9,
            weight_decay=5e-4,
            scores=selection.scores,
            thresholds=selection.thresholds,
            averages=None if moved is None else [average],
            moved=None if moved is None else torch.tensor(moved),
            low_precision_copies=[copy] if copied else None,
        )
        return ()

    changed = {"param": param, "momentum": momentum}
    if moved:
        changed["average"] = average
    reads = {"nat": nat, "adv": adv, "grad": grad, **changed}
    return Work(reads, {**changed, "copy": copy} if copied else changed, call)


def average(n: int) -> Work:
    param, moving = random(n), random(n)

    def call() -> Sequence[Tensor]:
        ema_update_([moving], [param], decay=0.999)
        return ()

    return Work({"param": param, "average": moving}, {"average": moving}, call)


def attack_step(n: int, *, norm: Norm) -> Work:
    x_adv, x, grad = (random(n // math.prod(IMAGE), *IMAGE) for _ in range(3))

    def call() -> Sequence[Tensor]:
        pgd_step_(x_adv, x, grad, step_size=2 / 255, eps=8 / 255, norm=norm)
        return ()

    return Work({"x_adv": x_adv, "x": x, "grad": grad}, {"x_adv": x_adv}, call)


def attack_start(n: int) -> Work:
    x = random(n // math.prod(IMAGE), *IMAGE)
    return Work({"x": x}, {}, lambda: (pgd_init(x, eps=8 / 255, seed=0),))


def augment(n: int) -> Work:
    count = n // math.prod(IMAGE)
    stored = torch.zeros(count, *IMAGE[1:], IMAGE[0], dtype=torch.uint8)
    indices = torch.arange(count)

    def call() -> Sequence[Tensor]:
        return (augment_crop_flip(stored, indices, top=None, left=None, mirror=None),)

    return Work({"stored": stored}, {}, call)


def fold(n: int) -> Work:
    """Return the folding of one convolution; its few numbers per channel are left out."""
    weight, folded = random(64, n // 64, 1, 1), random(64, n // 64, 1, 1, dtype=torch.bfloat16)

    def call() -> Sequence[Tensor]:
        numbers = [torch.ones(64)]
        bias = [torch.empty(64, dtype=torch.bfloat16)]
        statistics = (numbers, numbers, numbers, numbers)
        fold_batchnorm([weight], None, *statistics, eps=1e-5, out_weights=[folded], out_biases=bias)
        return ()

    return Work({"weight": weight}, {"folded": folded}, call)


RGP: dict[str, Any] = {"percentile": 30, "alpha": 0.1}
OPERATIONS = (
    Operation("select", select),
    Operation("select + mask", mask),
    Operation("select + update", update),
    Operation("select + update + average", partial(update, moved=True)),
    Operation(
        "select + update, bf16 gradients and copy",
        partial(update, dtype=torch.bfloat16, copied=True),
    ),
    Operation("average", average),
    Operation("fold BatchNorm into bf16", fold),
    Operation("augment", augment, "pixel"),
    Operation("attack step, linf", partial(attack_step, norm="linf"), "pixel"),
    Operation("attack step, l2", partial(attack_step, norm="l2"), "pixel"),
    Operation("attack start, linf", attack_start, "pixel"),
)


def table(costs: dict[Operation, Cost], elements: dict[str, int], bandwidth: float) -> str:
    """Return one row per operation as aligned columns."""
    rows = [
        [
            *("operation", "per", "floor B", "moved B", "ratio", "atomics", "launches"),
            *("elements", "floor us", "moved us"),
        ]
    ]
    for operation, one in costs.items():
        count = elements[operation.unit]
        us = 1e6 * count / bandwidth
        rows.append(
            [
                *(operation.name, operation.unit, f"{one.floor:.1f}", f"{one.moved:.1f}"),
                *(f"{one.moved / one.floor:.2f}", f"{one.atomics:.2f}", str(one.launches)),
                *(f"{count:,}", f"{one.floor * us:.1f}", f"{one.moved * us:.1f}"),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if number < 2 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def positive(text: str) -> float:
    """Return a positive number, or raise what argparse reports."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return number


def main() -> None:
    parser = argparse.ArgumentParser(description="Count the bytes that CURE's operations move.")
    parser.add_argument(
        "--model", choices=MODELS, default="resnet18", help="whose weights to count"
    )
    parser.add_argument(
        "--bandwidth", type=positive, default=BANDWIDTH, help="bytes per second (%(default)g)"
    )
    arguments = parser.parse_args()
    # Read when Triton is imported, which happens at the first launch.
    os.environ["TRITON_INTERPRET"] = "1"
    with torch.device("meta"):
        model = build_model(arguments.model, num_classes=10)
    elements = {
        "weight": sum(parameter.numel() for parameter in model.parameters()),
        "pixel": BATCH * math.prod(IMAGE),
    }
    print(
        f"{arguments.model}, batches of {BATCH}; {arguments.bandwidth:g} bytes per second assumed"
    )
    print(table({each: cost(each) for each in OPERATIONS}, elements, arguments.bandwidth))


if __name__ == "__main__":
    main()
