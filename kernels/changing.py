"""Tables of lists whose tensors are others from call to call."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .tables import TensorList


class ChangingList:
    """The tables of a list whose tensors are others from call to call, such as gradients."""

    def __init__(self) -> None:
        self.tables: list[TensorList] = []

    def find(self, tensors: Sequence[Tensor]) -> TensorList | None:
        """Return a former table, which points to ``tensors`` now; None where none fits."""
        return next((table for table in self.tables if table.point_to(tensors)), None)

    def build(self, tensors: Sequence[Tensor], names: Sequence[str] | None = None) -> TensorList:
        """Return a new table; see :class:`TensorList` for ``names`` and errors."""
        table = TensorList(tensors, names=names)
        # A graph goes on to read what it has captured; another table would never fit again.
        self.tables = [*(former for former in self.tables if former.is_captured), table]
        return table

    def of(self, tensors: Sequence[Tensor]) -> TensorList:
        """Return a table that points to ``tensors``, a former one where it fits."""
        found = self.find(tensors)
        return self.build(tensors) if found is None else found

    def release(self) -> None:
        """Let go of the tensors, once what reads them was launched.

        Their memory is then free for the next step, whose gradients so have the same addresses.
        """
        for table in self.tables:
            table.release()
