"""Which implementation of an operation runs: its Triton kernel, or its PyTorch reference.

The tensors' device decides at each call: CUDA takes the kernel, anything else the reference.
``CURE_FAST_KERNELS`` forces a choice (``triton`` or ``reference``; ``auto`` is the default). On the
CPU, ``triton`` needs Triton's interpreter, which is slow and meant for tests.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

VARIABLE = "CURE_FAST_KERNELS"
CHOICES = ("auto", "triton", "reference")

# Kernels that failed to compile in this process. Triton does not remember a failure, and trying
# again would cost seconds at each step.
_failed: set[str] = set()


class KernelUnavailable(RuntimeError):
    """A Triton kernel cannot be compiled or launched here; no tensor of the caller has changed."""


def chosen() -> str:
    """Return the value of ``CURE_FAST_KERNELS``.

    Raises:
        ValueError: if it is none of auto, triton and reference.
    """
    value = os.environ.get(VARIABLE, "auto")
    if value not in CHOICES:
        raise ValueError(f"{VARIABLE}: expected one of {', '.join(CHOICES)}, got {value!r}.")
    return value


def uses_triton(device: torch.device) -> bool:
    """Return whether operations on ``device`` run as Triton kernels.

    Raises:
        RuntimeError: if Triton is forced and cannot run there.
        ValueError: for an unknown value of ``CURE_FAST_KERNELS``.
    """
    choice = chosen()
    if choice == "reference":
        return False
    if choice == "auto":
        return device.type == "cuda" and importlib.util.find_spec("triton") is not None
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError(f"{VARIABLE}=triton: triton is not installed. Try: pip install triton")
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            f"{VARIABLE}=triton: the tensors are on {device}, where kernels run only in Triton's "
            "interpreter. Start Python with TRITON_INTERPRET=1, or move the tensors to CUDA."
        )
    return True


def run(
    module: str,
    reference: Callable[P, R],
    device: torch.device,
    /,
    *args: P.args,
    **kwargs: P.kwargs,
) -> R:
    """Call an operation: its kernel from ``device/<module>.py``, or its reference.

    The kernel's launcher has the reference's name without ``_ref``, and its signature. A kernel
    that cannot be compiled is replaced by its reference from then on, with one warning, unless
    ``CURE_FAST_KERNELS=triton`` forbids that.

    Args:
        module: file below ``device/`` without its ending.
        reference: the PyTorch implementation.
        device: where the tensors are.
        args: arguments of the operation.
        kwargs: keyword arguments of the operation.
    """
    name = reference.__name__
    if not uses_triton(device) or (name in _failed and chosen() == "auto"):
        return reference(*args, **kwargs)
    kernels = importlib.import_module(f".device.{module}", __package__)
    launcher: Callable[P, R] = getattr(kernels, name.removesuffix("_ref"))
    try:
        return launcher(*args, **kwargs)
    except KernelUnavailable as error:
        if chosen() == "triton":
            raise
        _failed.add(name)
        warnings.warn(
            f"the Triton kernel of {name.removesuffix('_ref')} cannot run here, so its PyTorch "
            f"reference runs from now on, with the same results and slower: {error}",
            RuntimeWarning,
            stacklevel=3,
        )
    return reference(*args, **kwargs)
