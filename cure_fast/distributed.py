"""Several processes that train one run together, one per device, as ``torchrun`` starts them.

This module alone knows of ranks. What others call here does nothing, or returns what it was given,
in a process by itself. Every process holds all networks, and of a step's batch a part; sums over
the processes are the same bits in each of them, so they all decide and move alike.

Only the first process writes. The others hand on what it read or made, and print nothing.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

T = TypeVar("T")

_apart: ContextVar[bool] = ContextVar("apart", default=False)

# What a launcher tells each process.
LAUNCHED = ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")
# Seconds that a process whose connection broke waits to learn which others are still there.
ROLL_CALL_S = 3.0
# Word of a process that ends by an error of its own; note of an error that another process tells.
FAILED, SILENT = "failed", "told by another process"


class LostError(RuntimeError):
    """Another process has ended, or did not come in time."""


def started() -> int:
    """Return how many processes the launcher has started; 1 without one, or where it is wrong."""
    return 1 if launch_problem() else int(os.environ.get("WORLD_SIZE", "1"))


def launch_problem() -> str:
    """Return what is wrong with the variables of a launcher in a line; nothing without one."""
    told = {name: os.environ.get(name, "") for name in LAUNCHED}
    if told["WORLD_SIZE"] in ("", "1"):
        return ""
    wrong = [
        name for name, value in told.items() if name != "MASTER_ADDR" and not value.isdecimal()
    ]
    wrong += [] if told["MASTER_ADDR"] else ["MASTER_ADDR"]
    if not wrong and int(told["RANK"]) < int(told["WORLD_SIZE"]):
        return ""
    if not wrong:
        return (
            f"RANK: expected less than WORLD_SIZE={told['WORLD_SIZE']}, got {told['RANK']}. Start "
            "with torchrun, or unset both."
        )
    return (
        f"WORLD_SIZE: expected {', '.join(wrong)} of a launcher with it, got "
        f"WORLD_SIZE={told['WORLD_SIZE']!r} without. Start with torchrun, or unset it."
    )


def restarts() -> int:
    """Return how often the launcher has started the processes anew after one had failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) if started() > 1 else 0


def is_first() -> bool:
    """Return whether this is the process that prints, already before they are joined."""
    return started() == 1 or int(os.environ["RANK"]) == 0


def processes() -> int:
    """Return how many processes are joined; 1 outside of :func:`joined`, and in :func:`apart`."""
    return dist.get_world_size() if dist.is_initialized() and not _apart.get() else 1


def place() -> tuple[int, int]:
    """Return the place of this process among those that are joined, from 0, and their number."""
    return (dist.get_rank() if processes() > 1 else 0), processes()


def writes() -> bool:
    """Return whether this process is the one that writes files."""
    return place()[0] == 0


def device_name(name: str) -> str:
    """Return the device of this process where ``name`` leaves open which GPU of the machine."""
    opened = processes() > 1 and name in ("auto", "cuda") and torch.cuda.is_available()
    return f"cuda:{local_place()}" if opened else name


def local_place() -> int:
    """Return the place of this process among those of its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextmanager
def joined(*, timeout_s: float) -> Iterator[None]:
    """Join the processes that the launcher has started for the block; none where it is alone.

    Collectives of CPU tensors go through gloo, those of CUDA tensors through NCCL.

    Raises:
        LostError: which processes are missing, where one has ended or did not come within
            ``timeout_s`` seconds; that some are, where they did not find one another.
    """
    if started() == 1:
        yield
        return
    gpu = torch.cuda.is_available()
    if gpu and local_place() < torch.cuda.device_count():
        torch.cuda.set_device(local_place())
    limit = timedelta(seconds=timeout_s)
    try:
        store, own, count = next(rendezvous("env://", timeout=limit))
        # A launcher's store outlives the processes, and those that it starts anew would find the
        # addresses and the last words of the former.
        store = PrefixStore(f"start {restarts()}", store)
        store.set_timeout(limit)
        backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
        dist.init_process_group(backend, store=store, rank=own, world_size=count, timeout=limit)
    except RuntimeError as error:
        told = LostError(f"{started()} processes did not find one another ({reason(error)})")
        if not is_first():
            told.add_note(f"process {os.environ['RANK']}")
        raise told from error
    try:
        with contextlib.ExitStack() as stack:
            if own:
                null = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
                stack.enter_context(contextlib.redirect_stdout(null))
                stack.enter_context(contextlib.redirect_stderr(null))
            yield
    except LostError as error:
        missing = unheard(store, "lost", own, count)
        who = f"process {', '.join(map(str, missing))} of {count}" if missing else "a process"
        told = LostError(f"{who} has ended, or did not come within {timeout_s:g} s ({error})")
        if others_told(store, missing):
            told.add_note(SILENT)
        elif own and own == min({*range(count)} - {*missing}):
            told.add_note(f"process {own}")
        raise told from error
    except Exception as error:
        with contextlib.suppress(RuntimeError):
            store.set(f"{FAILED}/{own}", "")
        others = unheard(store, f"error: {error}", own, count)
        # The first of those that have the error tells it.
        if len(others) == count - 1 or (own and own == min({*range(count)} - {*others})):
            error.add_note(f"process {own}")
        raise
    finally:
        dist.destroy_process_group()


def speaker(error: BaseException) -> str | None:
    """Return what stands before an error's line: which process has it, nothing where all have it.

    None where another process tells the line.
    """
    cause: BaseException | None = error
    while cause is not None:
        if notes := getattr(cause, "__notes__", None):
            return None if notes[0] == SILENT else f"{notes[0]}: "
        cause = cause.__cause__
    return "" if is_first() else None


def unheard(store: Store, word: str, own: int, count: int) -> list[int]:
    """Leave word with the launcher's store; return which processes do not do so within a moment."""
    others = [other for other in range(count) if other != own]
    deadline = time.monotonic() + ROLL_CALL_S
    with contextlib.suppress(RuntimeError):  # the store has gone with the process that held it
        store.set(f"{word}/{own}", "")
        while others and time.monotonic() < deadline:
            others = [other for other in others if not store.check([f"{word}/{other}"])]
            time.sleep(0.02)
    return others


