"""CURE against the NumPy transcription: each preset, each setting, several steps."""

from __future__ import annotations

import copy
from dataclasses import asdict

import numpy as np
import pytest
import torch

import numpy_cure as oracle
import tiny_step as tiny
from cure_fast.classifier import attack_mode
from cure_fast.kernels.philox import COIN, philox_uniform
from cure_fast.methods import select_method
from cure_fast.policies.average import Average
from cure_fast.policies.conserve import Conserve
from cure_fast.recipes import find_recipe
from cure_fast.step.train_step import add_gradients, train_step
from cure_fast.training.trainer import next_step

PRESETS = ("cure", "cure_paper", "cure_official", "cure_eff", "cure_eff_official")
SETTINGS = (
    {"score": "signed"},
    {"score": "abs_of_sum"},
    {"score_loss": "kl"},
    {"mask_layers": "block_conv1"},
    {"mask_layers": "conv"},
    {"mask_layers": "all"},
    {"mask_stem": False},
    {"mask_scope": "global"},
    {"freeze": "hard"},
    {"freeze": "hard", "mask_scope": "global"},
    {"update": "prominence"},
    {"update": "prominence", "score_loss": "kl", "score": "signed"},
    {"objective": "rgp"},
    {"inner": "ce"},
    {"inner": "ce_kl", "inner_kl_weight": 0.4},
    {"natural_target": "detached"},
    {"revision_warmup": False, "revision_decay": 0.9},
    {"revision_order": "before"},
    {"revision_rate": 1.0},
    {"gamma": 0.0},
    {"beta": 0.0},
    {"percentile": 0.0},
    {"percentile": 100.0},
    {"alpha": 0.0},
    {"alpha": 1.0},
    {"rgp": False},
    {"revision": False},
)


def weights(model):
    return {
        n: p.detach().numpy().reshape(p.shape[:2]).copy()
        if p.ndim > 1
        else p.detach().numpy().copy()
        for n, p in model.named_parameters()
    }


def masked_gradients(run, batch):
    """The step's terms and gradients, before the optimiser moves anything."""
    terms = add_gradients(run, batch, 1)
    for policy in run.policies:
        policy.on_grads(run)
    run.gradients.clear()
    grads = {
        n: p.grad.numpy().reshape(p.shape[:2]) if p.ndim > 1 else p.grad.numpy()
        for n, p in run.model.named_parameters()
    }
    return {n: float(t) for n, t in terms.items()}, grads


def assert_follows_transcription(run, steps):
    """Train ``steps`` steps and check every quantity of each against the transcription."""
    settings = asdict(run.settings)
    w = weights(run.model)
    rev = {n: v.copy() for n, v in w.items()}
    momenta = {n: np.zeros_like(v) for n, v in w.items()}
    optim = run.config.optim
    for t in range(1, steps + 1):
        batch = run.loader.batch((t - 1) % len(run.loader.batches))
        coin = philox_uniform(run.config.run.seed, torch.tensor(0), run.step, stream=COIN).item()
        lands = coin < settings["revision_rate"] and settings["revision"]
        rates = {"decay": settings["revision_decay"], "warmup": settings["revision_warmup"]}
        attacked = batch.attacked(checked_attack(run, w, batch, settings))
        if lands and settings["revision_order"] == "before":
            rev = oracle.revise(rev, w, t, **rates)
        masks, masked = checked_gradients(run, w, rev, attacked, settings)

        next_step(run, batch)
        w = oracle.sgd(
            w,
            momenta,
            masked,
            masks,
            lr=optim.lr,
            momentum=optim.momentum,
            weight_decay=optim.weight_decay,
            hard=settings["freeze"] == "hard",
        )
        if lands and settings["revision_order"] == "after":
            rev = oracle.revise(rev, w, t, **rates)
        assert_weights(run.model, w)
        if settings["revision"]:
            assert_weights(run.networks["revision"], rev)


def assert_weights(model, expected):
    for name, value in weights(model).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-9, atol=1e-12, err_msg=name)


def checked_attack(run, w, batch, settings):
    """The adversarial images of the step to come, compared with the transcription's."""
    state = run.generators["attack"].get_state()
    x, y = batch.x, batch.y
    noise = torch.empty_like(x).normal_(0, 0.001, generator=clone(run.generators["attack"]))
    expected = oracle.attack(
        w,
        x.flatten(1).numpy(),
        (x + noise.clamp(-0.1, 0.1)).clamp(0, 1).flatten(1).numpy(),
        y.numpy(),
        eps=0.1,
        step=0.03,
        steps=5,
        inner=settings["inner"],
        inner_weight=settings["inner_kl_weight"],
    )
    with attack_mode(run.model, "eval"):
        x_adv = run.method.attack(run, batch)
    run.generators["attack"].set_state(state)
    np.testing.assert_allclose(x_adv.flatten(1).numpy(), expected, atol=1e-12)
    return x_adv


