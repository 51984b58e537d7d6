"""Shared by the tests of kernels: memory that is never accidentally right, and who computes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from interpreter import hastened


def poisoning(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return ``allocate`` with its tensors filled with NaN, or the largest value of integers."""

    def allocate_poisoned(*args: object, **kwargs: object) -> Tensor:
        tensor = allocate(*args, **kwargs)
        if tensor.is_floating_point() or tensor.is_complex():
            value = float("nan")
        elif tensor.dtype == torch.bool:
            value = True
        else:
            value = torch.iinfo(tensor.dtype).max
        with torch.no_grad():
            return tensor.fill_(value)

    return allocate_poisoned


@pytest.fixture(autouse=True)
def interpreter(request: pytest.FixtureRequest) -> None:
    """Skip tests of kernels on CPU tensors where kernels are compiled."""
    compiled = os.environ.get("TRITON_INTERPRET") != "1"
    if compiled and not request.node.get_closest_marker("gpu"):
        pytest.skip("needs Triton's interpreter: run pytest without -m gpu")


@pytest.fixture(autouse=True, scope="session")
def hastened_interpreter() -> Iterator[None]:
    with hastened():
        yield


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Poison what torch allocates without filling it, so that an unwritten output shows."""
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, poisoning(getattr(owner, name)))


@pytest.fixture
def triton_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run operations as Triton kernels, in its interpreter where there is no GPU."""
    monkeypatch.setenv("CURE_FAST_KERNELS", "triton")


@pytest.fixture
def reference_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run operations as their PyTorch references."""
    monkeypatch.setenv("CURE_FAST_KERNELS", "reference")
