"""ACT against its official losses and attack, with two optimisers, and what moves when."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tiny_step
from cure_fast.classifier import attack_mode
from cure_fast.methods import publish, select_method
from cure_fast.recipes import find_recipe
from cure_fast.step.train_step import train_step
from cure_fast.training.schedules import lr_at


def distillation(student, teacher, temperature):
    """NeurAI-Lab/ACT's: KL of softened probabilities, summed over the batch, by its size."""
    p, q = F.log_softmax(student / temperature, dim=1), F.softmax(teacher / temperature, dim=1)
    return F.kl_div(p, q, reduction="sum") * temperature**2 / len(student)


def official_losses(natural, robust, y, alpha=0.9, temperature=4.0):
    """The losses of the natural and of the robust network, from their logits on."""
    loss_nat = (1 - alpha) * F.cross_entropy(natural, y)
    loss_nat = loss_nat + alpha * distillation(natural, robust.detach(), temperature)
    loss_adv = (1 - alpha) * F.cross_entropy(robust, y)
    loss_adv = loss_adv + alpha * distillation(robust, natural.detach(), temperature)
    return loss_nat, loss_adv


@pytest.mark.parametrize(
    "settings", [{}, {"mimicry": 0.3, "temperature": 1.5}, {"mimicry": 0.0}], ids=str
)
def test_losses_and_gradients_are_the_official_ones(settings):
    natural, robust = (3 * torch.randn(2, 32, 10, dtype=torch.float64)).requires_grad_().unbind()
    y = torch.randint(10, (32,))
    run = tiny_step.tiny_run("act", **settings)
    run.model, run.networks = lambda x: robust, {"natural": lambda x: natural}
    terms = run.method.loss(run, tiny_step.batch_of(torch.zeros(32, 1, 1, 1), y))
    alpha = settings.get("mimicry", 0.9)
    expected = official_losses(natural, robust, y, alpha, settings.get("temperature", 4.0))
    torch.testing.assert_close(terms["total"], sum(expected), rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(terms["total"], (natural, robust))
    for grad, loss, logits in zip(found, expected, (natural, robust), strict=True):
        (theirs,) = torch.autograd.grad(loss, logits)
        torch.testing.assert_close(grad, theirs, rtol=1e-10, atol=1e-15)
        assert grad.abs().max() > 1e-4


def act_run(**options):
    torch.manual_seed(3)
    return tiny_step.tiny_run("act", model=tiny_step.Normalised(), **options)


def test_one_optimiser_of_the_sum_moves_both_as_two_of_the_parts():
    run = act_run()
    robust, natural = copy.deepcopy(run.model), copy.deepcopy(run.networks["natural"])
    optim = run.config.optim
    settings = {"momentum": optim.momentum, "weight_decay": optim.weight_decay, "lr": optim.lr}
    optimizers = [torch.optim.SGD(net.parameters(), **settings) for net in (natural, robust)]
    start, seen = copy.deepcopy([natural, robust]), []
    run.model.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    for batch in run.loader:
        train_step(run, batch)
        # The loss's is the last pass of the step.
        losses = official_losses(natural(batch.x), robust(seen[-1]), batch.y)
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for ours, theirs in ((run.model, robust), (run.networks["natural"], natural)):
            for (name, value), other in zip(
                ours.state_dict().items(), theirs.state_dict().values(), strict=True
            ):
                torch.testing.assert_close(value, other, rtol=1e-10, atol=1e-12, msg=name)
    for former, now in zip(start, (natural, robust), strict=True):
        assert not any(map(torch.equal, former.parameters(), now.parameters()))


def objective_of(run, batch):
    """What the attack raises, and what else it asks for."""
    asked = []

    def spy(images, objective, **other):
        asked.append((objective, other))
        return images

    run.pgd = spy
    with attack_mode(run.model, "eval"):
        run.method.attack(run, batch)
    return asked[0]


def test_the_attack_raises_a_mean_and_a_sum():
    run = act_run(mimicry=0.7)
    batch, reference = run.loader.batch(0), copy.deepcopy(run.networks["natural"])
    objective, other = objective_of(run, batch)
    assert not other
    logits = torch.randn(12, tiny_step.CLASSES, dtype=torch.float64, requires_grad=True)
    # With the batch's own statistics.
    natural = reference.train()(batch.x).detach()
    kl = nn.KLDivLoss(reduction="sum")(F.log_softmax(logits, 1), F.softmax(natural, 1))
    expected = 0.3 * F.cross_entropy(logits, batch.y) + 0.7 * kl
    found = objective(logits)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    pairs = (torch.autograd.grad(value, logits)[0] for value in (found, expected))
    torch.testing.assert_close(*pairs, rtol=1e-10, atol=1e-15)


def test_the_objective_of_a_batch_is_the_sum_of_its_parts():
    """Without statistics of the parts in the way."""
    run = tiny_step.tiny_run("act")
    batch = run.loader.batch(0)
    logits = torch.randn(12, tiny_step.CLASSES, dtype=torch.float64)
    whole = objective_of(run, batch)[0](logits)
    parts = [
        objective_of(run, part)[0](logits[:6] if n == 0 else logits[6:])
        for n, part in enumerate(batch.split(2))
    ]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-12, atol=0)


