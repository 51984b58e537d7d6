"""What tensors must be that an operation changes in place: whole, and apart from the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from .checking import check_whole

Lists = Mapping[str, Sequence[Tensor] | None]
Place = tuple[str, int]  # name of a list, and where in it


def check_in_place(changed: Lists, read: Lists) -> None:
    """Check that what is changed fills its memory, and that no other argument has that memory.

    Args:
        changed: by the argument's name, lists of tensors that are changed; None for an absent one.
        read: lists of tensors that are only read, and may be given several times.

    Raises:
        ValueError: for a changed tensor with gaps, or one that begins where another one does.
    """
    for name, tensors in changed.items():
        if tensors is not None:
            check_whole(name, tensors)
    addresses = [address for tensors in changed.values() for address in _addresses(tensors)]
    own = set(addresses)
    if len(own) == len(addresses) and own.isdisjoint(
        address for tensors in read.values() for address in _addresses(tensors)
    ):
        return
    # Their names are put together only for the error: this is done at each step.
    seen: dict[int, Place] = {}
    for place, address in _places(changed):
        if address in seen:
            raise _same_memory(place, seen[address])
        seen[address] = place
    for place, address in _places(read):
        if address in seen:
            raise _same_memory(place, seen[address])


def _addresses(tensors: Sequence[Tensor] | None) -> list[int]:
    """Return where tensors begin; without 0, that of tensors without elements or without data."""
    return [address for address in map(Tensor.data_ptr, tensors or ()) if address]


def _places(lists: Lists) -> Iterator[tuple[Place, int]]:
    """Yield the place and address of every tensor that has elements."""
    for name, tensors in lists.items():
        for i, tensor in enumerate(tensors or ()):
            if address := tensor.data_ptr():
                yield (name, i), address


def _same_memory(place: Place, other: Place) -> ValueError:
    return ValueError(
        f"{place[0]}[{place[1]}]: expected a tensor with memory of its own, got that of "
        f"{other[0]}[{other[1]}], which is changed in place. Pass a copy, made once with "
        "tensor.detach().clone()."
    )
