"""The one place where kernels are launched."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import triton.language as tl
from triton.errors import TritonError
from triton.runtime.errors import InterpreterError

from ..dispatch import KernelUnavailable

DTYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int64: tl.int64,
    torch.int32: tl.int32,
    torch.int16: tl.int16,
    torch.int8: tl.int8,
    torch.uint8: tl.uint8,
    torch.bool: tl.int1,
}


def triton_dtype(dtype: torch.dtype | None) -> tl.dtype | None:
    """Return Triton's name of a dtype; None for None, an absent list.

    Raises:
        TypeError: for a dtype that no kernel reads.
    """
    if dtype is not None and dtype not in DTYPES:
        raise TypeError(f"expected one of {', '.join(map(str, DTYPES))}, got a tensor of {dtype}.")
    return None if dtype is None else DTYPES[dtype]


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    Attributes:
        kernel: the ``@triton.jit`` function.
        programs: size of the grid, at least 1.
        device: where its tensors are.
        args: positional arguments: tensors and numbers.
        constants: ``tl.constexpr`` arguments by name.
        warps: warps per program.
    """

    kernel: Callable[..., object]
    programs: int
    device: torch.device
    args: tuple[object, ...]
    constants: dict[str, object] = field(default_factory=dict)
    warps: int = 4

    def run(self) -> None:
        """Launch the kernel on the current stream of its device; compile it first where needed.

        Fused multiply-adds are off: the kernel rounds as the reference does, and every kernel that
        forms a score forms the same one.

        Raises:
            KernelUnavailable: if it cannot be compiled, or needs more than the device has.
        """
        kernel = self.kernel[(self.programs,)]  # pyright: ignore[reportIndexIssue]
        try:
            if self.device.type == "cuda":
                with torch.cuda.device(self.device):
                    self._start(kernel)
            else:
                self._start(kernel)
        except Exception as error:
            if not _is_compile_failure(error):
                raise
            first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise KernelUnavailable(f"{type(error).__name__}: {first_line}") from error

    def _start(self, kernel: Callable[..., object]) -> None:
        kernel(*self.args, **self.constants, num_warps=self.warps, enable_fp_fusion=False)


def _is_compile_failure(error: Exception) -> bool:
    """Return whether the kernel never started: faults of the device itself must not pass for it."""
    if isinstance(error, InterpreterError):
        return False
    if isinstance(error, TritonError | OSError | subprocess.CalledProcessError):
        return True
    texts = ("PassManager::run failed", "Failed to find C compiler")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)


def launch_all(launches: Sequence[Launch]) -> None:
    """Run launches that change no tensor of the caller, so that each may still be given up.

    Raises:
        KernelUnavailable: if one cannot run.
    """
    for launch in launches:
        launch.run()


def launch_each(launches: Sequence[Launch]) -> None:
    """Run launches that change tensors in place, of which the first may still be given up.

    Raises:
        KernelUnavailable: if the first cannot run; nothing has changed.
        RuntimeError: if a later one cannot: tensors of earlier ones have changed.
    """
    for number, launch in enumerate(launches):
        try:
            launch.run()
        except KernelUnavailable as error:
            if number:
                raise RuntimeError(
                    f"launch {number + 1} of {len(launches)} failed after the others had changed "
                    f"their tensors, so the operation cannot be tried again: {error}"
                ) from error
            raise
