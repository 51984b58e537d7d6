"""Methods: what is optimised, as frozen records of functions."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from cure_fast.batch import Batch
from cure_fast.config import Config, MethodSettings
from cure_fast.config.checks import check
from cure_fast.config.values import with_values
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
    "vit-base": "ViT-B",
    "deit-small": "DeiT-S",
    "convit-base": "ConViT-B",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "svhn": "SVHN",
}


def rows(
    method: str, *figures: tuple[str, str, str, float, float | None, float | None, float | None]
) -> dict[tuple[str, str], PaperRow]:
    """Return rows by (data set, model), from these two, the row's place, and its figures."""
    return {
        (data, model): PaperRow(
            f"{method}, {WRITTEN[model]}, {WRITTEN[data]}{place}", natural, *robust
        )
        for data, model, place, natural, *robust in figures
    }


# Radius and step of TRADES' code, which others took over: they test within 8/255. Its start is not
# clamped to [0, 1]. At another radius its step is the same share of it.
STEP_007 = 0.007 / 0.031
EPS_031 = {"eps": 0.031, "step_share": STEP_007, "clamp_start": False, "eval_eps": 8 / 255}


class SetUp:
    """How a method's authors train: values of flags; schedule and attack are else the plain ones.

    Args:
        source: what the values were read in.
        values: flags of any section, the method's settings and its policies' among them.
    """

    def __init__(self, source: str, **values: Any) -> None:
        self.source, self.values = source, values

    def __call__(self, config: Config) -> Config:
        """Return the configuration with this set-up."""
        plain = Config()
        config = replace(config, pretrain=plain.pretrain, attack=plain.attack, optim=plain.optim)
        return with_values(config, self.values)


@dataclass(frozen=True, kw_only=True)
class Method(Choice):
    """A training method as a record of functions.

    Attributes:
        attack: from (run, batch) to adversarial images inside [0, 1] and, unless its file says so,
            the eps-ball; called with the model in ``attack_mode``. It may leave notes in the batch.
        loss: from (run, batch) to :data:`Terms`; called once per pass over a part of the batch.
        networks: builds further networks, which checkpoints store. Those whose parameters take
            gradients are trained by the run's optimiser, with the model.
        teachers: names of the networks that it learns from, which stay as they are: ``natural``
            and ``robust``, which --teacher gives.
        policies: builds the method's own policies.
        check: raises ``InputError`` for a configuration the method cannot run.
        preset: changes other parts of the configuration when the method is chosen by name.
        published: official set-ups by patterns of ``data/model``, of which the first that fits
            counts, for ``--regime published`` and recipes; empty where none is known.
        phase: from the run to what its functions branch on besides the settings, such as the epoch.
            Steps of equal phase must do the same operations: the fast engine replays them. Numbers
            that change are asked of ``run.engine.number`` instead.
        rows: published results by (data set, model).
        uses_attack: False for a method that trains on natural images alone.
        one_step: whether its attack has one step, whose length ``--step-size`` does not say; each
            validation looks for catastrophic overfitting.
        needs_attention: True for a method of transformers alone.
    """

    attack: Callable[[Run, Batch], Tensor]
    loss: Callable[[Run, Batch], Terms]
    networks: Callable[[Run], dict[str, nn.Module]] = lambda run: {}
    teachers: tuple[str, ...] = ()
    policies: Callable[[Run], tuple[Policy, ...]] = lambda run: ()
    check: Callable[[Config], None] = lambda config: None
    preset: Callable[[Config], Config] = lambda config: config
    published: Mapping[str, SetUp] = field(default_factory=dict)
    phase: Callable[[Run], Hashable] = lambda run: None
    rows: Mapping[tuple[str, str], PaperRow] = field(default_factory=dict)
    uses_attack: bool = True
    one_step: bool = False
    needs_attention: bool = False


def with_policies(
    base: Method, *, name: str, policies: Mapping[str, MethodSettings], **changes: Any
) -> Method:
    """Return a method that is ``base`` with these policies, and refused without them.

    Settings that a configuration has chosen for them stay; rows of ``base`` are not its own.
    """

    def preset(config: Config) -> Config:
        return base.preset(replace(config, policies={**policies, **config.policies}))

    def check_policies(config: Config) -> None:
        base.check(config)
        for policy in policies:
            given = ",".join(config.policies) or "none"
            without = "" if base.name == name else f" (--method {base.name} goes without)"
            wanted = f"{policy} among --policies with --method {name}{without}"
            check(policy in config.policies, "policies", given, wanted)

    own = {"name": name, "preset": preset, "check": check_policies, "rows": {}}
    return replace(base, **(own | changes))
