"""Errors a user can act on, each with the exit code that the command line documents."""

from __future__ import annotations


class CureFastError(Exception):
    """Base of the errors below: the command line prints the message alone and exits with `code`."""

    code = 1


class InputError(CureFastError, ValueError):
    """A bad flag, file, label or image: says what was expected, what came and what to do."""

    code = 2


class DivergedError(CureFastError, ArithmeticError):
    """The loss or a weight is no longer finite."""

    code = 3


class MemoryExhaustedError(CureFastError):
    """The device has no memory left for this batch size."""

    code = 4


class StoppedError(CureFastError):
    """A signal asked the run to stop; it can be continued with ``--resume``."""

    code = 75


class NeedsTorchError(BaseException):
    """What was asked for cannot be answered ahead of torch; no ``Exception``, which is answered."""


# What torch's plain RuntimeErrors say: its CPU allocator, CUDA outside of torch's own allocator
# (streams, pinned memory), and cuBLAS, cuDNN and oneDNN for their workspaces.
MESSAGES = (
    "can't allocate memory",
    "could not allocate memory",
    "out of memory",
    "_ALLOC_FAILED",
    "_ALLOCATION_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the error says that memory ran out, on the GPU or the host."""
    # torch's class by its name: where torch is not loaded, it must not be for this.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in MESSAGES)
