"""Half precision on the CPU: fp16's loss scaling changes no result, bf16 keeps float32 weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import tiny_step as tiny
from cure_fast.methods import METHODS
from cure_fast.models import build_model
from cure_fast.runs.environment import choose_dtype
from cure_fast.step.policy import Policy
from cure_fast.step.train_step import train_step
from cure_fast.training.trainer import next_step

CPU = torch.device("cpu")
CURE = (
    {"update": "total"},
    {"update": "prominence"},
    {"update": "prominence", "score_loss": "kl"},
    {"objective": "rgp"},
    {"freeze": "hard"},
    {"mask_scope": "global"},
    {"rgp": False},
)


def scaler(scale=65536.0):
    return torch.amp.GradScaler("cpu", init_scale=scale, enabled=True)


def states(run):
    networks = {"model": run.model, **run.networks}
    return {
        f"{name}.{key}": value.detach().clone()
        for name, network in networks.items()
        for key, value in network.state_dict().items()
    }


@pytest.mark.parametrize("settings", CURE, ids=str)
def test_scaled_cure_steps_equal_unscaled_ones(settings):
    plain, scaled = (tiny.tiny_run("cure", revision_rate=0.5, **settings) for _ in range(2))
    scaled.scaler = scaler()
    assert not plain.scaler.is_enabled()
    first = states(plain)
    for batch in [*plain.loader][:3]:
        terms = train_step(plain, batch)
        assert train_step(scaled, batch).keys() == terms.keys()
        expected, found = states(plain), states(scaled)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-12, msg=name)
    assert scaled.scaler.get_scale() == 65536.0
    assert any(not torch.equal(first[name], value) for name, value in states(plain).items())


class Recorder(Policy):
    """Keeps the gradients that a policy is shown."""

    def on_grads(self, run):
        self.grads = [p.grad.clone() for p in run.model.parameters()]


def test_policies_are_shown_unscaled_gradients():
    shown = []
    for loss_scaler in (scaler(), torch.amp.GradScaler("cpu", enabled=False)):
        run = tiny.tiny_run("cure")
        run.scaler, recorder = loss_scaler, Recorder()
        run.policies = (*run.policies, recorder)
        train_step(run, run.loader.batch(0))
        shown.append(recorder.grads)
    for scaled, plain in zip(*shown, strict=True):
        torch.testing.assert_close(scaled, plain, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ["trades", "pgd_at", "natural", "cure_official"])
def test_scaled_steps_of_other_methods_equal_unscaled_ones(method):
    plain, scaled = (tiny.tiny_run(method) for _ in range(2))
    scaled.scaler = scaler()
    for batch in [*plain.loader][:2]:
        train_step(plain, batch)
        train_step(scaled, batch)
    for name, value in states(plain).items():
        torch.testing.assert_close(states(scaled)[name], value, rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize("settings", CURE, ids=str)
def test_a_step_whose_gradient_overflows_is_skipped(settings):
    run = tiny.tiny_run("cure", dtype=torch.float32, revision_rate=1.0, **settings)
    run.scaler = scaler(2.0**120)
    loss = run.method.loss
    # Finite in float32, but 2^120 times as much is not: what a too large scale does to fp16.
    run.method = replace(
        run.method, loss=lambda *given: {n: 1e6 * t for n, t in loss(*given).items()}
    )
    before = states(run)
    batch = run.loader.batch(0)
    terms = train_step(run, batch)
    assert all(torch.isfinite(term) for term in terms.values())
    assert all(torch.equal(before[name], value) for name, value in states(run).items())
    assert not run.optimizer.state and run.scaler.get_scale() == 2.0**119
    # A step that the scale can hold moves the weights again.
    run.scaler = scaler()
    run.method = METHODS["cure"]
    train_step(run, batch)
    after = states(run)
    assert any(not torch.equal(before[name], value) for name, value in after.items())
    assert all(torch.isfinite(value).all() for value in after.values())


def half_run(amp, method="cure", **settings):
    """A float32 run on a small ResNet that computes as ``--amp`` says."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(12, 3, 8, 8, generator=generator)
    y = torch.randint(4, (12,), generator=generator)
    model = build_model("resnet-small", num_classes=4, width=4)
    model.compute_dtype = choose_dtype(amp, CPU)
    return tiny.tiny_run(
        method, batches=[(x, y)], model=model, dtype=torch.float32, attack=None, **settings
    )


@pytest.mark.parametrize("method", METHODS)
def test_bf16_computes_in_half_and_keeps_float32(method):
    settings = {"natural_share": 0.0} if method.startswith("cure_eff") else {}
    run = half_run("bf16", method, **settings)
    seen = {"conv": set(), "logits": set()}
    run.model.conv1.register_forward_hook(lambda *a: seen["conv"].add(a[2].dtype))
    run.model.register_forward_hook(lambda *a: seen["logits"].add(a[2].dtype))
    before = states(run)
    for _ in range(2):
        _, terms = next_step(run, run.loader.batch(0))
        assert all(t.dtype is torch.float32 and torch.isfinite(t) for t in terms.values())
    assert seen == {"conv": {torch.bfloat16}, "logits": {torch.float32}}
    after = states(run)
    weights = {name: value for name, value in after.items() if value.is_floating_point()}
    assert all(w.dtype is torch.float32 and w.isfinite().all() for w in weights.values())
    assert any(not torch.equal(before[name], value) for name, value in weights.items())
    assert not run.scaler.is_enabled()


def test_precisions_on_the_cpu():
    assert choose_dtype("off", CPU) is None and choose_dtype("auto", CPU) is None
    assert choose_dtype("bf16", CPU) is torch.bfloat16
    assert half_run("fp16").scaler.is_enabled()
    assert not half_run("off").scaler.is_enabled()
