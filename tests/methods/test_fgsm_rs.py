"""The attacks of FGSM-RS and N-FGSM against their official codes, and their set-ups."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import tiny_step
from cure_fast.errors import InputError
from cure_fast.methods import check_config, select_method
from cure_fast.recipes import find_recipe
from cure_fast.training.schedules import lr_at

SINGLE = ("fgsm_rs", "n_fgsm", "fgsm_pgi")


def clamp(x, low, high):
    return torch.max(torch.min(x, high), low)


def official_fgsm_rs(model, x, y, delta, *, eps, alpha):
    """locuslab/fast_adversarial's train_fgsm.py, without normalisation."""
    delta = clamp(delta, 0 - x, 1 - x).requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(model(x + delta), y), delta)
    eps = torch.tensor(eps, dtype=x.dtype)
    delta = clamp(delta.detach() + alpha * torch.sign(grad), -eps, eps)
    return x + clamp(delta, 0 - x, 1 - x)


def official_n_fgsm(model, x, y, eta, *, alpha):
    """pdejorge/N-FGSM's train.py, without clipping to a ball, as its experiments."""
    eta = clamp(eta, 0 - x, 1 - x).requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(model(x + eta), y), eta)
    delta = eta.detach() + alpha * torch.sign(grad)
    return x + clamp(delta, 0 - x, 1 - x)


def attacked(method, *, noise, eps=0.1, **settings):
    """A batch, what the method makes of it, and the noise it drew."""
    run = tiny_step.tiny_run(method, **settings)
    run.config = replace(run.config, attack=replace(run.config.attack, eps=eps, step_size=0.5))
    batch = run.loader.batch(0)
    source = run.generators["attack"]
    source.manual_seed(3)
    drawn = torch.empty_like(batch.x).uniform_(-noise * eps, noise * eps, generator=source)
    source.manual_seed(3)
    return run, batch, run.method.attack(run, batch), drawn


# The step follows the radius, whatever --step-size says.
@pytest.mark.parametrize("eps", [0.1, 0.04])
def test_fgsm_rs_is_the_official_one(eps):
    run, batch, found, drawn = attacked("fgsm_rs", noise=1, eps=eps)
    expected = official_fgsm_rs(run.model, batch.x, batch.y, drawn, eps=eps, alpha=1.25 * eps)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("noise", [2.0, 4.0, 0.0])
def test_n_fgsm_is_the_official_one(noise):
    run, batch, found, drawn = attacked("n_fgsm", noise=noise, eps=0.04, fgsm_noise=noise)
    expected = official_n_fgsm(run.model, batch.x, batch.y, drawn, alpha=0.04)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    # It leaves the ball, unless there is no noise.
    farthest = float((found - batch.x).abs().max())
    assert (farthest > 0.05) == (noise > 0) and farthest <= (noise + 1) * 0.04 + 1e-12


@pytest.mark.parametrize("method", SINGLE)
def test_more_steps_than_one_are_refused(method):
    config = select_method(find_recipe("quickstart"), method)
    assert config.attack.attack_steps == 1
    check_config(config)
    several = replace(config, attack=replace(config.attack, attack_steps=10))
    with pytest.raises(InputError, match=rf"--attack-steps: expected 1 with --method {method}"):
        check_config(several)


@pytest.mark.parametrize(
    ("recipe", "peak", "epochs", "top"),
    [
        ("fgsm-rs-cifar10-resnet18", 0.2, 15, 0.5),
        ("n-fgsm-cifar10-preactresnet18", 0.2, 30, 0.5),
        ("n-fgsm-svhn-resnet18", 0.05, 30, 0.4),
    ],
)
def test_published_rates_rise_and_fall_in_straight_lines(recipe, peak, epochs, top):
    config = find_recipe(recipe)
    check_config(config)
    expected = {0.0: 0.0, top / 4: peak / 4, top: peak, (1 + top) / 2: peak / 2}
    found = {share: lr_at(config.optim, share) for share in expected}
    assert found == pytest.approx(expected) and config.optim.epochs == epochs
    assert config.attack.attack_mode == "train" and config.model.normalize == "dataset"
    assert config.data.flip == ("svhn" not in recipe)
    # What validates the network takes small steps.
    assert config.attack.step_length == 2 / 255
