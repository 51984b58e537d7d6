"""Training attacks within an L2 ball, of every method that takes it, on both engines."""

from __future__ import annotations

import pytest
import torch

import tiny_step
from cure_fast.classifier import attack_mode
from cure_fast.methods import METHODS

# Two are refused in L2 (tests/config), two begin with natural epochs. Those of transformers attack
# as others do.
OTHERS = ("n_fgsm", "fgsm_pgi", "cure_eff", "cure_eff_official")
METHODS_IN_L2 = sorted(
    name
    for name, method in METHODS.items()
    if method.uses_attack and not method.needs_attention and name not in OTHERS
)
# Radius of the images in units of eps, where a method leaves the ball by design.
RADIUS = {"las_at": 15 / 8, "cfa_at": 1.5, "cfa_trades": 1.5}


@pytest.mark.parametrize("method", METHODS_IN_L2)
def test_images_are_in_the_l2_ball_and_use_more_of_it_than_a_cube_inside(method):
    attack = {"norm": "l2", "start": "uniform"}
    run = tiny_step.tiny_run(method, attack=attack)
    batch = run.loader.batch(0)
    for policy in run.policies:
        batch = policy.before(run, batch) or batch
    with attack_mode(run.model, run.config.attack.attack_mode):
        x_adv = run.method.attack(run, batch)
    far = (x_adv - batch.x).flatten(1).norm(dim=1)
    assert far.max() <= RADIUS.get(method, 1.0) * 0.1 + 1e-9
    # The cube within L-inf's reach of the same length is smaller; this is no L-inf attack.
    assert far.max() > 0.05
    assert x_adv.min() >= 0 and x_adv.max() <= 1


@pytest.mark.parametrize("method", ["pgd_at", "cure"])
def test_the_direction_is_that_of_the_gradient(method):
    """One step from the image, of a linear objective, is the gradient at the length of the step."""
    run = tiny_step.tiny_run(method, attack={"norm": "l2", "start": "zero"})
    batch = run.loader.batch(0)
    x = torch.full_like(batch.x, 0.5)
    slope = torch.randn_like(x)

    class Slope(torch.nn.Module):
        def forward(self, images):
            return (images * slope).flatten(1)

    moved = run.pgd(x, torch.sum, network=Slope(), steps=1) - x
    expected = 0.03 * slope / slope.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    torch.testing.assert_close(moved, expected)
