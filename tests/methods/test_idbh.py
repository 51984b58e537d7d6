"""IDBH: what choosing it sets, and what its authors set for which network."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cure_fast.config import Config, DataConfig, PretrainConfig
from cure_fast.errors import InputError
from cure_fast.loaders.base import AUGMENTATIONS
from cure_fast.methods import check_config, find_method, paper_row, publish, select_method
from cure_fast.recipes import find_recipe
from cure_fast.training.data import read_data
from cure_fast.training.stages import natural_stage, new_model, pretrain_key


def idbh(recipe: str) -> Config:
    return select_method(find_recipe(recipe), "idbh")


def test_choosing_it_sets_augmentation_and_attack():
    config, recipe = idbh("cifar10-resnet18"), find_recipe("cifar10-resnet18")
    assert config.data == replace(recipe.data, augment="idbh-strong")
    assert config.attack == replace(recipe.attack, start="zero", attack_mode="train")
    assert config.optim == recipe.optim
    assert idbh("svhn-resnet18").data.augment == "idbh-svhn"
    check_config(config)


def test_it_is_pgd_at_but_for_the_images():
    method, base = find_method("idbh"), find_method("pgd_at")
    for name in ("attack", "loss", "settings"):
        assert getattr(method, name) == getattr(base, name)


@pytest.mark.parametrize(
    ("recipe", "augment", "aa"),
    [
        ("cifar10-preactresnet18", "idbh-strong", 50.74),
        ("cifar10-wrn34-10", "idbh-weak", 55.83),
        ("svhn-resnet18", "idbh-svhn", None),
    ],
)
def test_official_set_ups(recipe, augment, aa):
    config = publish(idbh(recipe))
    assert (config.data.augment, config.data.flip) == (augment, True)
    attack, optim = config.attack, config.optim
    assert (attack.start, attack.attack_mode, attack.attack_steps) == ("zero", "train", 10)
    assert (attack.eps, attack.step_size) == (8 / 255, 2 / 255)
    assert (optim.lr, optim.epochs, optim.weight_decay) == (0.1, 200, 5e-4)
    assert (optim.batch_size, optim.milestones) == (128, (0.5, 0.75))
    row = paper_row(config)
    assert (row and row.aa) == aa


def test_another_augmentation_is_refused():
    config = idbh("cifar10-resnet18")
    check_config(replace(config, data=replace(config.data, augment="idbh-weak")))
    with pytest.raises(InputError, match=r"--augment: expected one of IDBH's.*got 'crop-flip'"):
        check_config(replace(config, data=replace(config.data, augment="crop-flip")))


def test_a_natural_start_is_that_of_its_augmentation():
    data = DataConfig(data="digits", val_images=150)
    stage = PretrainConfig(pretrain_epochs=1)
    images, keys = read_data(Config(data=data)), set()
    for augment in AUGMENTATIONS:
        config = replace(Config(), data=replace(data, augment=augment), pretrain=stage)
        staged = natural_stage(config)
        keys.add(pretrain_key(staged, new_model(staged, 10), images, torch.device("cpu")))
    assert len(keys) == len(AUGMENTATIONS)
