"""Recipes: whole configurations by name.

The paper's recipes follow Table 9 of CURE (Gowda et al., ICLR 2024) for percentile, alpha and
gamma. The table's weight decay of 5e-3 is ten times the field's and the public code's, so the
recipes take 5e-4; ``--weight-decay 5e-3`` gives the table's. The published results beside them are
the paper's claims, not measurements of this project.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from cure_fast.config import (
    AttackConfig,
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    PretrainConfig,
    RunConfig,
)
from cure_fast.config.checks import find
from cure_fast.loaders import DATASETS
from cure_fast.methods import METHODS, paper_row, select_method, set_up_of
from cure_fast.methods.cure import CureSettings
from cure_fast.models import MODELS
from cure_fast.step.method import PaperRow


@dataclass(frozen=True)
class Recipe:
    """A configuration, and what the help says of it; ``cure-fast list`` shows the first line."""

    config: Config
    about: str


QUICKSTART = Recipe(
    Config(
        name="quickstart",
        method="cure",
        settings=CureSettings(percentile=30, alpha=0.1, beta=5, gamma=1),
        data=DataConfig(data="digits", val_images=150, crop_padding=1, flip=False),
        model=ModelConfig(model="resnet-small", width=16),
        pretrain=PretrainConfig(pretrain_epochs=15, pretrain_lr=0.1, pretrain_schedule="onecycle"),
        attack=AttackConfig(eps=0.15, step_size=0.0375, attack_steps=10),
        optim=OptimConfig(epochs=20, batch_size=64, lr=0.1, schedule="onecycle"),
        eval=EvalConfig(attacks=("natural", "pgd20", "cw20", "aa"), aa_limit=100),
    ),
    """Handwritten digits with a small ResNet: natural start, CURE, attacks and report on a CPU.

1,437 training images of 8x8 pixels, which ship with cure-fast. The attack radius 0.15 breaks the
naturally trained start. About two minutes on two CPU cores; no network needed.""",
)


def figures(row: PaperRow | None) -> str:
    """Return a published result in a sentence."""
    if row is None:
        return "The paper prints no result for these settings."
    names = ("natural", "PGD-20", "C&W", "AutoAttack")
    scores = zip(names, (row.natural, row.pgd20, row.cw20, row.aa), strict=True)
    known = ", ".join(f"{k} {v:.2f}" for k, v in scores if v is not None)
    return f"Published for {row.row}: {known}."


FAST = Recipe(
    Config(
        name="cifar10-resnet18-fast",
        method="cure",
        settings=CureSettings(percentile=30, alpha=0.1, gamma=1, revision_decay=0.997),
        # Nothing to write or to compile before the first batch.
        data=DataConfig(data="cifar10", loader="resident"),
        model=ModelConfig(model="resnet18"),
        pretrain=PretrainConfig(pretrain_epochs=20, pretrain_lr=0.2, pretrain_schedule="onecycle"),
        optim=OptimConfig(epochs=70, lr=0.2, nesterov=True, schedule="onecycle"),
        eval=EvalConfig(
            attacks=("natural", "pgd20", "cw20", "aa"),
            aa_limit=1000,
            eval_step_size=0.003,
            networks=("revision",),
            val_every=10,
        ),
        run=RunConfig(checkpoint_every=10),
    ),
    """CIFAR-10, ResNet-18 in ten minutes: 20 natural and 70 CURE epochs; accuracy not measured yet.

Ten minutes of an NVIDIA H200 by estimate, none of it measured: 429 s of CURE if a step of 128
images takes 16 ms there, half a minute of natural training, a minute of start and compilation,
seven validations.

