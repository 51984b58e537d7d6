"""CURE's settings that need BatchNorm or a long run, and the scale of every attack objective."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

import tiny_step as tiny
from cure_fast.classifier import attack_mode
from cure_fast.methods import METHODS
from cure_fast.models import build_model
from cure_fast.policies.average import Average
from cure_fast.step.train_step import loss_of, train_step
from cure_fast.training.trainer import next_step

DECAY = 0.9


def norm_run(method="cure", **settings):
    """A run on a small ResNet with BatchNorm, 8x8 images, in double precision."""
    generator = torch.Generator().manual_seed(1)
    batches = [
        (
            torch.rand(12, 3, 8, 8, generator=generator, dtype=torch.float64),
            torch.randint(4, (12,), generator=generator),
        )
        for _ in range(3)
    ]
    torch.manual_seed(2)
    model = build_model("resnet-small", num_classes=4, width=4)
    return tiny.tiny_run(method, batches=batches, model=model, **settings)


def fix_attack(run, x):
    """Let the run's attack return the images given back here, so that a test knows them."""
    x_adv = (x + 0.1 * torch.sign(torch.randn_like(x))).clamp(0, 1)
    run.method = replace(run.method, attack=lambda run, batch: x_adv)
    return x_adv


def buffers(model):
    return {name: value.clone() for name, value in model.named_buffers()}


@pytest.mark.parametrize("order", ["after", "before"])
@pytest.mark.parametrize(
    ("how", "mode"), [("own", "train"), ("average", "train"), ("average", "eval")]
)
def test_batch_statistics_of_the_revision_model(how, mode, order):
    run = norm_run(
        revision_buffers=how,
        revision_mode=mode,
        revision_order=order,
        revision_rate=1.0,
        revision_decay=DECAY,
        revision_warmup=False,
    )
    revision = run.networks["revision"]
    set_apart(revision)
    for batch in run.loader:
        x = batch.x
        x_adv = fix_attack(run, x)
        twin = copy.deepcopy(revision)
        if order == "before":
            revise(twin, run.model, how)
        if mode == "train":
            twin.train()
            with torch.no_grad():
                twin(x), twin(x_adv)
        next_step(run, batch)
        if order == "after":
            revise(twin, run.model, how)
        expected, trained = buffers(twin), buffers(run.model)
        for name, value in buffers(revision).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-12, msg=name)
        assert any(not torch.equal(value, trained[name]) for name, value in expected.items())


def set_apart(network):
    """Move every tensor of the revision model, so that none equals the trained network's."""
    with torch.no_grad():
        for value in network.state_dict().values():
            value.add_(0.1 * torch.rand_like(value) if value.is_floating_point() else 5)


def revise(network, model, how):
    """Move the weights by Eq. 7, and the buffers too where they are averaged (integers copied)."""
    trained = model.state_dict()
    moved = dict(network.named_parameters())
    if how == "average":
        moved |= dict(network.named_buffers())
    with torch.no_grad():
        for name, value in moved.items():
            if value.is_floating_point():
                value.copy_(DECAY * value + (1 - DECAY) * trained[name])
            else:
                assert name.endswith("num_batches_tracked")
                value.copy_(trained[name])


def test_averaged_statistics_wait_for_the_coin():
    run = norm_run(revision_buffers="average", revision_mode="eval", revision_rate=0.0)
    before = buffers(run.networks["revision"])
    for batch in run.loader:
        train_step(run, batch)
    assert all(torch.equal(before[n], v) for n, v in buffers(run.networks["revision"]).items())


def mean_kl(p_logits, q_logits):
    """Batch mean of KL(p || q) in NumPy."""
    p, q = (np.exp(z - z.max(axis=1, keepdims=True)) for z in (p_logits.numpy(), q_logits.numpy()))
    p, q = p / p.sum(axis=1, keepdims=True), q / q.sum(axis=1, keepdims=True)
    return float((p * np.log(p / q)).sum(axis=1).mean())