def checked_gradients(run, w, rev, batch, settings):
    """Masks and masked gradients of the step to come, compared with the transcription's."""
    x, x_adv = (images.flatten(1).numpy() for images in (batch.x, batch.x_adv))
    terms, _, masks, masked = oracle.step(w, rev, x, x_adv, batch.y.numpy(), settings)
    found_terms, found = rehearse(run, batch, rev)
    for name, value in terms.items():
        assert found_terms[name] == pytest.approx(value, rel=1e-9, abs=1e-14), name
    for name, grad in masked.items():
        np.testing.assert_allclose(found[name], grad, rtol=1e-7, atol=1e-12, err_msg=name)
    for name, mask in masks.items():
        assert np.array_equal(found[name] != 0, mask & (masked[name] != 0)), name
    return masks, masked


def rehearse(run, batch, rev):
    """Terms and masked gradients of the step to come, on a copy with revision model ``rev``."""
    twin = copy.deepcopy(run)
    for name, policy in zip(("model", "networks"), (twin.model, twin.networks), strict=True):
        assert policy is not getattr(run, name)
    if "revision" in twin.networks:
        with torch.no_grad():
            for name, p in twin.networks["revision"].named_parameters():
                p.copy_(torch.from_numpy(rev[name]).view_as(p))
    return masked_gradients(twin, batch)


def clone(generator):
    return torch.Generator().set_state(generator.get_state())


@pytest.mark.parametrize("preset", PRESETS)
def test_three_steps_of_each_preset(preset):
    settings = {"natural_share": 0.0} if preset.startswith("cure_eff") else {}
    run = tiny.tiny_run(preset, revision_rate=0.5, **settings)
    assert_follows_transcription(run, 3)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_three_steps_of_each_setting(settings):
    assert_follows_transcription(tiny.tiny_run("cure", **{"revision_rate": 0.5, **settings}), 3)


def test_presets_are_the_columns_of_the_table():
    paper = tiny.tiny_run("cure_paper").config
    s = paper.settings
    assert (s.beta, s.revision_warmup, s.revision_order, s.score) == (1, False, "before", "abs")
    official = select_method(find_recipe("cifar10-resnet18"), "cure_official")
    s = official.settings
    assert (s.score, s.score_loss, s.mask_layers, s.mask_stem) == (
        "signed",
        "kl",
        "block_conv1",
        False,
    )
    assert (s.beta, s.gamma, s.revision_order, s.revision_warmup) == (5, 1, "after", True)
    assert (official.attack.eps, official.attack.step_length) == (0.031, 0.007)
    assert official.eval.eval_eps == 8 / 255
    # A recipe with a radius of its own keeps it.
    assert select_method(find_recipe("quickstart"), "cure_official").attack.eps == 0.15


def test_percentile_zero_and_gamma_zero_is_trades():
    batches = tiny.tiny_batches(4)
    attack = {"clamp_start": False}
    cure = tiny.tiny_run("cure", batches=batches, attack=attack, percentile=0, gamma=0, beta=6)
    trades = tiny.tiny_run("trades", batches=batches, beta=6)
    for batch in cure.loader:
        train_step(cure, batch)
        train_step(trades, batch)
    for a, b in zip(cure.model.parameters(), trades.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_revision_never_shares_storage_with_the_trained_network():
    run = tiny.tiny_run("cure_eff", natural_share=0.5, revision_rate=1.0)
    for epoch in range(2):
        run.epoch, run.batch = epoch, 0
        for batch in run.loader:
            next_step(run, batch)
    revision = run.networks["revision"]
    for a, b in zip(run.model.parameters(), revision.parameters(), strict=True):
        assert a.data_ptr() != b.data_ptr()
        assert not torch.equal(a, b)


def test_natural_warm_up_is_natural_training_then_the_revision_starts_equal():
    batches = tiny.tiny_batches(2)
    run = tiny.tiny_run("cure_eff", batches=batches, natural_share=0.5)
    plain = tiny.tiny_run("natural", batches=batches)
    for batch in run.loader:
        terms = train_step(run, batch)
        train_step(plain, batch)
        assert set(terms) == {"total", "natural_ce", "natural_accuracy", "gradient_norm"}
    for a, b in zip(run.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(a, b)
    run.epoch, run.batch, run.step = 1, 0, 2
    _, terms = next_step(run, run.loader.batch(0))
    # Equal networks give equal predictions, so the first consistency loss is zero.
    assert float(terms["consistency"]) == pytest.approx(0, abs=1e-12)


def test_a_rate_of_zero_leaves_the_revision_model_alone():
    run = tiny.tiny_run("cure", revision_rate=0.0)
    before = weights(run.networks["revision"])
    for batch in run.loader:
        train_step(run, batch)
    assert all(np.array_equal(before[n], v) for n, v in weights(run.networks["revision"]).items())
    assert run.policy(Average).epoch_metrics(run)["revision"]["moves"] == 0


def test_weights_updated_are_told_where_layers_differ_in_them():
    for scope, told in (("tensor", False), ("global", True)):
        run = tiny.tiny_run("cure", percentile=30, mask_scope=scope)
        for batch in run.loader:
            train_step(run, batch)
        row = run.policy(Conserve).epoch_metrics(run)
        assert ("updated" in row) is told
    layers = {n for n in oracle.NAMES if "conv" in n and n.endswith("weight")}
    assert set(row["updated"]) == layers and len({*row["updated"].values()}) > 1
