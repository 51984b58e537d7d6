"""What is timed: an operation on one set of shapes, and the whole-model operations among them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.capture import captured
from bench.kernel_inputs import LAYOUTS, ModelTensors, model_tensors
from bench.kernel_providers import (
    DECAY,
    Step,
    compiled,
    compiled_bisect,
    compiled_each,
    eager,
    foreach_ema,
    functional,
    kthvalue_threshold,
    numpy_threshold,
    prepared,
    quantile_threshold,
    sort_threshold,
)
from cure_fast import kernels

Provider = Callable[[Any], Step]


@dataclass(frozen=True)
class Case:
    """One operation on one set of shapes.

    Attributes:
        operation: its name in the results.
        shapes: name of the shapes.
        make: builds the inputs on a device, the same at each call.
        restore: brings the inputs back to their first values; None where nothing changes.
        floor_bytes: of the inputs, the bytes that must be moved: each input read once, each output
            written once.
        reference: the operation by its public functions.
        providers: by name.
        tolerance: of a result's element, relative to the element plus its tensor's largest; 0 asks
            for the same bits.
    """

    operation: str
    shapes: str
    make: Callable[[torch.device], Any]
    restore: Callable[[Any], object] | None
    floor_bytes: Callable[[Any], int]
    reference: Provider
    providers: dict[str, Provider]
    tolerance: float


def differing(found: Tensor, wanted: Tensor, tolerance: float) -> Tensor:
    """Return which elements differ by more than a case's tolerance."""
    found, wanted = found.double(), wanted.double()
    bound = tolerance * (wanted.abs() + wanted.abs().max())
    # Not "larger than": a NaN differs.
    return ~((found - wanted).abs() <= bound)


THRESHOLDS = {
    "numpy": numpy_threshold,
    "torch-quantile": quantile_threshold,
    "torch-kthvalue": kthvalue_threshold,
    "torch-sort": sort_threshold,
}
TRITON = ("triton", "triton-prepared", "triton-graph")
# kthvalue takes 7 ns per weight and compiling up to a minute, so large shapes have fewer rivals.
# PreActResNet-18 has nearly ResNet-18's shapes.
MODEL_PROVIDERS = {
    ("mask", "resnet18"): (*THRESHOLDS, "compile-sort", "compile-bisect", *TRITON),
    ("update", "resnet18"): (
        *THRESHOLDS,
        "compile-kthvalue",
        "compile-sort",
        "compile-bisect",
        *TRITON,
    ),
    ("update+ema", "resnet18"): ("torch-sort", "compile-bisect", *TRITON),
    ("update", "wrn34-10"): (*THRESHOLDS, "compile-sort", "compile-bisect", *TRITON),
    ("update+ema", "wrn34-10"): ("torch-sort", *TRITON),
    ("mask", "wrn34-10"): (*THRESHOLDS, *TRITON),
    ("update", "preactresnet18"): ("torch-sort", *TRITON),
    ("mask", "resnet18-bf16"): ("torch-sort", *TRITON),
    ("update", "resnet18-bf16"): TRITON,
    ("update", "wrn34-10-bf16"): TRITON,
    ("mask", "100M"): (*THRESHOLDS, *TRITON),
    ("update", "100M"): ("torch-sort", *TRITON),
}
EVERY_PROVIDER = (
    *THRESHOLDS,
    "compile-kthvalue",
    "compile-sort",
    "compile-bisect",
    "triton",
    "triton-prepared",
)


def model_cases(*, rehearsal: bool) -> list[Case]:
    """Return the cases of mask, update, and update with EMA."""
    if not rehearsal:
        return [model_case(*key, names) for key, names in MODEL_PROVIDERS.items()]
    few = [name for name in EVERY_PROVIDER if not name.startswith("compile-")]
    return [
        model_case("mask", "rehearsal", few),
        model_case("update", "rehearsal", EVERY_PROVIDER),
        model_case("update+ema", "rehearsal", ("torch-sort", "triton", "triton-prepared")),
        model_case("update", "rehearsal-bf16", ("triton", "triton-prepared")),
    ]


