"""What an epoch's row tells of gradients, against autograd and sets that are counted by hand."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import engine_runs as runs
import tiny_step
from cure_fast.kernels import Selection
from cure_fast.policies.conserve import Conserve, ConserveSettings
from cure_fast.step.gradients import MOST, watched_layers
from cure_fast.training.trainer import next_step

pytestmark = pytest.mark.usefixtures("one_thread")


def last_step(run, *, epochs=1):
    """Take all steps of epochs; return what the row of the last would hold of gradients."""
    runs.train(run, epochs * run.loader.batches_per_epoch)
    return run.last_gradients.statistics(run)


def literal(run, batch):
    """The same of the total's gradients, by autograd on the images of the attack."""
    adversarial = batch.attacked(run.method.attack(run, batch))
    run.model.zero_grad()
    run.method.loss(run, adversarial)["total"].backward()
    return dict(run.model.named_parameters())


@pytest.mark.parametrize("engine", ["eager", "fast"])
def test_numbers_are_those_of_the_gradient_that_moves(engine):
    run = tiny_step.tiny_run("natural", engine=engine)
    run.batch = run.loader.batches_per_epoch - 1
    batch = run.loader.batch(run.batch)
    # Natural training attacks nothing and draws nothing: the gradient is the loss's own.
    parameters = literal(copy.deepcopy(run), batch)
    next_step(run, batch)
    found = run.last_gradients.statistics(run)
    assert found.keys() == {"conv1.weight", "layer1.0.conv1.weight"}
    for name, numbers in found.items():
        grad = parameters[name].grad.numpy()
        assert numbers["mean"] == pytest.approx(grad.mean(), rel=1e-9)
        assert numbers["abs_mean"] == pytest.approx(np.abs(grad).mean(), rel=1e-9)
        assert numbers["norm"] == pytest.approx(np.sqrt((grad**2).sum()), rel=1e-9)
        assert numbers["nonzero"] == np.count_nonzero(grad) / grad.size


@pytest.mark.parametrize("settings", [{}, {"mask_scope": "global"}, {"mask_every": 2}])
def test_both_engines_tell_of_the_masked_gradient(settings):
    data = runs.batches(2)
    found = {}
    for engine in ("eager", "fast"):
        run = runs.make_run("cure", engine, data=data, attack={"attack_steps": 1}, **settings)
        found[engine] = last_step(run)
        masks = run.policy(Conserve).masks(run)
        own = dict(run.model.named_parameters())
        for name, numbers in found[engine].items():
            kept = 1 - masks[id(own[name])].double().mean().item()
            assert 0 < numbers["nonzero"] <= kept + 1e-12
            if not settings:
                # Thirty of a hundred are masked.
                assert numbers["nonzero"] == pytest.approx(0.7, abs=0.02)
    for name, numbers in found["eager"].items():
        assert found["fast"][name] == pytest.approx(numbers, rel=1e-3, abs=1e-7), name


@pytest.mark.parametrize("engine", ["eager", "fast"])
def test_a_run_stopped_behind_the_last_step_tells_the_same(engine):
    whole = runs.make_run("cure", engine, data=runs.batches(2), attack={"attack_steps": 1})
    expected = last_step(whole)
    rows = whole.policy(Conserve).epoch_metrics
    first, second = (
        runs.make_run("cure", engine, data=runs.batches(2), attack={"attack_steps": 1})
        for _ in range(2)
    )
    last_step(first)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.last_gradients.statistics(second) == expected
    resumed = second.policy(Conserve).epoch_metrics(second)
    assert resumed == rows(whole) and "prominent" in resumed
    # The steps of another epoch count anew.
    runs.train(whole, 1, start=2)
    runs.train(second, 1, start=2)
    assert whole.last_gradients.state_dict(whole) is None
    again = second.last_gradients.statistics(second)
    assert again == whole.last_gradients.statistics(whole) != expected


@pytest.mark.parametrize("engine", ["eager", "fast"])
def test_a_step_that_moves_nothing_tells_nothing(engine):
    run = tiny_step.tiny_run("natural", engine=engine)
    next_step(run, run.loader.batch(0))
    assert run.last_gradients.statistics(run)
    next_step(run, tiny_step.poisoned(run.loader.batch(1)))
    assert run.last_gradients.statistics(run) == {}


def test_layers_are_the_last_of_blocks_or_some_of_all():
    blocks = nn.ModuleDict({n: nn.Conv2d(1, 1, 3) for n in ("conv1", "conv2", "conv3")})
    assert [*watched_layers(nn.Sequential(blocks, nn.Linear(2, 2)))] == ["0.conv2.weight"]
    many = nn.Sequential(*(nn.Conv2d(1, 1, 3) for _ in range(40)))
    names = [*watched_layers(many)]
    assert len(names) == MOST and (names[0], names[-1]) == ("0.weight", "39.weight")
    assert [*watched_layers(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)))] == ["0.weight"]


def test_prominent_is_the_share_above_one_percentile_of_all():
    settings = ConserveSettings(percentile=30.0)
    conserve = Conserve(tiny_step.Tiny(), settings, active=lambda run: True)
    draw = torch.Generator().manual_seed(1)
    scores = [k * torch.rand(p.shape, generator=draw) for k, p in enumerate(conserve.parameters, 1)]
    ones = torch.ones(len(scores))
    conserve.selection = Selection(scores, ones, ones, torch.zeros(len(scores)).int())
    row = conserve.epoch_metrics(None)
    limit = np.percentile(np.concatenate([s.numpy().ravel() for s in scores]), 30)
    above = {n: (s.numpy() >= limit) for n, s in zip(conserve.names, scores, strict=True)}
    layers = [n for n in above if above[n].ndim > 1]
    assert row["prominent"] == pytest.approx({n: above[n].mean() for n in layers})
    for name, flat in (("prominent_weights", False), ("prominent_vectors", True)):
        chosen = np.concatenate([v.ravel() for v in above.values() if (v.ndim == 1) == flat])
        assert row["mask"][name] == pytest.approx(chosen.mean())
