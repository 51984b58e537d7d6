"""Shared by the tests on a GPU: tensors, what a step starts and waits for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cure_fast import kernels
from cure_fast.models import build_model

GPU = torch.device("cuda")
SETTINGS = {"percentile": 30.0, "alpha": 0.1}
SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
# One element, less than a vector, powers of two and their neighbours, several chunks.
SIZES = (1, 3, 64, 1000, 4096, 8191, 8193, 100_003, 2_359_296)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Make every wait of the host for the device that torch knows of an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def launched(step: Callable[[], object]) -> list[str]:
    """Return the names of what ``step`` starts on the device: kernels, copies and fills."""
    step()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    on_device = torch.autograd.DeviceType.CUDA
    return [event.name for event in profile.events() or [] if event.device_type == on_device]


def on_gpu(value: Any) -> Any:
    """Return copies on the GPU of the tensors in lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        return value.detach().to(GPU, copy=True)
    if isinstance(value, dict):
        return {name: on_gpu(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [on_gpu(item) for item in value]
    return value


def flat(value: Any) -> list[Tensor]:
    """Return the tensors in a result, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if hasattr(value, "__dataclass_fields__"):
        value = [getattr(value, name) for name in value.__dataclass_fields__]
    if isinstance(value, Sequence):
        return [tensor for item in value for tensor in flat(item)]
    return []


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are equal in every bit, NaN equal to NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(
        a.cpu().contiguous().view(-1).view(torch.uint8),
        b.cpu().contiguous().view(-1).view(torch.uint8),
    )


def gradients(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """Return vectors of all sizes with normal numbers of different scales, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(n, generator=generator) * 10.0 ** -(i % 4)).to(dtype)
        for i, n in enumerate(SIZES)
    ]


def hard_gradients() -> list[Tensor]:
    """Return what is hard to select from: ties, zeros, denormals, infinities, NaN, one value."""
    generator = torch.Generator().manual_seed(5)
    ties = torch.randint(0, 3, (20_000,), generator=generator).float()
    denormal = torch.randn(20_000, generator=generator) * 1e-41
    broken = torch.randn(20_000, generator=generator)
    broken[::7], broken[3::11] = float("inf"), float("nan")
    odd = torch.randn(20_000, generator=generator).exp() ** 20
    return [ties, torch.zeros(20_000), denormal, broken, odd, torch.full((9000,), 0.25)]


@dataclass
class Whole:
    """All that one update of ResNet-18 reads and writes, on the GPU, and the prepared calls."""

    rgp: kernels.RGP
    nat: kernels.TensorList
    adv: kernels.TensorList
    params: kernels.TensorList
    grads: kernels.TensorList
    momentum: kernels.TensorList
    averages: kernels.TensorList
    coin_step: Tensor
    moved: Tensor

    def update(self) -> None:
        """Do the whole update: select, toss, mask, SGD, average."""
        selection = self.rgp.select(self.nat, self.adv)
        moved = kernels.flip_coin(0.5, seed=3, step=self.coin_step)
        self.moved.copy_(moved)
        self._apply(selection, moved)

    def update_alone(self) -> None:
        """Do the whole update without keeping the coin."""
        moved = kernels.flip_coin(0.5, seed=3, step=self.coin_step)
        self._apply(self.rgp.select(self.nat, self.adv), moved)

    def _apply(self, selection: kernels.Selection, moved: Tensor) -> None:
        kernels.masked_sgd_(
            self.params,
            self.grads,
            self.momentum,
            **SGD,
            scores=selection.scores,
            thresholds=selection.thresholds,
            averages=self.averages,
            decay=0.9,
            moved=moved,
        )

    def state(self) -> list[Tensor]:
        """Return copies of all that an update changes."""
        return [t.clone() for t in (*self.params, *self.momentum, *self.averages)]

    def load(self, state: list[Tensor]) -> None:
        """Bring back what :meth:`state` returned."""
        for tensor, old in zip((*self.params, *self.momentum, *self.averages), state, strict=True):
            tensor.copy_(old)


def resnet18_update() -> Whole:
    """Return the update of ResNet-18, all of whose tensors are masked."""
    model = build_model("resnet18", num_classes=10).to(GPU)
    rgp = kernels.RGP(model.named_parameters(), **SETTINGS)
    params = [p.detach() for p in rgp.parameters]
    generator = torch.Generator(GPU).manual_seed(1)

    def noise(scale: float) -> kernels.TensorList:
        return kernels.TensorList(
            [torch.zeros_like(p).normal_(0, scale, generator=generator) for p in params]
        )

    return Whole(
        rgp=rgp,
        nat=noise(1e-3),
        adv=noise(1e-3),
        params=kernels.TensorList(params),
        grads=noise(1e-3),
        momentum=noise(1e-3),
        averages=noise(0.05),
        coin_step=torch.zeros((), dtype=torch.int64, device=GPU),
        moved=torch.zeros((), dtype=torch.bool, device=GPU),
    )


def pictures(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return 7 adversarial images, their originals and gradients, on the CPU."""
    generator = torch.Generator().manual_seed(4)
    x = torch.rand(7, 3, 32, 32, generator=generator)
    x_adv = (x + torch.rand(x.shape, generator=generator) * 0.03).clamp(0, 1)
    grad = torch.randn(x.shape, generator=generator)
    form = torch.channels_last
    return [t.to(dtype).contiguous(memory_format=form) for t in (x_adv, x, grad)]


def resident_batch() -> tuple[list[Tensor], dict[str, Tensor]]:
    """Return a data set of 50 images with the indices of a batch, and where to crop it."""
    generator = torch.Generator().manual_seed(6)

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    placed = {"top": draw(9, 33), "left": draw(9, 33), "mirror": draw(2, 33).bool()}
    return [draw(256, 50, 32, 32, 3).to(torch.uint8), draw(50, 33)], placed
