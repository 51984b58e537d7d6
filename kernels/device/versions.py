"""What tells autograd that kernels have written into tensors, which it cannot see by itself."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.autograd.graph import increment_version


def count_changes(*lists: Sequence[Tensor | None] | None) -> None:
    """Raise the version of every tensor, as torch's own in-place operations do.

    A backward pass that needs the value from before then raises an error instead of returning a
    wrong gradient. This happens on the host alone.

    Args:
        lists: tensors that kernels have changed; None where there is none.
    """
    increment_version(
        [tensor for tensors in lists for tensor in tensors or () if tensor is not None]
    )
