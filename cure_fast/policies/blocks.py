"""Blocks: some stages of a network train, the others stay as they are (CURE, Section 3, App. G).

The study U-b of CURE's Fig. 2 to 4 and 11: of a naturally trained ResNet the stages b are trained
adversarially. The authors' code freezes by ``requires_grad``, never freezes the stem, and lets the
BatchNorm statistics of frozen stages follow the batches; here frozen is frozen by default, and
both are settings. It draws the chosen stages' convolutions anew for Fig. 2b, and leaves their
BatchNorm as it was.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn

from cure_fast.batch import Batch
from cure_fast.classifier import ImageClassifier
from cure_fast.config import MethodSettings
from cure_fast.config.checks import check
from cure_fast.errors import InputError
from cure_fast.step.policy import Policy, PolicyInfo
from cure_fast.step.run import Run


class BlocksSettings(MethodSettings):
    """Which parts of the network train."""

    blocks_train: tuple[int, ...] = (1,)
    """Stages that train, with commas between: 1 is layer1; none trains what else is named."""
    blocks_reinit: bool = False
    """Draw the convolutions of these stages anew before the first step (Fig. 2b)."""
    blocks_stem: Literal["frozen", "trained"] = "frozen"
    """The first convolution and its BatchNorm (code: trained, whatever is chosen)."""
    blocks_classifier: Literal["frozen", "trained"] = "frozen"
    """What follows the last stage (trained is the 5 of the code's lists)."""
    blocks_statistics: Literal["eval", "train"] = "eval"
    """BatchNorm of what is frozen: as in evaluation, with statistics that stay; or as in training,
    by the batch, with statistics that follow (code)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        stages = self.blocks_train
        right = all(stage >= 1 for stage in stages) and len({*stages}) == len(stages)
        check(right, "blocks_train", stages, "stages from 1, each once")


def stages_of(model: ImageClassifier) -> list[str]:
    """Return the names of a ResNet's stages, ``layer1`` and so on, in order; of others none."""
    return [name for name, _ in model.named_children() if re.fullmatch(r"layer[0-9]+", name)]


def chosen_parts(model: ImageClassifier, settings: BlocksSettings) -> list[str]:
    """Return the names of the top-level modules that train.

    Raises:
        InputError: for a stage that the network lacks, or where nothing would train.
    """
    stages = stages_of(model)
    expected = f"stages from 1 to {len(stages)}" if stages else "a network with stages, a ResNet"
    inside = all(1 <= number <= len(stages) for number in settings.blocks_train)
    check(bool(stages) and inside, "blocks_train", settings.blocks_train, expected)
    chosen = [stages[number - 1] for number in sorted({*settings.blocks_train})]
    rest = [name for name, _ in model.named_children() if name not in stages]
    stem = [name for name in rest if name in model.stem_names]
    if settings.blocks_stem == "trained":
        chosen += stem
    if settings.blocks_classifier == "trained":
        chosen += [name for name in rest if name not in stem]
    if not chosen:
        raise InputError(
            "--blocks-train: expected at least one part that trains, got none. Name a stage, or "
            "give --blocks-stem trained or --blocks-classifier trained."
        )
    return chosen


class Freeze(Policy):
    """Holds all weights but those of the chosen parts, weight decay and momentum included."""

    def __init__(self, run: Run, settings: BlocksSettings) -> None:
        super().__init__()
        chosen = tuple(f"{name}." for name in chosen_parts(run.model, settings))
        named = run.model.named_parameters()
        self.frozen = [weight for name, weight in named if not name.startswith(chosen)]
        self.still = [
            module
            for name, module in run.model.named_modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
            and not f"{name}.".startswith(chosen)
            and settings.blocks_statistics == "eval"
        ]

    def before(self, run: Run, batch: Batch) -> None:
        """Put the BatchNorm of what is frozen into evaluation mode, which an epoch begins without.

        Attack and validation give each module the mode back that they found.
        """
        for module in self.still:
            module.eval()

    @contextmanager
    def around(self, run: Run, batch: Batch) -> Iterator[None]:
        """Give frozen weights back the values that they have as the context begins.

        Not the first ones: another policy may hold them elsewhere for the step, and takes them back
        itself by the way that it moved them.
        """
        weights = [weight.detach() for weight in self.frozen]
        saved = [weight.clone() for weight in weights]
        yield
        for weight, value in zip(weights, saved, strict=True):
            weight.copy_(value)

    def on_grads(self, run: Run) -> None:
        """Zero their gradients, which count in the norm that clips, and in masks."""
        for weight in self.frozen:
            if weight.grad is not None:
                weight.grad.zero_()


def draw_anew(model: ImageClassifier, names: list[str], seed: int) -> None:
    """Draw the convolutions of these modules as He et al. (2015) do, uniformly by their fan-out."""
    generator = torch.Generator().manual_seed(seed)
    for name in names:
        for module in model.get_submodule(name).modules():
            if isinstance(module, nn.Conv2d):
                drawn = torch.empty(module.weight.shape)
                nn.init.kaiming_uniform_(
                    drawn, mode="fan_out", nonlinearity="relu", generator=generator
                )
                module.weight.detach().copy_(drawn)


def build(run: Run, settings: BlocksSettings) -> Policy:
    """Return the policy; policies that are named behind it begin with the weights drawn anew."""
    policy = Freeze(run, settings)
    if settings.blocks_reinit:
        stages = stages_of(run.model)
        chosen = [stages[number - 1] for number in sorted({*settings.blocks_train})]
        draw_anew(run.model, chosen, run.config.run.seed)
    return policy


BLOCKS = PolicyInfo(
    name="blocks",
    label="U-b",
    title="U-b: some stages of the network train, the others stay as they are",
    arxiv="2401.14948",
    paper="Gowda et al., Conserve-Update-Revise to Cure Generalization and Robustness, ICLR 2024",
    settings=BlocksSettings(),
    build=build,
    fixed=("blocks_reinit",),
)
