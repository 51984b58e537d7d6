"""Operations on images, logits and convolutions, and the list of all cases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.capture import captured
from bench.kernel_cases import Case, Provider, ema_case, model_cases, without_graph
from bench.kernel_providers import Step, compiled
from cure_fast.kernels.augment import augment_crop_flip, augment_crop_flip_ref
from cure_fast.kernels.pgd import pgd_step_, pgd_step_ref
from cure_fast.kernels.softmax import softmax_losses, softmax_losses_ref


def _call_case(
    operation: str,
    shapes: str,
    *,
    make: Callable[[torch.device], Any],
    public: Provider,
    ref: Provider,
    floor_bytes: Callable[[Any], int],
    tolerance: float,
    restore: Callable[[Any], object] | None = None,
    rehearsal: bool,
) -> Case:
    """Return the case of an operation whose rivals are its own reference, eager and compiled."""
    providers = {
        "torch-eager": ref,
        "compile": lambda inputs: captured(compiled(ref(inputs))),
        "triton": public,
        "triton-graph": lambda inputs: captured(public(inputs)),
    }
    return Case(
        operation,
        shapes,
        make=make,
        restore=restore,
        floor_bytes=floor_bytes,
        reference=ref,
        providers=without_graph(providers, rehearsal=rehearsal),
        tolerance=tolerance,
    )


def _pgd_case(size: tuple[int, ...], *, rehearsal: bool) -> Case:
    def make(device: torch.device) -> list[Tensor]:
        generator = torch.Generator(device).manual_seed(0)
        x = torch.rand(size, generator=generator, device=device)
        grad = torch.randn(size, generator=generator, device=device)
        x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
        return [x.clone(), x, grad]

    def step_of(function: Callable[..., Tensor]) -> Provider:
        def provider(inputs: list[Tensor]) -> Step:
            return lambda: [function(*inputs, step_size=2 / 255, eps=8 / 255)]

        return provider

    return _call_case(
        "pgd_step",
        "x".join(map(str, size)),
        make=make,
        restore=lambda inputs: inputs[0].copy_(inputs[1]),
        public=step_of(pgd_step_),
        ref=step_of(pgd_step_ref),
        floor_bytes=lambda inputs: 16 * inputs[0].numel(),
        # A compiler may round a multiplication and an addition once.
        tolerance=1e-6,
        rehearsal=rehearsal,
    )


def _augment_case(count: int, batch: int, *, rehearsal: bool) -> Case:
    def make(device: torch.device) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(0)

        def draw(high: int, *shape: int) -> Tensor:
            return torch.randint(high, shape, generator=generator).to(device)

        images = draw(256, count, 32, 32, 3).to(torch.uint8)
        placed = {"top": draw(9, batch), "left": draw(9, batch), "mirror": draw(2, batch).bool()}
        return (images, draw(count, batch)), placed

    def step_of(function: Callable[..., Tensor]) -> Provider:
        def provider(inputs: Any) -> Step:
            return lambda: [function(*inputs[0], padding=4, **inputs[1])]

        return provider

    return _call_case(
        "augment_crop_flip",
        f"{batch} of {count:,}",
        make=make,
        public=step_of(augment_crop_flip),
        ref=step_of(augment_crop_flip_ref),
        floor_bytes=lambda inputs: 5 * batch * inputs[0][0][0].numel(),
        # A compiler may divide by 255 approximately.
        tolerance=1e-6,
        rehearsal=rehearsal,
    )


def _losses_case(batch: int, *, rehearsal: bool) -> Case:
    def make(device: torch.device) -> list[Tensor]:
        generator = torch.Generator(device).manual_seed(0)
        logits = [torch.randn(batch, 10, generator=generator, device=device) for _ in range(4)]
        return [*logits, torch.arange(batch, device=device) % 10]

    def step_of(function: Callable[..., Any]) -> Provider:
        def provider(inputs: list[Tensor]) -> Step:
            z, z_adv, teacher, teacher_adv, labels = inputs

            def step() -> Sequence[Tensor]:
                found = function(
                    z, z_adv, labels, teacher_logits=teacher, teacher_adv_logits=teacher_adv
                )
                pairs = found.gradients.values()
                return [found.total, *(g for pair in pairs for g in pair if g is not None)]

            return step

        return provider

    return _call_case(
        "softmax_losses",
        f"{batch}x10",
        make=make,
        public=step_of(softmax_losses),
        ref=step_of(softmax_losses_ref),
        # Four logits and a label are read; six losses and four gradients are written.
        floor_bytes=lambda inputs: 4 * (4 + 4) * inputs[0].numel() + (8 + 6 * 4) * batch,
        tolerance=1e-5,
        rehearsal=rehearsal,
    )


def all_cases(*, rehearsal: bool) -> list[Case]:
    """Return every case: of real shapes for a GPU, or small ones that rehearse them on a CPU.

    What takes least time comes first.
    """
    if rehearsal:
        return [
            _pgd_case((2, 3, 8, 8), rehearsal=True),
            _augment_case(5, 3, rehearsal=True),
            _losses_case(4, rehearsal=True),
            ema_case("rehearsal", rehearsal=True),
            *model_cases(rehearsal=True),
        ]
    return [
        _pgd_case((128, 3, 32, 32), rehearsal=False),
        _pgd_case((512, 3, 32, 32), rehearsal=False),
        _augment_case(50_000, 128, rehearsal=False),
        _losses_case(128, rehearsal=False),
        ema_case("resnet18", rehearsal=False),
        ema_case("wrn34-10", rehearsal=False),
        *model_cases(rehearsal=False),
    ]
