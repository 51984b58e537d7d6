"""FGSM-PGI against its official step in double precision; what it remembers and forgets."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tiny_step
from cure_fast.methods.fgsm_pgi import Prior, smoothed
from cure_fast.recipes import find_recipe
from cure_fast.step.train_step import train_step
from cure_fast.training.schedules import lr_at

EPS, DECAY, TRUE, WEIGHT = 0.1, 0.3, 0.6, 10.0


def clamp(x, low, high):
    return torch.max(torch.min(x, high), low)


def label_smoothing(y, factor, classes):
    one_hot = np.eye(classes)[y.numpy()]
    result = one_hot * factor + (one_hot - 1.0) * ((factor - 1) / float(classes - 1))
    return torch.tensor(result)


def smooth_loss(logits, target):
    return (-target * F.log_softmax(logits, dim=-1)).sum(dim=-1).mean()


def official_step(model, x, y, delta, momentum):
    """A step of FGSM_MEP.py with the gradient's norm of each image.

    Returns the loss, and the image's next delta and momentum.
    """
    eps, target = torch.tensor(EPS, dtype=x.dtype), label_smoothing(y, TRUE, tiny_step.CLASSES)
    delta = delta.clone().requires_grad_()
    ori_output = model(x + delta)
    ori_loss = smooth_loss(ori_output, target)
    (x_grad,) = torch.autograd.grad(ori_loss, delta, retain_graph=True)
    norm = x_grad.abs().sum(dim=(1, 2, 3), keepdim=True)
    momentum = x_grad / norm + momentum * DECAY
    delta = delta.detach()
    next_delta = clamp(delta + EPS * torch.sign(momentum), -eps, eps)
    next_delta = clamp(next_delta, 0 - x, 1 - x)
    delta = clamp(delta + EPS * torch.sign(x_grad), -eps, eps)
    delta = clamp(delta, 0 - x, 1 - x)
    output = model(x + delta)
    loss = smooth_loss(output, target) + WEIGHT * nn.MSELoss()(output, ori_output)
    return loss, next_delta, momentum


@pytest.mark.parametrize("epochs", [1, 3])
def test_loss_gradients_and_memory_are_the_official_ones(epochs):
    run = tiny_step.tiny_run("fgsm_pgi")
    batch, memory = run.loader.batch(1), run.policy(Prior)
    momentum = torch.zeros_like(batch.x)
    for _ in range(epochs):
        # Priors as they are stored, in half precision, but inside the ball.
        delta = memory.recall("prior", batch).clamp(-EPS, EPS)
        theirs = copy.deepcopy(run.model)
        expected, next_delta, momentum = official_step(theirs, batch.x, batch.y, delta, momentum)
        expected.backward()
        batch.notes.clear()
        made = batch.attacked(run.method.attack(run, batch))
        ours = run.method.loss(run, made)["total"]
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
        found = torch.autograd.grad(ours, list(run.model.parameters()))
        for a, b in zip(found, theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b.grad, rtol=1e-8, atol=1e-12)
        memory.on_step(run, made)
        torch.testing.assert_close(memory.recall("prior", batch), next_delta, rtol=0, atol=1e-4)
        # A constant factor, that of sum and mean, has no part in the sign.
        pixels = batch.x[0].numel()
        found = memory.recall("momentum", batch)
        torch.testing.assert_close(found, pixels * momentum, rtol=2**-7, atol=2**-7)
        momentum = found / pixels


def test_only_images_of_the_batch_are_remembered_in_their_places():
    run = tiny_step.tiny_run("fgsm_pgi")
    before = {name: tensor.clone() for name, tensor in run.policy(Prior).state.items()}
    assert train_step(run, run.loader.batch(2)) is not None
    for name, tensor in run.policy(Prior).state.items():
        changed = (tensor != before[name]).flatten(1).any(dim=1)
        assert changed[24:36].any() and not changed[:24].any() and not changed[36:].any()


def test_a_step_that_is_not_finite_changes_no_memory():
    for engine in ("eager", "fast"):
        run = tiny_step.tiny_run("fgsm_pgi", dtype=torch.float32, engine=engine)
        before = {name: tensor.clone() for name, tensor in run.policy(Prior).state.items()}
        assert run.engine.name == engine
        assert run.engine.step(tiny_step.poisoned(run.loader.batch(0))) is None
        for name, tensor in run.policy(Prior).state.items():
            assert torch.equal(tensor, before[name]), (engine, name)


def test_priors_begin_in_random_corners_and_are_drawn_anew():
    run = tiny_step.tiny_run("fgsm_pgi", pgi_reset=2)
    memory, seen = run.policy(Prior), []
    for run.epoch in range(4):
        prior = memory.state["prior"]
        seen.append(prior.clone())
        train_step(run, run.loader.batch(0))
        memory.on_epoch_end(run)
    corners = [i for i, prior in enumerate(seen) if prior.unique().numel() == 2]
    assert corners == [0, 2] and not torch.equal(seen[0], seen[2])
    torch.testing.assert_close(seen[0].abs().double(), torch.full_like(seen[0], EPS).double())
    assert 0.3 < (seen[0] > 0).double().mean() < 0.7
    assert torch.equal(seen[0], tiny_step.tiny_run("fgsm_pgi").policy(Prior).state["prior"])
    assert not memory.state["momentum"].any()


@pytest.mark.parametrize("true", [0.6, 1.0, 0.0])
def test_targets_are_smoothed_towards_the_other_classes(true):
    logits, y = torch.randn(9, 4, dtype=torch.float64), torch.arange(9) % 4
    target = label_smoothing(y, true, 4)
    torch.testing.assert_close(smoothed(logits, y, true).mean(), smooth_loss(logits, target))
    torch.testing.assert_close(target.sum(dim=1), torch.ones(9, dtype=torch.float64))


def test_the_published_set_up():
    config = find_recipe("fgsm-pgi-cifar10-resnet18")
    rates = {0: 0.1, 99: 0.1, 100: 0.01, 104: 0.01, 105: 1e-3, 109: 1e-3}
    assert config.optim.epochs == 110 and config.settings.pgi_reset == 40
    assert {e: lr_at(config.optim, e / 110) for e in rates} == pytest.approx(rates)
    assert not config.attack.clamp_start and config.attack.attack_mode == "train"
    assert find_recipe("fgsm-pgi-cifar100-resnet18").settings.pgi_reset == 10
