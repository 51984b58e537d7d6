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
from cure_fast.kernels.ema import copy_where_, ema_update_
from cure_fast.kernels.pgd import Norm, Start, pgd_init, pgd_step_
from cure_fast.kernels.rgp import mask_below_, rgp_mask_, rgp_select, rgp_threshold
from cure_fast.kernels.softmax import INPUTS as LOSSES
from cure_fast.kernels.softmax import softmax_losses
from cure_fast.kernels.update import masked_sgd_
from cure_fast.models import MODELS, build_model

# Assumed where none is given: that of an H200, measured on one.
BANDWIDTH = 4.3e12
# Elements of the two sizes that are compared: multiples of every kernel's chunk, of an image, and
# of the rows of logits that share a program.
SIZES = {"weight": (8192, 16384), "pixel": (6144, 12288), "logit": (640, 1280)}
IMAGE = (3, 32, 32)
CLASSES = 10
BATCH = 128


@dataclass
class Accesses:
    """What kernels did to memory."""

    launches: int = 0  # kernels started
    read: int = 0  # bytes loaded
    written: int = 0  # bytes stored
    atomics: int = 0  # atomic operations on one number each
    # Names of the watched tensors that were loaded from, and stored to.
    touched: dict[str, set[str]] = field(default_factory=lambda: {"read": set(), "written": set()})


@dataclass(frozen=True)
class Work:
    """One call of an operation on tensors of some size."""

    reads: dict[str, Tensor]  # tensors that the result depends on, by name
    writes: dict[str, Tensor]  # tensors that the result is written to, by name
    call: Callable[[], Sequence[Tensor]]  # does it; returns the results that it allocates


@dataclass(frozen=True)
class Operation:
    """An operation to count."""

    name: str  # shown in the table
    make: Callable[[int], Work]  # from a number of elements to the call
    unit: str = "weight"  # what an element is: a weight of the model, a pixel or logit of a batch


@dataclass(frozen=True)
class Cost:
    """Of one element of an operation."""

    floor: float  # bytes that must move
    moved: float  # bytes that the kernels load and store
    atomics: float  # atomic operations
    launches: int  # of the whole call


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
    with counted({**work.reads, **work.writes}) as accesses:
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


def works_in_place(
    reads: dict[str, Tensor], changed: dict[str, Tensor], call: Callable[[], object]
) -> Work:
    """Return a call that changes what it also reads, and allocates no result."""

    def without_result() -> Sequence[Tensor]:
        call()
        return ()

    return Work({**reads, **changed}, changed, without_result)


def select(n: int) -> Work:
    nat, adv = random(n), random(n)

    def call() -> Sequence[Tensor]:
        return [s for s in rgp_select([nat], [adv], **RGP).scores if s is not None]

    return Work({"nat": nat, "adv": adv}, {}, call)


def threshold(n: int) -> Work:
    nat, adv = random(n), random(n)
    return Work({"nat": nat, "adv": adv}, {}, lambda: (rgp_threshold([nat], [adv], **RGP),))


def mask(n: int) -> Work:
    nat, adv, grad = random(n), random(n), random(n)
    reads, changed = {"nat": nat, "adv": adv}, {"grad": grad}
    return works_in_place(reads, changed, lambda: rgp_mask_([grad], [nat], [adv], **RGP))


def mask_below(n: int) -> Work:
    scores, tensor = random(n), random(n)
    call = partial(mask_below_, [tensor], [scores], torch.zeros(1))
    return works_in_place({"scores": scores}, {"tensor": tensor}, call)


def sgd(n: int) -> Work:
    param, momentum, grad = random(n), random(n), random(n)
    call = partial(masked_sgd_, [param], [grad], [momentum], lr=0.1, momentum=0.9)
    return works_in_place({"grad": grad}, {"param": param, "momentum": momentum}, call)


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
    call = partial(ema_update_, [moving], [param], decay=0.999)
    return works_in_place({"param": param}, {"average": moving}, call)


def copy(n: int) -> Work:
    target, source = random(n), random(n)

    def call() -> Sequence[Tensor]:
        copy_where_([target], [source], condition=torch.tensor(True))
        return ()

    return Work({"source": source}, {"target": target}, call)


def images(n: int) -> Tensor:
    return random(n // math.prod(IMAGE), *IMAGE)


def attack_step(n: int, *, norm: Norm) -> Work:
    x_adv, x, grad = images(n), images(n), images(n)
    call = partial(pgd_step_, x_adv, x, grad, step_size=2 / 255, eps=8 / 255, norm=norm)
    return works_in_place({"x": x, "grad": grad}, {"x_adv": x_adv}, call)


def attack_start(n: int, *, norm: Norm, start: Start = "uniform") -> Work:
    x = images(n)
    options: dict[str, Any] = {"eps": 8 / 255, "norm": norm, "start": start, "seed": 0}
    return Work({"x": x}, {}, lambda: (pgd_init(x, **options),))


def losses(n: int) -> Work:
    names = ("logits", "adv_logits", "teacher_logits", "teacher_adv_logits")
    logits = {name: random(n // CLASSES, CLASSES) for name in names}
    labels = torch.zeros(n // CLASSES, dtype=torch.int64)

    def call() -> Sequence[Tensor]:
        z, z_adv, *teacher = logits.values()
        found = softmax_losses(
            z, z_adv, labels, teacher_logits=teacher[0], teacher_adv_logits=teacher[1]
        )
        each = [getattr(found, name) for name in (*LOSSES, "consistency")]
        return [*each, *(g for pair in found.gradients.values() for g in pair if g is not None)]

    return Work({**logits, "labels": labels}, {}, call)


def augment(n: int) -> Work:
    count = n // math.prod(IMAGE)
    stored = torch.zeros(count, *IMAGE[1:], IMAGE[0], dtype=torch.uint8)
    nothing: dict[str, Any] = dict.fromkeys(("top", "left", "mirror"))
    call = partial(augment_crop_flip, stored, torch.arange(count), **nothing)
    return Work({"stored": stored}, {}, lambda: (call(),))


RGP: dict[str, Any] = {"percentile": 30, "alpha": 0.1}
OPERATIONS = (
    Operation("select", select),
    Operation("threshold", threshold),
    Operation("mask", mask_below),
    Operation("update", sgd),
    Operation("select + mask", mask),
    Operation("select + update", update),
    Operation("select + update + average", partial(update, moved=True)),
    Operation(
        "select + update, bf16 gradients and copy",
        partial(update, dtype=torch.bfloat16, copied=True),
    ),
    Operation("average", average),
    Operation("copy", copy),
    Operation("augment", augment, "pixel"),
    Operation("attack step, linf", partial(attack_step, norm="linf"), "pixel"),
    Operation("attack step, l2", partial(attack_step, norm="l2"), "pixel"),
    Operation("attack start, linf", partial(attack_start, norm="linf"), "pixel"),
    Operation("attack start, normal", partial(attack_start, norm="linf", start="normal"), "pixel"),
    Operation("attack start, l2", partial(attack_start, norm="l2"), "pixel"),
    Operation("losses with a teacher", losses, "logit"),
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
        model = build_model(arguments.model, num_classes=CLASSES)
    elements = {
        "weight": sum(parameter.numel() for parameter in model.parameters()),
        "pixel": BATCH * math.prod(IMAGE),
        "logit": BATCH * CLASSES,
    }
    print(
        f"{arguments.model}, batches of {BATCH}; {arguments.bandwidth:g} bytes per second assumed"
    )
    print(table({each: cost(each) for each in OPERATIONS}, elements, arguments.bandwidth))


if __name__ == "__main__":
    main()
