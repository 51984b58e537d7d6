"""The images of one step, and what parts of the step tell later parts about each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor


class Part(NamedTuple):
    """Where the images that a process has of a step stand among those of all processes.

    Attributes:
        first: place of the first of them, from 0.
        number: how many they are.
        whole: number of images of the step.
    """

    first: int
    number: int
    whole: int

    @property
    def share(self) -> float:
        """What a mean over them counts in the mean over all."""
        return self.number / self.whole

    @property
    def rows(self) -> slice:
        """Their places."""
        return slice(self.first, self.first + self.number)


def weighed(mean: Tensor, part: Part | None) -> Tensor:
    """Return a mean over the images of a part as what it counts in the mean over the step's.

    It is weighed before gradients are taken: on the way back a BatchNorm of all processes adds up
    theirs.
    """
    return mean if part is None else part.share * mean


@dataclass(frozen=True, eq=False)
class Batch:
    """The images of one step, as every loader yields them.

    A step may be tried again in smaller pieces. So its attack and its loss change no state: they
    leave notes, and policies take those over once the step is done.

    Attributes:
        x: natural images [N, C, H, W] in [0, 1], float32, channels_last.
        y: labels [N] int64.
        index: place of each image in the training set [N] int64.
        made: what the method's attack made of the images, shaped as they are; None before it.
        notes: tensors [N, ...] by name that one part of the step leaves for a later one: the
            attack for the loss, either of them for a policy.
        part: where they stand where other processes have images of the step too; else None.
    """

    x: Tensor
    y: Tensor
    index: Tensor
    made: Tensor | None = None
    notes: dict[str, Tensor] = field(default_factory=dict)
    part: Part | None = None

    def __len__(self) -> int:
        return len(self.y)

    @property
    def whole(self) -> int:
        """Number of images of the step, in all processes."""
        return len(self) if self.part is None else self.part.whole

    @property
    def x_adv(self) -> Tensor:
        """The adversarial images; the natural ones before the attack."""
        return self.x if self.made is None else self.made

    def attacked(self, x_adv: Tensor) -> Batch:
        """Return the batch with adversarial images; it shares its notes with this one."""
        return replace(self, made=x_adv)

    def split(self, pieces: int) -> list[Batch]:
        """Return the batch in ``pieces`` parts whose lengths differ by one at most.

        What is noted in a part is its own until :meth:`join`, so that a try that fails leaves the
        batch as it was.
        """
        if pieces == 1:
            return [replace(self, notes=dict(self.notes))]
        fields = {"x": self.x, "y": self.y, "index": self.index, "made": self.made}
        cut = {k: t.tensor_split(pieces) for k, t in fields.items() if t is not None}
        notes = {name: note.tensor_split(pieces) for name, note in self.notes.items()}
        return [
            Batch(
                **{name: parts[place] for name, parts in cut.items()},
                notes={name: parts[place] for name, parts in notes.items()},
            )
            for place in range(pieces)
        ]

    def join(self, pieces: Sequence[Batch]) -> None:
        """Take over the notes of the parts, in order, without their gradients."""
        for name in pieces[0].notes:
            parts = [piece.notes[name].detach() for piece in pieces]
            self.notes[name] = parts[0] if len(parts) == 1 else torch.cat(parts)
