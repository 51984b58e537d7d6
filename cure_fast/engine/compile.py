"""How the fast engine uses torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

from cure_fast.config import EngineFeature

T = TypeVar("T")


class CompiledPassError(Exception):
    """A pass of the loss could not be compiled, or failed when it first ran compiled; says why."""


def compile_static(
    function: Callable[..., T], options: Mapping[str, int] | None = None
) -> Callable[..., T]:
    """Return what torch.compile makes of a function, or of a module, for tensors of one shape.

    It makes no CUDA graphs of its own. Where torch is set to deterministic algorithms, kernels are
    chosen without timing them, so that every process sums in the same order.

    Args:
        function: from tensors to tensors.
        options: further ones of Inductor.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    return torch.compile(
        function,
        dynamic=False,
        options={"triton.cudagraphs": False, "deterministic": deterministic, **(options or {})},
    )


def failed_feature(error: Exception) -> EngineFeature | None:
    """Return which feature of the fast engine torch.compile failed; None for other errors."""
    if isinstance(error, CompiledPassError):
        return "compile-loss"
    # Here, as it takes seconds to import.
    from torch._dynamo.exc import TorchDynamoException

    return "compile" if isinstance(error, TorchDynamoException) else None
