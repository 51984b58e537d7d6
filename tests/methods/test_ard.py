"""ARD against its official loss, in double precision, its factor, and its rate."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tiny_step
from cure_fast.methods import publish, select_method
from cure_fast.recipes import find_recipe
from cure_fast.step.train_step import train_step
from cure_fast.training.schedules import lr_at
from known_logits import CLASSES, Step

SEES = {"model": ("adversarial", "natural"), "robust": ("natural",)}


def official_loss(made, alpha, temp):
    """The line of goldblum/AdversariallyRobustDistillation's main.py."""
    outputs, basic_outputs = made.logits["model"].values()
    teacher_outputs = made.logits["robust"]["natural"]
    # PyTorch's default mean, of all elements.
    kl_loss = nn.KLDivLoss(reduction="mean")
    kl = kl_loss(F.log_softmax(outputs / temp, dim=1), F.softmax(teacher_outputs / temp, dim=1))
    return alpha * temp * temp * kl + (1.0 - alpha) * F.cross_entropy(basic_outputs, made.y)


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
@pytest.mark.parametrize(("alpha", "temperature"), [(1.0, 30.0), (0.7, 5.0), (0.0, 1.0)])
def test_loss_and_gradients_are_the_official_ones(alpha, temperature):
    made = Step(SEES)
    terms = made.terms("ard", alpha=alpha, temperature=temperature)
    made.assert_equal(terms["total"], official_loss(made, alpha, temperature))


def test_the_mean_of_elements_is_one_over_the_classes_of_that_of_images():
    made = Step(SEES)
    elements, images = (
        made.terms("ard", kl_mean=mean, temperature=3.0) for mean in ("elements", "images")
    )
    torch.testing.assert_close(CLASSES * elements["total"], images["total"])
    teacher, student = made.logits["robust"]["natural"], made.logits["model"]["adversarial"]
    each = [
        (p * (p.log() - q.log())).sum()
        for p, q in zip((teacher / 3).softmax(1), (student / 3).softmax(1), strict=True)
    ]
    torch.testing.assert_close(images["total"], 9 * sum(each) / len(each))


def test_the_natural_images_pass_though_they_have_no_weight():
    """The official code passes them, and BatchNorm's running statistics count them."""
    run = tiny_step.tiny_run("ard", model=tiny_step.Normalised())
    before = int(run.model.norm.num_batches_tracked)
    train_step(run, run.loader.batch(0))
    assert int(run.model.norm.num_batches_tracked) == before + 2


@pytest.mark.parametrize("method", ["ard", "iad", "iad2", "kd_swa"])
def test_teachers_stay_as_they_are(method):
    run = tiny_step.tiny_run(method, model=tiny_step.Normalised())
    run.epoch = 1
    before = copy.deepcopy({n: t.state_dict() for n, t in run.teachers.items()})
    started = copy.deepcopy(run.model.state_dict())
    for batch in run.loader:
        assert train_step(run, batch) is not None
    assert {*before} == {*run.method.teachers}
    for name, teacher in run.teachers.items():
        assert all(torch.equal(v, teacher.state_dict()[k]) for k, v in before[name].items())
        assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
        assert not teacher.training
    assert not torch.equal(started["conv1.weight"], run.model.conv1.weight)


@pytest.mark.parametrize("method", ["ard", "iad", "iad2"])
def test_the_rate_drops_once_as_their_code_has_it(method):
    """To a hundredth from epoch 100 to the last, where the second drop should have been."""
    config = publish(select_method(find_recipe("cifar10-resnet18"), method))
    rates = {epoch: lr_at(config.optim, epoch / 200) for epoch in (0, 99, 100, 149, 150, 199)}
    expected = {0: 0.1, 99: 0.1, 100: 0.01, 149: 0.01, 150: 0.01, 199: 0.01}
    assert rates == pytest.approx(expected)
    assert (config.optim.epochs, config.optim.weight_decay) == (200, 2e-4)
    attack = config.attack
    assert (attack.start, attack.attack_mode, attack.clamp_start) == ("uniform", "train", True)
    assert (attack.eps, attack.step_length, attack.attack_steps) == (8 / 255, 2 / 255, 10)


def test_cifar100_has_batches_of_256():
    config = find_recipe("cifar10-resnet18")
    config = replace(config, data=replace(config.data, data="cifar100"))
    assert publish(select_method(config, "ard")).optim.batch_size == 256
    assert publish(select_method(config, "iad")).optim.batch_size == 128
