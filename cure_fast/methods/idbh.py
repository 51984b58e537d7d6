"""IDBH: PGD-AT whose images are augmented harder (Li and Spratling, ICLR 2023).

L = CE(x', y), of images through IDBH's augmentations (``loaders/idbh.py``): strong for networks of
limited capacity, weak for wide ones. Paper: openreview.net/forum?id=y4uc4NtTWaq, official code
TreeLLi/DA-Alone-Improves-AT.

That code hands the attack the natural images' gradient in the place of the first perturbation. As
it is tiny, the attack starts practically at the images; here exactly there (``--start zero``), and
BatchNorm's statistics miss the pass that computes that gradient. It drops an epoch's last, smaller
batch, which is trained on here. Its command for the wide network averages the weights too, which is
left to ``--policies``; for SVHN it has no command, and the set-up is its defaults.
"""

from __future__ import annotations

from functools import partial

from cure_fast.config import Config
from cure_fast.config.checks import check
from cure_fast.config.values import with_values
from cure_fast.methods.pgd_at import attack, loss
from cure_fast.step.method import Method, SetUp, rows

ATTACK = {"start": "zero", "attack_mode": "train"}


def augmented(config: Config) -> Config:
    """Return ``config`` with the strong augmentations, SVHN's for it, and the attack's start."""
    variant = "idbh-svhn" if config.data.data == "svhn" else "idbh-strong"
    return with_values(config, {"augment": variant, **ATTACK})


def check_augment(config: Config) -> None:
    """Raise ``InputError`` for an augmentation that is not IDBH's."""
    wanted = "one of IDBH's with --method idbh (--method pgd_at goes without)"
    augment = config.data.augment
    check(augment.startswith("idbh"), "augment", augment, wanted)


official = partial(SetUp, "TreeLLi/DA-Alone-Improves-AT", **ATTACK)

IDBH = Method(
    name="idbh",
    label="IDBH",
    title="PGD-AT on images that IDBH augments",
    arxiv="2301.09879",
    paper="Li and Spratling, Data Augmentation Alone Can Improve Adversarial Training, ICLR 2023",
    attack=attack,
    loss=loss,
    preset=augmented,
    check=check_augment,
    published={
        "svhn/*": official(augment="idbh-svhn"),
        "*/wrn*": official(augment="idbh-weak"),
        "*": official(augment="idbh-strong"),
    },
    rows=rows(
        "IDBH",
        ("cifar10", "preactresnet18", ", best epoch (CURE's Table 3)", 83.96, None, None, 50.74),
        ("cifar10", "wrn34-10", ", best epoch (CURE's Table 3)", 88.61, None, None, 55.83),
    ),
)
