"""Methods: what is optimised, as frozen records of functions."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from cure_fast.batch import Batch
from cure_fast.config import Config
from cure_fast.step.policy import Choice, Policy
from cure_fast.step.run import Run, Terms


@dataclass(frozen=True)
class PaperRow:
    """A published result in percent; ``None`` where the paper has no figure."""

    row: str
    natural: float
    pgd20: float | None
    cw20: float | None
    aa: float | None


# How papers write the models and data sets of their rows.
WRITTEN = {
    "resnet18": "ResNet-18",
    "preactresnet18": "PreActResNet-18",
    "wrn32-10": "WRN-32-10",
    "wrn34-10": "WRN-34-10",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "svhn": "SVHN",
}


def paper_rows(
    method: str, *rows: tuple[str, str, str, float, float | None, float | None, float | None]
) -> dict[tuple[str, str], PaperRow]:
    """Return rows by (data set, model), from these two, the row's place, and its figures."""
    return {
        (data, model): PaperRow(
            f"{method}, {WRITTEN[model]}, {WRITTEN[data]}{place}", natural, *robust
        )
        for data, model, place, natural, *robust in rows
    }


@dataclass(frozen=True, kw_only=True)
class Method(Choice):
    """A training method as a record of functions.

    Attributes:
        attack: from (run, batch) to adversarial images inside the eps-ball and [0, 1]; called with
            the model in ``attack_mode``. It may leave notes in the batch.
        loss: from (run, batch) to :data:`Terms`; called once per pass over a part of the batch.
        networks: builds further networks, which checkpoints store. Those whose parameters take
            gradients are trained by the run's optimiser, with the model.
        teachers: names networks that stay as they are, with a run folder or file of weights each.
        policies: builds the method's own policies.
        check: raises ``InputError`` for a configuration the method cannot run.
        preset: changes other parts of the configuration when the method is chosen by name.
        published: sets the official schedule, optimiser and attack for the configuration's data and
            model, for ``--regime published``; None where that is not known.
        phase: from the run to what its functions branch on besides the settings, such as the epoch.
            Steps of equal phase must do the same operations: the fast engine replays them. Numbers
            that change are asked of ``run.engine.number`` instead.
        rows: published results by (data set, model).
        uses_attack: False for a method that trains on natural images alone.
    """

    attack: Callable[[Run, Batch], Tensor]
    loss: Callable[[Run, Batch], Terms]
    networks: Callable[[Run], dict[str, nn.Module]] = lambda run: {}
    teachers: Callable[[Config], dict[str, str]] = lambda config: {}
    policies: Callable[[Run], tuple[Policy, ...]] = lambda run: ()
    check: Callable[[Config], None] = lambda config: None
    preset: Callable[[Config], Config] = lambda config: config
    published: Callable[[Config], Config] | None = None
    phase: Callable[[Run], Hashable] = lambda run: None
    rows: Mapping[tuple[str, str], PaperRow] = field(default_factory=dict)
    uses_attack: bool = True
