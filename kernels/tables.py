"""Lists of tensors as kernels see them: tables of addresses and of chunks, on the device.

One launch covers a whole model. Its programs work on chunks of equal size; a table says which
tensor and which chunk of it a program has, another where each tensor begins. Offsets are counted
in chunks, never loaded, so that the compiler can prove their alignment and use 16-byte accesses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar, overload

import torch
from torch import Tensor

from .layout import Kind, Layout, check_dense, is_dense, kind_of, memory_order

T = TypeVar("T", bound=Tensor | None)

# How often a list can be sent in captures between two uses outside of one.
CAPTURES = 32


def is_capturing(device: torch.device) -> bool:
    """Return whether work on ``device`` is being captured in a CUDA graph."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):  # What torch answers is about the current device alone.
        return torch.cuda.is_current_stream_capturing()


def upload(
    values: Sequence[int] | Sequence[float] | Tensor, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return ``values`` as a tensor on ``device``, without waiting for the device.

    Raises:
        RuntimeError: while a CUDA graph is being captured: the graph would read host memory that
            is gone when it is replayed.
    """
    _refuse_capture(device)
    host = torch.as_tensor(values, dtype=dtype, device="cpu")
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


def _refuse_capture(device: torch.device) -> None:
    if is_capturing(device):
        raise RuntimeError(
            "tables cannot be built while a CUDA graph is captured. Build a TensorList of each "
            "list before the capture, call the operation once with it, and pass it again then."
        )


@dataclass(frozen=True)
class Group:
    """Chunks of tensors that one compiled kernel can work on.

    Attributes:
        dtypes: dtype of the tensors in each list of the plan; None where there is no tensor.
        aligned: whether every address is a multiple of 16 bytes.
        chunks: int32 [P, 2] on the device: tensor, and chunk in it, of each program.
    """

    dtypes: tuple[torch.dtype | None, ...]
    aligned: bool
    chunks: Tensor


@dataclass(frozen=True)
class Plan:
    """How programs share the tensors of lists that belong together.

    Attributes:
        sizes: int32 [L] on the device, elements of each tensor of the first list.
        groups: one launch each; a single one where dtypes and alignment are uniform.
    """

    sizes: Tensor
    groups: tuple[Group, ...]


class TensorList(Sequence[Tensor]):
    """A list of tensors with the table of their addresses on their device.

    Every operation takes plain lists too, and then builds its tables anew at each call. Build a
    TensorList once where the tensors stay where they are, and always for a CUDA graph. A graph
    reads the list's tables whenever it is replayed: keep the list as long as the graph.

    Args:
        tensors: dense tensors of one device, kept alive by the list. None stands for a tensor that
            an operation goes without, where it allows that.
        names: what errors call them; by default ``label`` and their number in the list.
        label: what errors call the list; the argument's name where it is passed to an operation.
        device: where the tables go; by default where the tensors are, or the CPU without any.

    Raises:
        ValueError: for a tensor that is not dense or on another device, and names that are not
            one per tensor.
        RuntimeError: while a CUDA graph is being captured.
    """

    # In inference mode the tables would be tensors that nothing could change afterwards.
    @torch.inference_mode(mode=False)
    def __init__(
        self,
        tensors: Sequence[Tensor | None],
        *,
        names: Sequence[str] | None = None,
        label: str = "tensors",
        device: torch.device | None = None,
    ) -> None:
        self._tensors, self._released = tuple(tensors), False
        self._names = None if names is None else tuple(names)
        self.label = label
        if self._names is not None and len(self._names) != len(self):
            raise ValueError(
                f"names: expected {len(self)}, one per tensor, got {len(self._names)}."
            )
        places = [tensor.device for tensor in self._tensors if tensor is not None]
        self.device = device or (places[0] if places else torch.device("cpu"))
        for i, tensor in enumerate(self._tensors):
            if tensor is not None:
                self._check_tensor(self.name_of(i), tensor)
        self.layout = Layout(self._tensors)
        self._strides = tuple(t if t is None else t.stride() for t in self._tensors)
        _refuse_capture(self.device)
        self._sent = _addresses(self._tensors)
        # One row for now, the others for captures: a graph reads its row at each replay, and
        # pinned memory cannot be had during a capture in every release of torch.
        self._host, self._rows_used = self._pinned(1 + CAPTURES), 1
        first = self._host[0].copy_(torch.tensor(self._sent, dtype=torch.int64, device="cpu"))
        # A copy on every device, as the table is written again by `point_to`.
        self.addresses = first.to(self.device, non_blocking=True, copy=True)
        self._captured: list[Tensor] = []
        self._plans: dict[object, Plan] = {}

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Tensor, ...]: ...

    def __getitem__(self, index: int | slice) -> Tensor | tuple[Tensor, ...]:
        self._check_held()
        return self._tensors[index]  # pyright: ignore[reportReturnType]

    def __iter__(self) -> Iterator[Tensor]:
        self._check_held()
        return iter(self._tensors)  # pyright: ignore[reportReturnType]

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def is_captured(self) -> bool:
        """Whether a CUDA graph sends the table, and so reads it."""
        return bool(self._captured)

    def name_of(self, index: int) -> str:
        """Return what errors call a tensor."""
        return f"{self.label}[{index}]" if self._names is None else self._names[index]

    def plan(self, *others: TensorList | None, chunk: int) -> Plan:
        """Return the chunks in which a kernel works on this list together with ``others``.

        Tensors without elements, and those that are None in this list, take no part. Plans are
        kept, so that a second call with lists of the same layout checks and builds nothing.

        Args:
            others: lists of as many tensors; None for one that the operation goes without.
            chunk: elements per program.

        Raises:
            ValueError: for tensors that lie in memory in different orders, by name.
        """
        key = (chunk, *(None if other is None else other.layout for other in others))
        plan = self._plans.get(key)
        if plan is None:
            for other in others:
                if other is not None:
                    self._check_order(other)
            plan = self._plans[key] = self._build(others, chunk)
        return plan

    def point_to(self, tensors: Sequence[Tensor]) -> bool:
        """Take other tensors of the same kinds, shapes and memory order in place of these.

        Addresses are sent where they changed, without waiting for the device. During the capture
        of a CUDA graph they are always sent, so that the graph sends them at each replay; from
        then on every other call sends them too, as replays write the table unseen. So call this
        before each use of a list whose tensors change, and use it on one stream at a time.

        Returns:
            Whether that was possible; if not, nothing has changed.

        Raises:
            RuntimeError: in a capture, if this list was captured too often since its last use
                outside of one.
        """
        layout = self.layout
        if len(tensors) != len(self) or not all(
            map(self._fits, tensors, layout.shapes, layout.orders, layout.kinds, self._strides)
        ):
            return False
        self._send(_addresses(tensors))
        self._tensors, self._released = tuple(tensors), False
        return True

    def release(self) -> None:
        """Let go of the tensors until the next :meth:`point_to`, unless a CUDA graph reads them."""
        if not self.is_captured:
            self._tensors, self._released = (None,) * len(self), True

    def check_unmoved(self) -> None:
        """Check that no tensor has moved since its address was sent.

        Raises:
            ValueError: if one has, by name.
        """
        self._check_held()
        found = _addresses(self._tensors)
        if found != self._sent:
            moved = [a != b for a, b in zip(found, self._sent, strict=True)].index(True)
            raise ValueError(
                f"{self.name_of(moved)}: expected a tensor that stays where it was when its "
                "TensorList was built, got one that has moved, as after an assignment to .data or "
                "a model.to(). Build the list again."
            )

    def _check_held(self) -> None:
        if self._released:
            raise ValueError(
                f"{self.label}: expected a list with its tensors, got one that has let go of them "
                "by release(). Call point_to() with tensors first."
            )

    def _fits(
        self,
        tensor: object,
        shape: torch.Size | None,
        order: tuple[int, ...] | None,
        kind: Kind,
        stride: tuple[int, ...] | None,
    ) -> bool:
        """Return whether a tensor can take the place of one of the list."""
        if not isinstance(tensor, Tensor) or shape is None:
            return tensor is None and shape is None
        return (
            tensor.layout == torch.strided
            and tensor.shape == shape
            and tensor.device == self.device
            and (tensor.stride() == stride or memory_order(tensor) == order)
            and kind_of(tensor) == kind
        )

    def _send(self, addresses: list[int]) -> None:
        """Write the table, where it can hold anything else."""
        if is_capturing(self.device):
            if self._rows_used == len(self._host):
                raise RuntimeError(
                    f"{self.label}: a TensorList can be captured {CAPTURES} times between two uses "
                    "outside of a capture. Call the operation once outside, then capture again."
                )
            host = self._host[self._rows_used]
            self._rows_used += 1
            self._captured.append(host)
        elif self.is_captured or addresses != self._sent:
            if self._rows_used > 1:
                self._host, self._rows_used = self._pinned(1 + CAPTURES), 1
            host = self._pinned(1)[0]
        else:
            return
        self._write(host.copy_(torch.tensor(addresses, dtype=torch.int64, device="cpu")))
        self._sent = addresses

    def _write(self, host: Tensor) -> None:
        self.addresses.copy_(host, non_blocking=True)

    def _pinned(self, rows: int) -> Tensor:
        """Return int64 [rows, L] of host memory that the device can read by itself."""
        pinned = self.device.type == "cuda"
        shape = (rows, len(self))
        return torch.empty(shape, dtype=torch.int64, device="cpu", pin_memory=pinned)

    def _check_tensor(self, name: str, tensor: Tensor) -> None:
        if tensor.device != self.device:
            raise ValueError(
                f"{name}: expected all tensors on {self.device}, got one on {tensor.device}."
            )
        check_dense(name, tensor)

    def _check_order(self, other: TensorList) -> None:
        for i, (mine, others) in enumerate(
            zip(self.layout.orders, other.layout.orders, strict=True)
        ):
            if mine is not None and others is not None and mine != others:
                raise ValueError(
                    f"{other.name_of(i)}: expected strides {self._strides[i]}, those of "
                    f"{self.name_of(i)}, got {other._strides[i]}. Bring both into one memory "
                    "format, for instance by model.to(memory_format=torch.channels_last) before "
                    "the lists are built."
                )

    def _build(self, others: Sequence[TensorList | None], chunk: int) -> Plan:
        absent = (None,) * len(self)
        kinds = [self.layout.kinds]
        kinds += [absent if other is None else other.layout.kinds for other in others]
        groups: dict[tuple[tuple[torch.dtype | None, ...], bool], list[int]] = {}
        for i, size in enumerate(self.layout.sizes):
            if not size:
                continue
            own = [kind[i] for kind in kinds]
            dtypes = tuple(None if kind is None else kind[0] for kind in own)
            aligned = all(kind is None or kind[1] for kind in own)
            groups.setdefault((dtypes, aligned), []).append(i)
        sizes = self.layout.sizes
        return Plan(
            sizes=upload(sizes, torch.int32, self.device),
            groups=tuple(
                Group(*key, upload(_chunks(segments, sizes, chunk), torch.int32, self.device))
                for key, segments in groups.items()
            ),
        )


def _addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def _chunks(segments: Sequence[int], sizes: Sequence[int], chunk: int) -> Tensor:
    """Return int64 [P, 2]: tensor, and number of the chunk in it."""
    counts = torch.tensor([-(-sizes[i] // chunk) for i in segments], device="cpu")
    tensors = torch.tensor(segments, device="cpu").repeat_interleave(counts)
    firsts = (counts.cumsum(0) - counts).repeat_interleave(counts)
    numbers = torch.arange(len(tensors), device="cpu") - firsts
    return torch.stack([tensors, numbers], dim=1)


def as_tensor_list(tensors: Sequence[Tensor | None], label: str = "tensors") -> TensorList:
    """Return ``tensors`` itself if it is a TensorList, else a new one; errors say ``label``.

    Raises:
        ValueError: for a TensorList of which a tensor has moved, or tensors that make no list.
    """
    if not isinstance(tensors, TensorList):
        return TensorList(tensors, label=label)
    tensors.label = label
    tensors.check_unmoved()
    return tensors


def laid_out_like(tensors: Sequence[T], likes: Sequence[Tensor | None]) -> Sequence[T]:
    """Return tensors, for reading, that lie in memory as ``likes`` do: copies where they do not.

    A TensorList is returned as it is: its addresses are fixed.
    """
    if isinstance(tensors, TensorList):
        return tensors  # pyright: ignore[reportReturnType]
    return [
        _copy_like(tensor, like)  # pyright: ignore[reportReturnType]
        if tensor is not None and like is not None and memory_order(tensor) != memory_order(like)
        else tensor
        for tensor, like in zip(tensors, likes, strict=True)
    ]


def _copy_like(tensor: Tensor, like: Tensor) -> Tensor:
    place = torch.empty_strided(like.shape, like.stride(), dtype=tensor.dtype, device=tensor.device)
    return place.copy_(tensor)


def without_gaps(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return tensors, for reading, that fill their memory: copies where they do not."""
    if isinstance(tensors, TensorList):
        return tensors
    return [tensor if is_dense(tensor) else tensor.contiguous() for tensor in tensors]
