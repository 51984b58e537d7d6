"""What methods and policies see of a run: the networks, where it stands, and what they may ask."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from cure_fast import distributed
from cure_fast.attacks import draw_rows, pgd
from cure_fast.batch import Batch, Part
from cure_fast.classifier import ImageClassifier
from cure_fast.config import Config
from cure_fast.kernels import Selection
from cure_fast.loaders import Loader
from cure_fast.loaders.seeds import derive_seed

P = TypeVar("P")

# Named scalars of one step, each a mean over the images of a pass, so that passes add up by their
# share of the batch; "total" is the one that is minimised.
Terms = dict[str, Tensor]


class Engine(Protocol):
    """What computes the steps; engines do what is asked here in different ways.

    Attributes:
        name: as ``--engine`` takes it.
        reason: why it is not the engine that was asked for; None where it is.
        skip: 0-d bool tensor that tells whether the step under way moves nothing, where that is
            decided on the device; None where only finite steps come as far as the policies.
    """

    name: str
    reason: str | None
    skip: Tensor | None

    @property
    def description(self) -> str:
        """What rows and reports call it, with what it goes without and why."""
        ...

    def step(self, batch: Batch) -> Terms | None:
        """Train on one batch; return the detached terms, None where they are not finite."""
        ...

    def number(self, name: str, function: Callable[[Any], float]) -> float | Tensor:
        """Return ``function(run)``, or a 0-d tensor that holds it in each step."""
        ...

    @property
    def step_number(self) -> int | Tensor:
        """The 0-based step under way: an int, or a 0-d int64 tensor that holds it in each step."""
        ...

    def gradients(self, batch: Batch, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Return the gradients of the method's total at the weights as they are.

        BatchNorm statistics, ``.grad`` and ``run.gradients`` stay as they are.
        """
        ...

    def derive(self, term: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Return the gradients of a term inside a loss; its passes can be used again."""
        ...

    def weights_moved(self) -> None:
        """Take note that weights were changed between two steps."""

    def select(self, *lists: Sequence[Tensor], **settings: Any) -> Selection:
        """Return which weights may move, from parameters and the two gradients of each.

        Settings are ``percentile``, ``alpha`` and ``score`` (see :class:`cure_fast.kernels.RGP`).
        """
        ...

    def mask(self, parameters: Sequence[Tensor], selection: Selection) -> None:
        """Let the step's update see no gradient where a weight may not move."""

    def flush(self) -> None:
        """Bring the run's counters and sums up to date."""

    def reset_sums(self) -> None:
        """Begin the sums and counts of another epoch."""

    def forget(self) -> None:
        """Give up what was prepared for the run's tensors, as they are replaced."""


@dataclass(kw_only=True)
class Run:
    """What methods, policies and engines know of a run.

    Attributes:
        generators: sources of random numbers by use: ``attack``. Policies draw by (seed, step).
        networks: further networks by name: the method's own and those of policies.
        teachers: networks by name that stay as they are, and are in no checkpoint.
        policies: what else touches weights or gradients, in order.
        gradients: sets of gradients of the step under way beside ``.grad``, by term.
        epoch: 0-based epoch under way.
        batch: 0-based batch of the epoch that comes next, or is under way.
        step: 0-based step of the run that comes next, or is under way.
        lr: learning rate of the step under way.
        part: what of its images this process has, where others have some too; else None.
    """

    config: Config
    model: ImageClassifier
    loader: Loader
    device: torch.device
    generators: dict[str, torch.Generator]
    networks: dict[str, nn.Module] = field(default_factory=dict)
    teachers: Mapping[str, ImageClassifier] = field(default_factory=dict)
    policies: tuple[Any, ...] = ()
    gradients: dict[str, list[Tensor]] = field(default_factory=dict)
    epoch: int = 0
    batch: int = 0
    step: int = 0
    lr: float = 0.0
    part: Part | None = None
    engine: Engine = field(init=False)

    @property
    def settings(self) -> Any:
        """The method's settings, of the type its file defines."""
        return self.config.settings

    @property
    def total_steps(self) -> int:
        """Number of steps of the whole run."""
        return self.loader.batches_per_epoch * self.config.optim.epochs

    @property
    def position(self) -> int:
        """0-based place of the step among :attr:`total_steps`."""
        return self.epoch * self.loader.batches_per_epoch + self.batch

    @property
    def progress(self) -> float:
        """Share of the run's steps that is done, in [0, 1).

        Of the epochs and not of ``step``, which counts steps of another size too where
        ``--override`` changed the batches of a resumed run.
        """
        return self.position / self.total_steps

    @property
    def step_seed(self) -> int:
        """Seed of what a policy draws in the step, below 2**63; of the run's seed and the step."""
        return derive_seed(self.config.run.seed, self.step)

    @property
    def attack_steps(self) -> int:
        """Number of steps of the attack in this training step."""
        attack = self.config.attack
        if self.progress >= attack.attack_ramp:
            return attack.attack_steps
        grown = attack.attack_steps * self.progress / attack.attack_ramp
        return min(attack.attack_steps, 1 + int(grown))

    def policy(self, kind: type[P]) -> P:
        """Return the run's policy of type ``kind``."""
        return next(policy for policy in self.policies if isinstance(policy, kind))

    def drawn(self, like: Tensor, fill: Callable[[Tensor], Tensor]) -> Tensor:
        """Return random numbers shaped as ``like``, which has as many rows for each image.

        ``fill`` puts them in place into a tensor with rows for all images of the step, so that an
        image gets the same whichever process has it.
        """
        if self.part is None:
            return draw_rows(like, fill)
        first, count, whole = self.part
        own = torch.empty_like(like)
        each = len(own) // count
        shape, strides = (each * whole, *own.shape[1:]), (own[0].numel(), *own.stride()[1:])
        rows = torch.empty_strided(shape, strides, dtype=own.dtype, device=own.device)
        return fill(rows)[each * first : each * (first + count)]

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Put sums over the processes of the step in the place of tensors, which each of them has.

        Gradients of means are those of the whole batch where the mean was weighed by
        :func:`cure_fast.batch.weighed` before.
        """
        if self.part is not None:
            distributed.sum_(tensors)

    def of_all(self, rows: Tensor) -> Tensor:
        """Return the rows [N, ...] of all the step's images; ``rows`` [n, ...] are those here."""
        if self.part is None:
            return rows
        return distributed.joint(rows, first=self.part.first, whole=self.part.whole)

    def own_of(self, rows: Tensor) -> Tensor:
        """Return the rows of this process's images among those [N, ...] of all images."""
        if self.part is None:
            return rows
        return rows[self.part.first : self.part.first + self.part.number]

    def mean(self, rows: Tensor) -> Tensor:
        """Return the mean, 0-d, of a number for each image [n] over all images of the step."""
        if self.part is None:
            return rows.mean()
        mean = self.part.share * rows.mean()
        distributed.sum_([mean])
        return mean

    def pgd(self, x: Tensor, objective: Callable[[Tensor], Tensor], **other: Any) -> Tensor:
        """Return PGD images [N, C, H, W] that raise ``objective``, by the configured attack.

        Args:
            x: natural images [N, C, H, W] in [0, 1].
            objective: from logits [N, K] to a scalar, summed over the batch.
            other: arguments of :func:`cure_fast.attacks.pgd` that the method sets itself, and
                ``network`` where it is not the trained one that is attacked.
        """
        attack = self.config.attack
        configured: dict[str, Any] = {
            **{name: getattr(attack, name) for name in ("eps", "norm", "start", "clamp_start")},
            "step_size": attack.step_length,
            "steps": self.attack_steps,
            "generator": self.generators["attack"],
            "draw": self.drawn,
        }
        return pgd(other.pop("network", self.model), x, objective, **(configured | other))