def test_the_natural_network_stays_in_training_mode_and_its_statistics_move_once_per_step():
    run = act_run()
    natural = run.networks["natural"]
    before, modes = copy.deepcopy(natural.state_dict()), []
    natural.register_forward_hook(lambda *_: modes.append(natural.training))
    batch = run.loader.batch(0)
    with attack_mode(run.model, "eval"):
        run.method.attack(run, batch)
    after = natural.state_dict()
    assert all(torch.equal(before[name], value) for name, value in after.items())
    train_step(run, batch)
    assert modes == [True] * 3 and int(natural.norm.num_batches_tracked) == 1
    once = tiny_step.Normalised().double()
    once.load_state_dict(before)
    once(batch.x)
    for name in ("running_mean", "running_var"):
        ours, theirs = getattr(natural.norm, name), getattr(once.norm, name)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


@pytest.mark.parametrize("part", ["attack", "loss"])
def test_a_step_that_is_tried_again_moves_its_statistics_as_one_that_fits(part):
    """In passes of six images from the start, or once twelve have turned out to be too many."""
    run, small = act_run(attack={"start": "uniform"}), act_run(attack={"start": "uniform"})
    small.micro_batch_size, sizes, real = 6, [], getattr(run.method, part)

    def limited(run, batch):
        sizes.append(len(batch))
        found = real(run, batch)
        if len(batch) > 6:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return found

    run.method = replace(run.method, **{part: limited})
    if part == "loss":
        # The attack is made of whole batches and of parts, which have statistics of their own.
        for each in (run, small):
            each.method = replace(each.method, attack=lambda run, batch: batch.x.sqrt())
    for each in (run, small):
        train_step(each, each.loader.batch(0))
    assert sizes == [12, 6, 6]
    ours, theirs = (each.networks["natural"].state_dict() for each in (run, small))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert int(ours["norm.num_batches_tracked"]) == 2


def test_images_stay_in_the_ball_and_in_the_box_from_a_start_outside():
    run = act_run()
    assert not run.config.attack.clamp_start
    x = torch.rand(12, tiny_step.CHANNELS, 1, 1, dtype=torch.float64).round()
    batch = tiny_step.batch_of(x, torch.arange(12) % tiny_step.CLASSES)
    with attack_mode(run.model, "eval"):
        x_adv = run.method.attack(run, batch)
    assert x_adv.min() >= 0 and x_adv.max() <= 1 and not x_adv.requires_grad
    assert 0.09 < (x_adv - x).abs().max() <= 0.1 + 1e-12


def test_the_published_set_up():
    config = publish(select_method(find_recipe("cifar10-resnet18"), "act"))
    rates = {0: 0.1, 58: 0.1, 59: 0.02, 118: 0.02, 119: 0.004, 158: 0.004, 159: 8e-4, 199: 8e-4}
    assert {e: lr_at(config.optim, e / config.optim.epochs) for e in rates} == pytest.approx(rates)
    assert (config.optim.epochs, config.optim.weight_decay) == (200, 5e-4)
    assert (config.attack.eps, config.attack.step_length, config.attack.attack_steps) == (
        *(0.031, 0.007),
        10,
    )
    assert (config.data.crop_mode, config.attack.start) == ("reflect", "normal")