def model_case(operation: str, shapes: str, names: Sequence[str]) -> Case:
    update, ema = operation != "mask", operation == "update+ema"
    layout, bf16 = shapes.removesuffix("-bf16"), shapes.endswith("-bf16")
    dtype = torch.bfloat16 if bf16 else torch.float32
    reference = functools.partial(functional, update=update, ema=ema)
    return Case(
        operation,
        shapes,
        make=lambda device: model_tensors(LAYOUTS[layout](), device, dtype),
        restore=ModelTensors.restore,
        floor_bytes=lambda tensors: model_floor(tensors, update=update, ema=ema),
        reference=reference,
        providers={name: _model_provider(name, update=update, ema=ema) for name in names},
        # Providers add in different orders; the momentum's error is relative to its largest term.
        tolerance=1e-6 if update else 0,
    )


def _model_provider(name: str, *, update: bool, ema: bool) -> Provider:
    what = {"update": update, "ema": ema}
    kind, _, method = name.partition("-")
    if name == "compile-bisect":
        return functools.partial(compiled_bisect, **what)
    if kind == "compile":
        return functools.partial(compiled_each, threshold=THRESHOLDS[f"torch-{method}"], **what)
    if name in THRESHOLDS:
        return functools.partial(eager, threshold=THRESHOLDS[name], **what)
    if name == "triton":
        return functools.partial(functional, **what)
    if name == "triton-prepared":
        return functools.partial(prepared, **what)
    return lambda tensors: captured(prepared(tensors, **what))


def model_floor(tensors: ModelTensors, *, update: bool, ema: bool) -> int:
    """Return the bytes that selection and mask, and what else is done, must move.

    With float32 gradients: 12 per masked weight for the mask alone (an entry that stays need not be
    read), 28 for the update (20 for an exempt weight), and 8 more where the coin lands.
    """
    masked, exempt = (tensors.elements(masked=flag) for flag in (True, False))
    gradient = tensors.nat[0].element_size()
    if not update:
        return 3 * gradient * masked
    read_and_written = 4 * 4 + (2 * 4 if ema else 0)
    return (3 * gradient + read_and_written) * masked + (gradient + read_and_written) * exempt


def ema_case(shapes: str, *, rehearsal: bool) -> Case:
    def eager_ema(tensors: ModelTensors) -> Step:
        def step() -> Sequence[Tensor]:
            for average, param in zip(tensors.averages, tensors.params, strict=True):
                average.lerp_(param, 1 - DECAY)
            return tensors.averages

        return step

    def foreach(tensors: ModelTensors) -> Step:
        def step() -> Sequence[Tensor]:
            foreach_ema(tensors.averages, tensors.params)
            return tensors.averages

        return step

    def public(tensors: ModelTensors, *, ready: bool = False) -> Step:
        wrap = kernels.TensorList if ready else list
        averages, params = wrap(tensors.averages), wrap(tensors.params)

        def step() -> Sequence[Tensor]:
            kernels.ema_update_(averages, params, decay=DECAY)
            return tensors.averages

        return step

    providers: dict[str, Provider] = {
        "torch-eager": eager_ema,
        "torch-foreach": foreach,
        "compile": lambda tensors: captured(compiled(foreach(tensors))),
        "triton": public,
        "triton-prepared": functools.partial(public, ready=True),
        "triton-graph": lambda tensors: captured(public(tensors, ready=True)),
    }
    return Case(
        "ema",
        shapes,
        make=lambda device: model_tensors(LAYOUTS[shapes](), device, torch.float32),
        restore=ModelTensors.restore,
        floor_bytes=lambda tensors: 12 * sum(p.numel() for p in tensors.params),
        reference=public,
        providers=without_graph(providers, rehearsal=rehearsal),
        tolerance=1e-6,
    )


def without_graph(providers: dict[str, Provider], *, rehearsal: bool) -> dict[str, Provider]:
    return {k: v for k, v in providers.items() if not (rehearsal and k.endswith("-graph"))}
