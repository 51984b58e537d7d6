"""FAT's early-stopped attack against its official code, its limits, and its set-ups."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import engine_runs as runs
import tiny_step
from cure_fast.errors import InputError
from cure_fast.methods.fat import FatSettings, tau
from cure_fast.recipes import find_recipe
from cure_fast.step.train_step import train_step
from cure_fast.training.schedules import lr_at

BASES = {"fat": "pgd_at", "fat_trades": "trades", "fat_mart": "mart"}


def official_images(model, x, y, start, *, eps, step, steps, tau, loss):
    """earlystop, image by image, in the order of the batch."""
    images = []
    for i in range(len(x)):
        natural, label, x_adv = x[i : i + 1], y[i : i + 1], start[i : i + 1].clone()
        control = tau
        for _ in range(steps):
            x_adv.requires_grad_()
            output = model(x_adv)
            if output.argmax(1) != label:
                if control == 0:
                    break
                control -= 1
            if loss == "cent":
                value = F.cross_entropy(output, label)
            else:
                p = F.softmax(model(natural), dim=1).detach()
                value = F.kl_div(F.log_softmax(output, dim=1), p, reduction="sum")
            (grad,) = torch.autograd.grad(value, x_adv)
            x_adv = x_adv.detach() + step * grad.sign()
            x_adv = torch.min(torch.max(x_adv, natural - eps), natural + eps).clamp(0, 1)
        images.append(x_adv.detach())
    return torch.cat(images)


@pytest.mark.parametrize("method", BASES)
@pytest.mark.parametrize("steps_more", [0, 1, 3])
def test_images_are_the_official_ones(method, steps_more):
    # With KL, an attack that begins at the image itself would not move.
    run = tiny_step.tiny_run(method, attack={"start": "uniform"}, fat_tau=steps_more, fat_growth=())
    batch = tiny_step.near_boundaries(run)
    run.generators["attack"].manual_seed(7)
    found = run.method.attack(run, batch)
    drawn = torch.empty_like(batch.x).uniform_(
        -0.1, 0.1, generator=torch.Generator().manual_seed(7)
    )
    start = (batch.x + drawn).clamp(0, 1)
    loss = "kl" if method == "fat_trades" else "cent"
    limits = {"eps": 0.1, "step": 0.03, "steps": 5, "tau": steps_more, "loss": loss}
    expected = official_images(run.model, batch.x, batch.y, start, **limits)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    still = (expected == start).flatten(1).all(dim=1)
    assert still.any() == (steps_more == 0) and not still.all()


@pytest.mark.parametrize("method", BASES)
def test_with_all_steps_it_is_its_base(method):
    """As many steps more as the attack has leave no time to stop."""
    settings = {"beta": 6.0} if method == "fat_mart" else {}
    attack = {"start": "uniform", "clamp_start": True}
    ours = tiny_step.tiny_run(method, attack=attack, fat_tau=5, fat_growth=())
    base = tiny_step.tiny_run(BASES[method], attack=attack, **settings)
    base.config = ours.config = replace(base.config, settings=ours.config.settings)
    for number in range(2):
        found, expected = (train_step(run, run.loader.batch(number)) for run in (ours, base))
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    for a, b in zip(ours.model.parameters(), base.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_order_of_images_does_not_matter():
    run = tiny_step.tiny_run("fat", attack={"start": "zero"}, fat_tau=1)
    batch, order = tiny_step.near_boundaries(run), torch.randperm(48)
    mixed = tiny_step.batch_of(batch.x[order], batch.y[order])
    assert torch.equal(run.method.attack(run, mixed), run.method.attack(run, batch)[order])


def test_noise_moves_what_is_still_attacked_and_stays_in_the_ball():
    settings = {"fat_growth": (), "attack": {"start": "zero"}}
    plain, noisy = (tiny_step.tiny_run("fat", fat_noise=noise, **settings) for noise in (0.0, 0.05))
    batch = tiny_step.near_boundaries(plain)
    noisy.model = plain.model
    without, found = (run.method.attack(run, batch) for run in (plain, noisy))
    wrong = plain.model(batch.x).argmax(1) != batch.y
    assert wrong.any() and torch.equal(found[wrong], batch.x[wrong])
    assert ((found != without).flatten(1).any(dim=1) == ~wrong).all()
    assert (found - batch.x).abs().max() <= 0.1 + 1e-12
    assert found.min() >= 0 and found.max() <= 1


@pytest.mark.parametrize(
    ("method", "epochs", "expected"),
    [
        ("fat", 120, {0: 0, 49: 0, 50: 1, 89: 1, 90: 2, 119: 2}),
        ("fat_trades", 85, {0: 0, 29: 0, 30: 1, 49: 1, 50: 2, 69: 2, 70: 3, 84: 3}),
        ("fat_mart", 90, {0: 0, 19: 0, 20: 1, 39: 1, 40: 2, 60: 3, 79: 3, 80: 4, 89: 4}),
    ],
)
def test_tau_grows_as_in_the_official_code(method, epochs, expected):
    """There epochs count from 1: 50 is the last of tau 0."""
    run = tiny_step.tiny_run(method)
    run.config = replace(run.config, optim=replace(run.config.optim, epochs=epochs))
    found = {}
    for run.epoch in expected:
        found[run.epoch] = tau(run)
    assert found == expected


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("method", BASES)
def test_tau_arrives_in_the_fast_engine(method):
    """In the second epoch of two, it is another."""
    both = runs.pair(method, data=runs.batches(1), fat_growth=(0.5,))
    runs.assert_steps_equal(both, 2)
    assert tau(both.fast) == 1


def test_shares_of_the_run_are_checked():
    with pytest.raises(InputError, match=r"--fat-growth: expected shares.*got \(50,\)"):
        FatSettings(fat_growth=(50,))


@pytest.mark.parametrize(
    ("method", "rates", "noise"),
    [
        ("fat", {58: 0.1, 59: 0.01, 89: 1e-3, 108: 1e-3, 109: 5e-4, 119: 5e-4}, 0.001),
        ("fat-trades", {0: 0.1, 73: 0.1, 74: 0.01, 84: 0.01}, 0),
        ("fat-mart", {58: 0.1, 59: 0.01, 88: 0.01, 89: 1e-3}, 0),
    ],
)
def test_the_published_set_ups(method, rates, noise):
    config = find_recipe(f"{method}-cifar10-wrn34-10")
    epochs = config.optim.epochs
    assert epochs == max(rates) + 1
    assert {e: lr_at(config.optim, e / epochs) for e in rates} == pytest.approx(rates)
    assert config.settings.fat_noise == noise and config.attack.clamp_start
    assert config.attack.start == ("uniform" if method == "fat" else "normal")
