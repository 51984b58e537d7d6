"""A GPU that is not there, for Inductor to generate code for: an H200, on a machine without any.

Tensors are fake ones of PyTorch (:class:`torch._subclasses.FakeTensorMode`), which have shapes,
strides and a device but no values; nothing is computed, and Triton compiles nothing. What is made
up here is what Inductor and fake tensors ask of the driver, the card and cuDNN. It stands on names
of PyTorch that are not public: :data:`TORCH` says for which release.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# The release whose internals are replaced here, as major.minor.
TORCH = "2.11"

# What Inductor asks of the card.
CARD = types.SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    regs_per_multiprocessor=65536,
    warp_size=32,
)


def missing() -> str | None:
    """Return why no GPU can be pretended here; None where one can."""
    if not torch.__version__.startswith(f"{TORCH}."):
        return f"internals of torch {TORCH} are replaced, and this is {torch.__version__}"
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if torch.cuda.is_available():
        return "there is a GPU here, which CUDA_VISIBLE_DEVICES= would hide"
    return None


@contextmanager
def pretended() -> Iterator[None]:
    """Let PyTorch believe in an H200 as long as the context lasts.

    PyTorch caches some of the answers, so a process that has pretended is good for nothing else.
    """
    import torch._dynamo.utils
    from torch._functorch import aot_autograd
    from torch._inductor.fx_passes import joint_graph, post_grad
    from torch._subclasses import fake_tensor

    torch._C._ensureCUDADeviceGuardSet()
    folder = joint_graph.UniformValueConstantFolder
    replaced: list[tuple[Any, str, Any]] = [
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "device_count", lambda: 1),
        (torch.cuda, "current_device", _zero),
        (torch.cuda, "_exchange_device", _zero),
        (torch.cuda, "_maybe_exchange_device", _zero),
        (torch.cuda, "_get_device_properties", lambda device: CARD),
        (torch.cuda, "_lazy_init", _nothing),
        (torch._C, "_select_conv_backend", _cudnn),
        (torch._C, "_conv_determine_backend_memory_format", _order),
        (fake_tensor, "init_gpu_context", _nothing),
        (aot_autograd, "preserve_rng_state", nullcontext),
        (torch._dynamo.utils, "preserve_rng_state", nullcontext),
        (joint_graph, "lazy_init", _nothing),
        (post_grad, "lazy_init", _nothing),
        (folder, "run", _on_cpu(folder.run)),
        (folder, "_add_peephole_patterns", _on_cpu(folder._add_peephole_patterns)),
    ]
    with ExitStack() as stack:
        for owner, name, answer in replaced:
            # Loading the driver would have made some of them.
            stack.enter_context(mock.patch.object(owner, name, answer, create=True))
        stack.enter_context(_triton_target())
        yield


def _nothing(*args: object, **kwargs: object) -> None:
    return None


def _zero(*args: object) -> int:
    return 0


def _cudnn(*args: object, **kwargs: object) -> object:
    """Choose cuDNN for every convolution."""
    return torch._C._ConvBackend.Cudnn  # pyright: ignore[reportAttributeAccessIssue]


def _order(images: Tensor, weight: Tensor, backend: object) -> torch.memory_format:
    """Return the memory order of a convolution's result: cuDNN's rule (ATen's ConvUtils.h)."""
    from torch._prims_common import suggest_memory_format

    last = torch.channels_last
    found = last in (suggest_memory_format(images), suggest_memory_format(weight))
    return last if found else torch.contiguous_format


class _ToCpu(TorchDispatchMode):
    """Makes tensors on the CPU that were to be on the GPU: folding constants computes with them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
        if func is torch.ops.prims.device_put.default:
            args = (args[0], torch.device("cpu"), *args[2:])
        return func(*args, **kwargs)


def _on_cpu(method: Any) -> Any:
    def instead(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _ToCpu():
            return method(self, *args, **kwargs)

    return instead


@contextmanager
def _triton_target() -> Iterator[None]:
    """Let Triton believe that it compiles for the card."""
    import triton
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", 10 * CARD.major + CARD.minor, CARD.warp_size)
    driver: Any = types.SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=_zero,
        get_current_stream=_zero,
        get_active_torch_device=lambda: torch.device("cuda", 0),
    )
    triton.runtime.driver.set_active(driver)
    try:
        yield
    finally:
        triton.runtime.driver._active = None
