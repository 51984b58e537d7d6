"""ST-AT against its formulas, in double precision, and the statistics that its attack leaves."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import engine_runs as runs
import tiny_step
from cure_fast.classifier import attack_mode, still_statistics


def symmetric_kl(low, high):
    """KL_sym of two rows of logits, the first side of each KL given."""
    total = torch.zeros((), dtype=torch.float64)
    for target, z in ((high.detach(), low), (low.detach(), high)):
        p = target.softmax(0)
        total = total + (p * (p.log() - z.log_softmax(0))).sum() / 2
    return total


def ends(logits, y):
    """Of each image, which of the sets of logits have its label's lowest and highest p."""
    return [
        [
            min(range(3), key=lambda k, i=i: sign * logits[k][i].softmax(0)[y[i]].item())
            for i in rows
        ]
        for sign, rows in ((1, range(len(y))), (-1, range(len(y))))
    ]


class Given(nn.Module):
    """Returns these logits in turn."""

    def __init__(self, *logits):
        super().__init__()
        self.left = list(logits)

    def forward(self, x):
        return self.left.pop(0)


def test_loss_and_gradients_follow_the_formula():
    col, natural, adv = torch.randn(3, 12, 4, dtype=torch.float64)
    run = tiny_step.tiny_run("st_at", beta=2.5)
    batch = run.loader.batch(0)
    batch.notes["x_col"] = batch.x
    both = [[t.clone().requires_grad_() for t in (natural, col, adv)] for _ in range(2)]
    x, x_col, x_adv = both[0]
    run.model = Given(x_col, x, x_adv)
    found = run.method.loss(run, batch)["total"]
    x = both[1][0]
    low, high = ends(both[1], batch.y)
    assert {0, 1, 2} == set(low) == set(high)
    expected = torch.zeros((), dtype=torch.float64)
    for i, label in enumerate(batch.y):
        apart = symmetric_kl(both[1][low[i]][i], both[1][high[i]][i])
        expected = expected + (-x[i].log_softmax(0)[label] + 2.5 * apart) / 12
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(found, both[0]), torch.autograd.grad(expected, both[1]), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-14)
        assert a.abs().max() > 1e-3


def two_sided(model, x, y, x_adv, x_col, *, steps, eps, step_size):
    """The attack as the official code does it, image by image, on a network in train mode."""
    for _ in range(steps):
        points = [p.clone().requires_grad_() for p in (x, x_col, x_adv)]
        logits = [model(p) for p in points]
        sides = ends(logits, y)
        apart = sum(
            symmetric_kl(logits[low][i], logits[high][i])
            for i, (low, high) in enumerate(zip(*sides, strict=True))
        )
        grads = torch.autograd.grad(apart, points, allow_unused=True, materialize_grads=True)
        moved = []
        for side in sides:
            steps_of = [
                points[k][i].detach() + step_size * grads[k][i].sign() for i, k in enumerate(side)
            ]
            inside = torch.stack(steps_of).clamp(x - eps, x + eps)
            moved.append(inside.clamp(0, 1))
        x_adv, x_col = moved
    return x_adv, x_col


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_attack_follows_the_official_code(mode):
    run = tiny_step.tiny_run("st_at", model=tiny_step.Normalised())
    batch = run.loader.batch(0)
    run.generators["attack"].manual_seed(1)
    noise = torch.empty(24, *batch.x.shape[1:], dtype=torch.float64)
    noise.normal_(0, 0.001, generator=torch.Generator().manual_seed(1))
    x_adv, x_col = batch.x + noise[::2], batch.x + noise[1::2]
    twin = copy.deepcopy(run.model).train(mode == "train")
    settings = {"steps": 5, "eps": 0.1, "step_size": 0.03}
    expected = two_sided(twin, batch.x, batch.y, x_adv, x_col, **settings)
    with attack_mode(run.model, mode):
        found = run.method.attack(run, batch), batch.notes["x_col"]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    # The adversarial images are less certain of their label than the collaborative ones.
    p = [run.model.eval()(z).softmax(1).gather(1, batch.y[:, None]).mean() for z in found]
    assert p[0] < p[1]


@pytest.mark.parametrize("start", ["normal", "uniform"])
@pytest.mark.parametrize("engine", ["eager", "fast"])
def test_the_attack_leaves_statistics_and_both_points_lie_inside(engine, start):
    run = runs.make_run("st_at", engine, data=runs.batches(1), attack={"start": start})
    (x, y), attack = run.loader.batches[0], run.method.attack
    seen = []

    def watched(run, batch):
        before = copy.deepcopy(dict(run.model.named_buffers()))
        assert all(m.training for m in run.model.modules())
        made = attack(run, batch)
        assert not runs.differing(before, dict(run.model.named_buffers()))
        seen.extend([made, batch.notes["x_col"]])
        return made

    run.method = tiny_step.replace(run.method, attack=watched)
    twin = copy.deepcopy(run.model).train()
    runs.step(run, x, y)
    assert run.engine.name == engine
    for point in seen:
        assert (point - x).abs().max() <= 0.1 + 1e-6 and 0 <= point.min() and point.max() <= 1
        assert (point - x).abs().max() > 0.08
    assert not torch.equal(*seen)
    # The loss counts natural and adversarial images, and the collaborative ones not.
    with torch.no_grad():
        _ = [twin(images) for images in (x, seen[0])]
    for (name, found), expected in zip(run.model.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, msg=name)


def test_stilled_statistics_are_the_batch_s_and_come_back():
    model = tiny_step.Normalised().train()
    frozen = nn.BatchNorm2d(3, track_running_stats=False)
    model.add_module("frozen", frozen)
    x = torch.rand(12, tiny_step.CHANNELS, 1, 1)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ZeroDivisionError), still_statistics(model):
        stilled = model(x)
        _ = 1 / 0
    assert not runs.differing(before, model.state_dict())
    torch.testing.assert_close(stilled, model(x))
    assert runs.differing(before, model.state_dict()) and not frozen.track_running_stats
    # In eval mode it changes nothing.
    with still_statistics(model.eval()):
        inside = model(x)
    assert torch.equal(inside, model(x))
