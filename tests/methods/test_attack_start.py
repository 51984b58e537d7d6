"""Where an attack takes its first gradient: inside [0, 1], or where the noise leads."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

import tiny_step as tiny
from bench.authors import build_authors
from cure_fast.attacks import pgd, start_point
from cure_fast.classifier import block_first_convs
from cure_fast.config import Config, OptimConfig
from cure_fast.methods import METHODS, select_method
from cure_fast.step.train_step import train_step
from cure_fast.training.trainer import build_run

BLACK = torch.zeros(2, 3, 8, 8)


def generator():
    return torch.Generator().manual_seed(1)


@pytest.mark.parametrize("start", ["normal", "uniform", torch.full_like(BLACK, -0.5)])
def test_clamping_the_start_is_all_that_the_setting_changes(start):
    free = start_point(BLACK, eps=0.1, start=start, clamp_start=False, generator=generator())
    clamped = start_point(BLACK, eps=0.1, start=start, generator=generator())
    assert -0.1 <= free.min() < 0
    assert torch.equal(clamped, free.clamp(0, 1))


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_images_end_inside_whatever_their_start(steps):
    seen = []

    def model(x):
        seen.append(x.detach().clone())
        return x.flatten(1)

    x_adv = pgd(
        model,
        BLACK,
        lambda logits: -logits.sum(),
        eps=0.1,
        step_size=0.01,
        steps=steps,
        start="uniform",
        clamp_start=False,
        generator=generator(),
    )
    assert len(seen) == steps
    assert all((x.min() < 0) == (number == 0) for number, x in enumerate(seen))
    assert x_adv.min() >= 0 and x_adv.max() <= 0.1


def test_the_presets_of_public_codes_start_unclamped():
    unclamped = {m for m in METHODS if not select_method(Config(), m).attack.clamp_start}
    public = {"trades", "mart", "cure_official", "cure_eff_official", "act", "lbgat"}
    assert unclamped == public


@pytest.mark.parametrize("clamp_start", [False, True])
def test_a_run_starts_its_attack_as_configured(clamp_start):
    x, y = torch.zeros(12, tiny.CHANNELS, 1, 1, dtype=torch.float64), torch.arange(12) % 4
    run = tiny.tiny_run("pgd_at", batches=[(x, y)], attack={"clamp_start": clamp_start})
    seen = []
    run.model.register_forward_pre_hook(lambda _model, inputs: seen.append(inputs[0].min().item()))
    run.method.attack(run, run.loader.batch(0))
    assert (seen[0] < 0) == (not clamp_start) and min(seen[1:]) >= 0


def authors_and_own(clamp_start):
    """Weights that may be masked, before a step, after one of CURE's public code, after ours."""
    torch.manual_seed(3)
    theirs = build_authors("cure", "resnet-small", "cpu", num_classes=4, width=4)
    theirs.model.double()
    theirs.revision.double()
    # A fifth of the pixels is black or white.
    x = (torch.rand(16, 3, 8, 8, dtype=torch.float64) * 1.25 - 0.125).clamp(0, 1)
    y = torch.arange(16) % 4
    config = select_method(Config(optim=OptimConfig(schedule="constant")), "cure_official")
    attack = replace(config.attack, clamp_start=clamp_start)
    model = copy.deepcopy(theirs.model)
    own = build_run(
        replace(config, attack=attack), model, tiny.FixedLoader([(x, y)]), torch.device("cpu")
    )
    names = block_first_convs(model)
    before = [model.get_parameter(name).detach().clone() for name in names]
    torch.manual_seed(5)
    theirs.step(x, y)
    own.generators["attack"].manual_seed(5)
    train_step(own, own.loader.batch(0))
    return before, *(
        [net.get_parameter(n).detach() for n in names] for net in (theirs.model, model)
    )


@pytest.mark.parametrize("clamp_start", [False, True])
def test_the_start_decides_whether_a_step_is_the_authors(clamp_start):
    decay = 1 - 0.1 * 5e-4
    differences, flipped, masked = [], 0, 0
    for before, theirs, own in zip(*authors_and_own(clamp_start), strict=True):
        differences.append((theirs - own).abs().max().item())
        # What moves by weight decay alone is masked.
        masks = [(after - decay * before).abs() < 1e-14 for after in (theirs, own)]
        masked += int(masks[0].sum())
        flipped += int((masks[0] != masks[1]).sum())
    assert masked > 100
    if clamp_start:
        assert max(differences) > 1e-6 and flipped > 10
    else:
        assert max(differences) < 1e-12 and not flipped
