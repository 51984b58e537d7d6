"""Schedules of learning rate and momentum at their corners, and the cutting of gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import OneCycleLR

from cure_fast.config import OptimConfig
from cure_fast.recipes import find_recipe
from cure_fast.training.schedules import lr_at, momentum_at
from cure_fast.training.stages import natural_stage
from cure_fast.training.trainer import next_step
from tiny_step import tiny_run

SCHEDULES = ["multistep", "linear", "onecycle", "onecycle-cosine", "cosine", "constant"]


def test_multistep_drops_at_the_paper_epochs():
    optim = OptimConfig(lr=0.1, epochs=200)
    rates = [lr_at(optim, epoch / 200) for epoch in (0, 99, 100, 149, 150, 199)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_multistep_takes_any_factor_from_a_milestone_on():
    """FAT's .1, .01, .005 from epochs 60, 90, 110 of 120, and LBGAT's small rate in epoch 1."""
    fat = OptimConfig(milestones=(0.5, 0.75, 110 / 120), lr_factors=(0.1, 0.01, 0.005))
    rates = [lr_at(fat, epoch / 120) for epoch in (0, 59, 60, 90, 109, 110, 119)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.001, 0.001, 5e-4, 5e-4])
    lbgat = OptimConfig(milestones=(0.0, 0.01, 0.75, 1.0), lr_factors=(0.2, 1.0, 0.1, 0.0))
    rates = [lr_at(lbgat, epoch / 100) for epoch in (0, 0.5, 1, 74, 75, 99.99)]
    assert rates == pytest.approx([0.02, 0.02, 0.1, 0.1, 0.01, 0.01])


def test_linear_goes_straight_from_milestone_to_milestone():
    """PIAT's: flat to epoch 60, then through a tenth at 90 and a hundredth at 120."""
    piat = OptimConfig(
        lr=0.01, schedule="linear", milestones=(0.5, 0.75, 1.0), lr_factors=(1.0, 0.1, 0.01)
    )
    rates = [lr_at(piat, epoch / 120) for epoch in (0, 60, 75, 90, 105, 119.99999)]
    assert rates == pytest.approx([0.01, 0.01, 0.0055, 0.001, 0.00055, 1e-4], rel=1e-5)
    early = replace(piat, milestones=(0.0, 0.5), lr_factors=(0.2, 1.0))
    rates = [lr_at(early, progress) for progress in (0, 0.25, 0.5, 0.9)]
    assert rates == pytest.approx([0.002, 0.006, 0.01, 0.01])


def test_onecycle_rises_for_a_quarter_and_falls_to_zero():
    optim = OptimConfig(lr=0.4, schedule="onecycle")
    rates = [lr_at(optim, p) for p in (0.0, 0.125, 0.25, 0.625, 0.9999)]
    assert rates == pytest.approx([0.004, 0.2, 0.4, 0.2, 0.004], abs=1e-4)


@pytest.mark.parametrize("steps", [2, 3, 5, 40, 391])
def test_onecycle_cosine_is_torchs_step_by_step(steps):
    optim = OptimConfig(lr=0.21, schedule="onecycle-cosine", nesterov=True)
    torchs = torch.optim.SGD([torch.zeros(1)], lr=0.1, momentum=0.9)
    schedule = OneCycleLR(torchs, max_lr=0.21, total_steps=steps, pct_start=0.25)
    for step in range(steps):
        group = torchs.param_groups[0]
        assert lr_at(optim, step / steps, 1 / steps) == pytest.approx(group["lr"], rel=1e-9)
        momentum = momentum_at(optim, step / steps, 1 / steps)
        assert momentum == pytest.approx(group["momentum"], rel=1e-9)
        torchs.step()
        if step + 1 < steps:
            schedule.step()


def test_momentum_stays_with_every_other_schedule_and_where_there_is_none():
    for schedule in SCHEDULES:
        optim = OptimConfig(schedule=schedule, momentum=0.7)
        cycled = schedule == "onecycle-cosine"
        assert momentum_at(optim, 0.0) == (0.95 if cycled else 0.7)
        assert momentum_at(replace(optim, momentum=0.0), 0.0) == 0


def test_cosine_and_constant():
    assert lr_at(OptimConfig(lr=0.2, schedule="cosine"), 0.5) == pytest.approx(0.1)
    assert lr_at(OptimConfig(lr=0.2, schedule="constant"), 0.9) == 0.2


@given(schedule=st.sampled_from(SCHEDULES), total=st.integers(1, 10_000_000), data=st.data())
def test_every_rate_is_positive_and_at_most_the_peak(schedule, total, data):
    progress = data.draw(st.integers(0, total - 1)) / total
    assert 0 < lr_at(OptimConfig(lr=0.3, schedule=schedule), progress, 1 / total) <= 0.3


def test_the_natural_stage_has_a_schedule_of_its_own():
    config = find_recipe("cifar10-resnet18")
    optim = replace(
        config.optim,
        lr=0.01,
        schedule="linear",
        milestones=(0.5, 0.75, 1.0),
        lr_factors=(1.0, 0.1, 0.01),
        clip_grad=1.0,
    )
    stage = natural_stage(replace(config, optim=optim)).optim
    assert (stage.lr, stage.epochs, stage.clip_grad) == (0.1, 200, None)
    rates = [lr_at(stage, epoch / 200) for epoch in (0, 99, 100, 150)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.001])


def one_step(**optim):
    """Return the run after one step, and how far that has moved its weights, as one vector."""
    run = tiny_run("pgd_at")
    run.config = replace(run.config, optim=replace(run.config.optim, **optim))
    run.optimizer.param_groups[0]["weight_decay"] = 0
    before = torch.nn.utils.parameters_to_vector(run.model.parameters()).detach()
    next_step(run, run.loader.batch(0))
    return run, torch.nn.utils.parameters_to_vector(run.model.parameters()).detach() - before


def test_a_long_gradient_is_cut_to_the_norm_and_a_short_one_is_not():
    _, free = one_step(lr=0.5)
    norm = float(free.norm()) / 0.5
    _, cut = one_step(lr=0.5, clip_grad=norm / 4)
    torch.testing.assert_close(cut, free / 4, rtol=1e-5, atol=0)
    assert torch.equal(one_step(lr=0.5, clip_grad=2 * norm)[1], free)


def test_the_trainer_sets_rate_and_momentum_of_each_step():
    run, _ = one_step(schedule="onecycle-cosine", lr=0.4)
    group = run.optimizer.param_groups[0]
    assert group["lr"] == pytest.approx(0.4 / 25) and group["momentum"] == pytest.approx(0.95)
    next_step(run, run.loader.batch(1))
    # One step before a quarter of eight steps is the second of them.
    assert group["lr"] == pytest.approx(0.4) and group["momentum"] == pytest.approx(0.85)