One cycle of the rate leaves no long stretch at a small one, in which a network overfits the attack.
So do the codes of HAT (Rade and Moosavi-Dezfooli, "Reducing Excessive Margin to Achieve a Better
Accuracy vs. Robustness Trade-off", ICLR 2022: 50 epochs, peak 0.21, Nesterov; natural 84.90 and
AutoAttack 49.08) and of Wong, Rice and Kolter ("Fast is better than free", ICLR 2020, arXiv
2001.03994: PGD-7, peak 0.2). The revision model averages over the same share of the run as in 200
epochs, 6 %; it is evaluated too, as averages of weights gain robustness elsewhere.""",
)

SMALL = Recipe(
    Config(
        name="cifar10-small",
        method="cure",
        settings=CureSettings(percentile=30, alpha=0.1, beta=5, gamma=1),
        data=DataConfig(data="cifar10", train_images=3000, val_images=500),
        model=ModelConfig(model="resnet-small", width=16),
        pretrain=PretrainConfig(pretrain_epochs=10, pretrain_schedule="onecycle"),
        attack=AttackConfig(attack_steps=7),
        optim=OptimConfig(epochs=8, batch_size=64, lr=0.1, schedule="onecycle"),
        eval=EvalConfig(
            attacks=("natural", "pgd20", "cw20", "aa"),
            limit=1000,
            aa_limit=100,
            eval_step_size=0.003,
            val_attack_steps=7,
        ),
    ),
    """CIFAR-10 at a size for CPUs: 3,000 images, a small ResNet, 8 epochs, PGD-7; 5 minutes.

For comparing methods under one small budget. Accuracies are far below the published ones, which
take 17 times the images, 25 times the epochs and 140 times the weights.""",
)


def published_recipe(name: str) -> Recipe | None:
    """Return METHOD-DATA-MODEL, a method as its authors train; None where that is not known.

    The method is written with hyphens, as in ``piat-nmse-cifar10-resnet18``.
    """
    for method in METHODS.values():
        prefix = f"{method.name.replace('_', '-')}-"
        data, _, model = name.removeprefix(prefix).partition("-")
        if not name.startswith(prefix) or data not in DATASETS or model not in MODELS:
            continue
        config = Config(
            name=name,
            data=DataConfig(data=data),
            model=ModelConfig(model=model),
            eval=EvalConfig(attacks=("natural", "pgd20", "cw20", "aa"), eval_step_size=0.003),
        )
        config = select_method(config, method.name)
        if found := set_up_of(config):
            config = found(config)
            title = f"{method.label} as in {found.source}: {config.optim.epochs} epochs."
            return Recipe(config, f"{title}\n\n{figures(paper_row(config))}")
    return None


def _cure(name: str, note: str = "") -> Recipe:
    """Return the recipe of CURE's Table 9 for DATA-MODEL, under that name alone."""
    found = published_recipe(f"cure-{name}")
    assert found is not None
    return Recipe(replace(found.config, name=name), f"{found.about} {note}".rstrip())


RECIPES = {
    recipe.config.name: recipe
    for recipe in (
        QUICKSTART,
        SMALL,
        _cure("cifar10-resnet18"),
        _cure("cifar100-resnet18"),
        _cure("svhn-resnet18", "It mirrors digits too, which --no-flip turns off."),
        _cure("cifar10-wrn34-10"),
        _cure("cifar100-wrn34-10"),
        _cure("cifar10-preactresnet18"),
        # Behind the paper's, as reports compare a run with the first recipe for its data and model.
        FAST,
    )
}


def published_recipes() -> list[str]:
    """Return the names of those for CIFAR-10: of ResNet-18, and of what has a set-up or row."""
    names = []
    for method in METHODS.values():
        found = {}
        for model in ("resnet18", "wrn34-10", "vit-base"):
            config = Config(method=method.name, model=ModelConfig(model=model))
            own, known = set_up_of(config), ("cifar10", model) in method.rows
            if own and (known or own not in found.values()):
                found[model] = own
        names += [f"{method.name.replace('_', '-')}-cifar10-{model}" for model in found]
    return names


def recipe_called(name: str) -> Recipe | None:
    """Return the recipe of that name, None for an unknown one."""
    return RECIPES.get(name) or published_recipe(name)


def find_recipe(name: str) -> Config:
    """Return the configuration of the recipe ``name``; raise ``InputError`` for an unknown one."""
    recipe = recipe_called(name)
    if recipe is not None:
        return recipe.config
    expected = "a run folder, METHOD-DATA-MODEL such as trades-cifar10-resnet18, or one of"
    return find("RECIPE", RECIPES, name, expected=expected).config