@pytest.mark.parametrize(("mode", "how"), [("train", "own"), ("eval", "average")])
def test_consistency_takes_batch_or_running_statistics(mode, how):
    run = norm_run(
        revision_mode=mode, revision_buffers=how, revision_rate=0.5, revision_decay=DECAY
    )
    for batch in [*run.loader][:2]:
        next_step(run, batch)
    batch = run.loader.batch(2)
    x = batch.x
    x_adv = (x + 0.05).clamp(0, 1)
    values = {}
    for name in ("train", "eval"):
        model, revision = copy.deepcopy((run.model, run.networks["revision"]))
        assert model.training
        revision.train(name == "train")
        with torch.no_grad():
            values[name] = sum(mean_kl(revision(images), model(images)) for images in (x, x_adv))
    terms = loss_of(run, batch.attacked(x_adv))
    assert float(terms["consistency"].detach()) == pytest.approx(values[mode], rel=1e-9)
    assert values["train"] != pytest.approx(values["eval"], rel=1e-2)


@pytest.mark.parametrize(
    ("decay", "rates"),
    [
        ("none", [0.4] * 8),
        ("freeze", [0.4] * 4 + [0.0] * 4),
        ("halve", [0.4] * 4 + [0.2, 0.1, 0.05, 0.025]),
        ("cosine", [0.2 * (1 + np.cos(np.pi * step / 8)) for step in range(8)]),
    ],
)
def test_the_rate_of_each_step(decay, rates):
    run = tiny.tiny_run("cure", revision_rate=0.4, revision_rate_decay=decay)
    assert run.total_steps == 8
    for step, rate in enumerate(rates):
        run.epoch, run.batch = divmod(step, run.loader.batches_per_epoch)
        run.step = step
        assert run.settings.rate_at(run) == pytest.approx(rate, abs=1e-12)
        assert run.policy(Average).epoch_metrics(run)["revision"]["rate"] == pytest.approx(
            rate, abs=1e-12
        )


@pytest.mark.parametrize(("start", "moves"), [(0.25, 2), (0.5, 4), (1.0, 8)])
def test_a_frozen_rate_stops_the_moves_at_the_start_of_the_decay(start, moves):
    run = tiny.tiny_run(
        "cure", revision_rate=1.0, revision_rate_decay="freeze", revision_decay_start=start
    )
    for batch in [*run.loader] * 2:
        train_step(run, batch)
        run.step += 1
        run.epoch, run.batch = divmod(run.step, run.loader.batches_per_epoch)
    assert run.policy(Average).epoch_metrics(run)["revision"]["moves"] == moves


OBJECTIVES = [
    # ST-AT climbs from two points at once, by a loop of its own.
    *((n, {}) for n, method in METHODS.items() if method.uses_attack and n != "st_at"),
    ("cure", {"inner": "ce"}),
    ("cure", {"inner": "ce_kl", "inner_kl_weight": 0.4}),
]


@pytest.mark.parametrize(("method", "settings"), OBJECTIVES, ids=str)
def test_attack_objectives_are_sums_over_the_batch(method, settings):
    if method.startswith("cure_eff"):
        settings = {"natural_share": 0.0}
    run = tiny.tiny_run(method, **settings)
    x, y = run.loader.batches[0]
    logits = torch.randn(len(y), tiny.CLASSES, dtype=torch.float64)
    once = objective_of(run, tiny.batch_of(x, y))(logits)
    both = tiny.batch_of(torch.cat([x, x]), torch.cat([y, y]))
    twice = objective_of(run, both)(torch.cat([logits, logits]))
    assert once.ndim == 0 and float(once) > 0.1
    assert float(twice) == pytest.approx(2 * float(once), rel=1e-12)


def objective_of(run, batch):
    """The objective that the run's method hands to PGD."""
    received = []

    def spy(images, objective, **other):
        received.append(objective)
        return images

    for policy in run.policies:
        policy.before(run, batch)
    run.pgd = spy
    with attack_mode(run.model, run.config.attack.attack_mode):
        run.method.attack(run, batch)
    (objective,) = received
    return objective