def others_told(store: Store, missing: Sequence[int]) -> bool:
    """Return whether a missing process has left word of an error that it tells itself."""
    with contextlib.suppress(RuntimeError):
        return any(store.check([f"{FAILED}/{other}"]) for other in missing)
    return False


@contextmanager
def apart() -> Iterator[None]:
    """Be a process by itself for the block, in which it neither writes nor waits for others."""
    before = _apart.set(True)
    try:
        yield
    finally:
        _apart.reset(before)


def own(items: Sequence[T]) -> Sequence[T]:
    """Return those of the items that are for this process, which take turns."""
    first, number = place()
    return items[first::number]


def sum_(tensors: Sequence[Tensor]) -> None:
    """Put the sums over all processes in the place of tensors, which have the same shapes in each.

    Those of one dtype travel as one: a network has a hundred, and each message a latency.
    """
    if processes() == 1:
        return
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        alike.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    for group in alike.values():
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in group])
        call(dist.all_reduce, flat)
        parts = flat.split([tensor.numel() for tensor in group])
        summed = [part.view(tensor.shape) for part, tensor in zip(parts, group, strict=True)]
        torch._foreach_copy_([t.detach() for t in group], summed)  # pyright: ignore[reportPrivateImportUsage]


class DifferentiableSum(torch.autograd.Function):
    """The sum over all processes of a tensor, whose gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        """Return the sum."""
        total = tensor.clone()
        sum_([total])
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the sum of the gradients."""
        total = grad.clone(memory_format=torch.contiguous_format)
        sum_([total])
        return total


def joint(rows: Tensor, *, first: int, whole: int) -> Tensor:
    """Return the rows [whole, ...] of all processes, of which this one has [n, ...] from ``first``.

    Of bool, integer or floating type, and laid out as this process's are.
    """
    kind = torch.uint8 if rows.dtype == torch.bool else rows.dtype
    shape, strides = (whole, *rows.shape[1:]), (rows[0].numel(), *rows.stride()[1:])
    found = torch.empty_strided(shape, strides, dtype=kind, device=rows.device).zero_()
    found[first : first + len(rows)] = rows
    sum_([found])
    return found.to(rows.dtype)


def any_true(flag: bool) -> bool:
    """Return whether the flag is true in any process."""
    if processes() == 1:
        return flag
    told = torch.tensor([int(flag)])
    call(dist.all_reduce, told)
    return bool(told)


def each(work: Callable[[], T]) -> list[T]:
    """Return what ``work`` returns in each process, in their order.

    It must not wait for other processes. What it raises in one, all raise.
    """
    if processes() == 1:
        return [work()]
    value, error = attempt(work)
    found: list[Any] = [None] * processes()
    call(dist.all_gather_object, found, (value, error))
    raise_first([told for _, told in found], own=error)
    return [value for value, _ in found]


def first(work: Callable[[], T]) -> T:
    """Return what ``work`` returns in the first process, which alone does it; as :func:`each`."""
    if processes() == 1:
        return work()
    value, error = attempt(work) if writes() else (None, None)
    found: list[Any] = [(value, error)]
    call(dist.broadcast_object_list, found)
    raise_first([found[0][1]], own=error)
    return found[0][0]


def in_turn(work: Callable[[], T]) -> T:
    """Return what ``work`` returns, which the others do when the first process has done it."""
    if writes():
        done: list[T] = []
        first(lambda: done.append(work()))
        return done[0]
    first(lambda: None)
    return work()


@contextmanager
def first_in(opened: Callable[[], contextlib.AbstractContextManager[T]]) -> Iterator[T]:
    """Open a context in the first process alone; all get what it yields."""
    with contextlib.ExitStack() as stack:
        yield first(lambda: stack.enter_context(opened()))


def attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """Return what ``work`` returns, or raises."""
    try:
        return work(), None
    except LostError:
        raise
    except Exception as error:  # to be raised in every process
        return None, error


def raise_first(errors: Sequence[Exception | None], *, own: Exception | None) -> None:
    """Raise the first of the processes' errors; this one's ``own`` with its traceback."""
    for error in errors:
        if error is not None:
            raise own if own is not None and str(own) == str(error) else error


def call(collective: Callable[..., Any], *given: Any) -> None:
    """Call a collective; torch has plain RuntimeErrors for what happens to other processes."""
    try:
        collective(*given)
    except RuntimeError as error:
        raise LostError(reason(error)) from error


def reason(error: RuntimeError) -> str:
    """Return the first line of an error of torch's without the place in gloo's sources."""
    return str(error).strip().split("\n")[0].rpartition("] ")[2]
