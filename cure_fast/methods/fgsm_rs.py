"""FGSM-RS: adversarial training by one step from a random start (Wong et al., ICLR 2020, arXiv
2001.03994).

L = CE(x', y), where x' is one step of 1.25 eps from a uniform start in the ball, projected onto
ball and [0, 1]. Official code: locuslab/fast_adversarial, which computes in fp16. In longer runs,
or with longer steps, the network can lose its robustness to attacks of several steps within an
epoch (catastrophic overfitting).

``--step-size`` is that of the validation's attack alone here.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from torch import Tensor

from cure_fast.batch import Batch
from cure_fast.config import Config, MethodSettings
from cure_fast.config.checks import Weight, check
from cure_fast.methods import pgd_at
from cure_fast.step.method import Method, SetUp
from cure_fast.step.run import Run


class FgsmSettings(MethodSettings):
    """Single-step attack."""

    fgsm_step: Weight = 1.25
    """Length of the step as a multiple of --eps, 0 or more."""


def attack(run: Run, batch: Batch) -> Tensor:
    """Return images one step up the cross-entropy."""
    step = run.settings.fgsm_step * run.config.attack.eps
    return pgd_at.attack(run, batch, step_size=step)


def single_step(config: Config) -> Config:
    """Return ``config`` with one step from a uniform start."""
    return replace(config, attack=replace(config.attack, attack_steps=1, start="uniform"))


def check_steps(config: Config) -> None:
    """Raise ``InputError`` for an attack of more than one step, or none."""
    steps = config.attack.attack_steps
    wanted = f"1 with --method {config.method}, a single step (--method pgd_at takes more)"
    check(steps == 1, "attack_steps", steps, wanted)


def check_signs(config: Config) -> None:
    """Raise ``InputError`` for an attack of more than one step, or in another ball than L-inf."""
    check_steps(config)
    norm, wanted = config.attack.norm, f"linf with --method {config.method}, made of its corners"
    check(norm == "linf", "norm", norm, f"{wanted} (--method fgsm_rs takes l2)")


# The official codes' rate rises from 0 and falls to it, their images are normalised, and the attack
# moves BatchNorm's statistics.
cyclic = partial(
    SetUp,
    attack_steps=1,
    start="uniform",
    attack_mode="train",
    normalize="dataset",
    crop_padding=4,
    schedule="linear",
    lr_factors=(0.0, 1.0, 0.0),
)

FGSM_RS = Method(
    name="fgsm_rs",
    label="FGSM-RS",
    title="FGSM-RS: cross-entropy on images of one step from a random start",
    arxiv="2001.03994",
    paper="Wong, Rice and Kolter, Fast is better than free, ICLR 2020",
    settings=FgsmSettings(),
    attack=attack,
    loss=pgd_at.loss,
    check=check_steps,
    preset=single_step,
    one_step=True,
    published={
        "*": cyclic("locuslab/fast_adversarial", epochs=15, lr=0.2, milestones=(0.0, 0.5, 1.0)),
    },
)
