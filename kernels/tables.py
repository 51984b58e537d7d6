"""Lists of tensors as kernels see them: tables of addresses and of chunks, on the device.

One launch covers a whole model. Its programs work on chunks of equal size; a table says which
tensor and which chunk of it a program has, another where each tensor begins. Offsets are counted
in chunks, never loaded, so that the compiler can prove their alignment and use 16-byte accesses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import torch
from torch import Tensor

# 16-byte loads and stores need addresses that are multiples of this.
ALIGNMENT = 16

# Of a tensor: its dtype, and whether its address is a multiple of ALIGNMENT. None: no tensor.
Kind = tuple[torch.dtype, bool] | None


def memory_order(tensor: Tensor) -> tuple[int, ...]:
    """Return the strides of the dimensions longer than 1: equal for tensors that lie alike."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return tuple(stride for size, stride in sizes if size != 1)


def is_dense(tensor: Tensor) -> bool:
    """Return whether the elements fill one piece of memory, each once, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def upload(
    values: Sequence[int] | Sequence[float] | np.ndarray, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return ``values`` as a tensor on ``device``, without waiting for the device.

    Raises:
        RuntimeError: while a CUDA graph is being captured: the graph would read host memory that
            is gone when it is replayed.
    """
    host = torch.as_tensor(values, dtype=dtype)
    if device.type != "cuda":
        return host.to(device)
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "tables cannot be built while a CUDA graph is captured. Build a TensorList of each "
            "list before the capture, call the operation once with it, and pass it again then."
        )
    return host.pin_memory().to(device, non_blocking=True)


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
    TensorList once where the tensors stay where they are, and always for a CUDA graph.

    Args:
        tensors: dense tensors of one device, kept alive by the list. None stands for a tensor that
            an operation goes without, where it allows that.
        names: what errors call them; their number in the list by default.

    Raises:
        ValueError: for a tensor that is not dense or on another device, and names that are not
            one per tensor.
        RuntimeError: while a CUDA graph is being captured.
    """

    def __init__(
        self, tensors: Sequence[Tensor | None], *, names: Sequence[str] | None = None
    ) -> None:
        self._tensors = tuple(tensors)
        self.names = tuple(names) if names is not None else tuple(map(str, range(len(self))))
        if len(self.names) != len(self):
            raise ValueError(f"names: expected {len(self)}, one per tensor, got {len(self.names)}.")
        present = [tensor for tensor in self._tensors if tensor is not None]
        self.device = present[0].device if present else torch.device("cpu")
        for name, tensor in zip(self.names, self._tensors, strict=True):
            if tensor is not None:
                self._check_tensor(name, tensor)
        self.kinds = tuple(map(_kind, self._tensors))
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in self._tensors]
        self.addresses = upload(addresses, torch.int64, self.device)
        self._sent = addresses
        self._captured: list[Tensor] = []
        self._plans: dict[object, Plan] = {}

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Tensor, ...]: ...

    def __getitem__(self, index: int | slice) -> Tensor | tuple[Tensor, ...]:
        return self._tensors[index]  # pyright: ignore[reportReturnType]

    def __len__(self) -> int:
        return len(self._tensors)

    def plan(self, *others: TensorList | None, chunk: int) -> Plan:
        """Return the chunks in which a kernel works on this list together with ``others``.

        Tensors without elements, and those that are None in this list, take no part. Plans are
        kept, so that a second call with lists of the same kind builds nothing.

        Args:
            others: lists of as many tensors; None for one that the operation goes without.
            chunk: elements per program.

        Raises:
            ValueError: for tensors that lie in memory in different orders, by name.
        """
        for other in others:
            if other is not None:
                self._check_order(other)
        absent = (None,) * len(self)
        kinds = (self.kinds, *(absent if other is None else other.kinds for other in others))
        if (chunk, kinds) not in self._plans:
            self._plans[chunk, kinds] = self._build(kinds, chunk)
        return self._plans[chunk, kinds]

    def point_to(self, tensors: Sequence[Tensor]) -> bool:
        """Take other tensors of the same kinds, shapes and memory order in place of these.

        Addresses are sent only where they changed, without waiting for the device.

        Returns:
            Whether that was possible; if not, nothing has changed.
        """
        if tuple(map(_kind, tensors)) != self.kinds:
            return False
        if list(map(_place, tensors)) != list(map(_place, self._tensors)):
            return False
        addresses = [tensor.data_ptr() for tensor in tensors]
        if addresses != self._sent:
            self._send(addresses)
        self._tensors = tuple(tensors)
        return True

    def _send(self, addresses: list[int]) -> None:
        """Write the table. What is captured in a CUDA graph reads its own host memory at replay."""
        host = torch.tensor(addresses, dtype=torch.int64)
        if self.device.type == "cuda":
            host = host.pin_memory()
            if torch.cuda.is_current_stream_capturing():
                self._captured.append(host)
        self.addresses.copy_(host, non_blocking=True)
        self._sent = addresses

    def _check_tensor(self, name: str, tensor: Tensor) -> None:
        if tensor.device != self.device:
            raise ValueError(
                f"{name}: expected all tensors on {self.device}, got one on {tensor.device}."
            )
        if not is_dense(tensor):
            raise ValueError(
                f"{name}: expected a tensor whose elements fill its memory without gaps, got shape "
                f"{list(tensor.shape)} with strides {tensor.stride()}. Pass a copy, such as "
                "tensor.contiguous()."
            )

    def _check_order(self, other: TensorList) -> None:
        for name, mine, others in zip(self.names, self._tensors, other._tensors, strict=True):
            if (
                mine is not None
                and others is not None
                and memory_order(mine) != memory_order(others)
            ):
                raise ValueError(
                    f"{name}: expected strides {mine.stride()} in every list, got "
                    f"{others.stride()}. Bring both into one memory format, for instance by "
                    "model.to(memory_format=torch.channels_last) before the lists are built."
                )

    def _build(self, kinds: tuple[tuple[Kind, ...], ...], chunk: int) -> Plan:
        sizes = [0 if tensor is None else tensor.numel() for tensor in self._tensors]
        groups: dict[tuple[tuple[torch.dtype | None, ...], bool], list[int]] = {}
        for i, size in enumerate(sizes):
            if not size:
                continue
            dtypes = tuple(kind[i] and kind[i][0] for kind in kinds)  # pyright: ignore[reportOptionalSubscript]
            aligned = all(kind[i][1] for kind in kinds if kind[i])  # pyright: ignore[reportOptionalSubscript]
            groups.setdefault((dtypes, aligned), []).append(i)
        return Plan(
            sizes=upload(sizes, torch.int32, self.device),
            groups=tuple(
                Group(*key, upload(_chunks(segments, sizes, chunk), torch.int32, self.device))
                for key, segments in groups.items()
            ),
        )


def _place(tensor: Tensor | None) -> object:
    return None if tensor is None else (tensor.shape, tensor.stride(), tensor.device)


def _kind(tensor: Tensor | None) -> Kind:
    return None if tensor is None else (tensor.dtype, tensor.data_ptr() % ALIGNMENT == 0)


def _chunks(segments: Sequence[int], sizes: Sequence[int], chunk: int) -> np.ndarray:
    """Return int32 [P, 2]: tensor, and number of the chunk in it."""
    counts = np.array([-(-sizes[i] // chunk) for i in segments])
    firsts = np.repeat(np.cumsum(counts) - counts, counts)
    numbers = np.arange(counts.sum()) - firsts
    return np.stack([np.repeat(segments, counts), numbers], axis=1).astype(np.int32)


def as_tensor_list(tensors: Sequence[Tensor | None]) -> TensorList:
    """Return ``tensors`` itself if it is a TensorList, else a new one."""
    return tensors if isinstance(tensors, TensorList) else TensorList(tensors)


def laid_out_like(tensors: Sequence[Tensor], likes: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return tensors, for reading, that lie in memory as ``likes`` do: copies where they do not.

    A TensorList is returned as it is: its addresses are fixed.
    """
    if isinstance(tensors, TensorList):
        return tensors
    return [
        tensor
        if memory_order(tensor) == memory_order(like)
        else torch.empty_strided(
            like.shape, like.stride(), dtype=tensor.dtype, device=tensor.device
        ).copy_(tensor)
        for tensor, like in zip(tensors, likes, strict=True)
    ]
