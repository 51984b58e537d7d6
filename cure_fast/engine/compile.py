"""How the fast engine uses torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def compile_static(function: Callable[..., T]) -> Callable[..., T]:
    """Return what torch.compile makes of a function, or of a module, for tensors of one shape.

    It makes no CUDA graphs of its own. Where torch is set to deterministic algorithms, kernels are
    chosen without timing them, so that every process sums in the same order.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    return torch.compile(
        function,
        dynamic=False,
        options={"triton.cudagraphs": False, "deterministic": deterministic},
    )


def is_compile_error(error: Exception) -> bool:
    """Return whether torch.compile itself failed, rather than what it had compiled."""
    # Here, as it takes seconds to import.
    from torch._dynamo.exc import TorchDynamoException

    return isinstance(error, TorchDynamoException)
