"""A&P's weaker attacks on transformers, and the mixed batches that it learns from over AT."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch

import tiny_step as tiny
from cure_fast.batch import Batch
from cure_fast.cli.main import main
from cure_fast.losses import cross_entropy
from cure_fast.methods import ap, mart, pgd_at, trades
from cure_fast.models import build_model
from cure_fast.policies.mix import Mix
from cure_fast.training.trainer import next_step
from tiny_command import tiny_words

pytestmark = pytest.mark.usefixtures("one_thread")
METHODS = ("ap_at", "ap_trades", "ap_mart")
PLAIN = {"ap_at": pgd_at.attack, "ap_trades": trades.kl_attack, "ap_mart": pgd_at.attack}


def run_of(method, *, pixels=16, **settings):
    """A run on a small transformer, of four steps per epoch."""
    torch.manual_seed(1)
    x = torch.rand(4, 8, 3, pixels, pixels).unbind()
    data = [
        (images.contiguous(memory_format=torch.channels_last), torch.arange(8) % 4) for images in x
    ]
    model = build_model("vit-tiny", num_classes=4, width=8, image_size=pixels)
    run = tiny.tiny_run(
        method,
        batches=data,
        model=model,
        dtype=torch.float32,
        attack={"start": "uniform"},
        **settings,
    )
    attack = replace(run.config.attack, attack_steps=3)
    run.config = replace(run.config, attack=attack)
    return run


def test_the_share_grows_with_the_steps():
    run = run_of("ap_at")
    found = {}
    for position in (0, 3, 19, 38, 39, 40):
        run.epoch, run.batch = divmod(position, 4)
        found[position] = ap.kept(run)
    # (position + 1) / 4 epochs of 10.
    expected = {0: 0.025, 3: 0.1, 19: 0.5, 38: 0.975, 39: 1.0, 40: 1.0}
    assert found == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("method", METHODS)
def test_at_full_strength_the_attack_is_the_plain_one(method):
    run, plain = (run_of(method, ap_warmup=0.0) for _ in range(2))
    batch = run.loader.batch(0)
    made = run.method.attack(run, batch)
    with torch.no_grad():
        assert torch.equal(made, PLAIN[method](plain, batch))
    # Nothing was drawn for what is dropped.
    states = [r.generators["attack"].get_state() for r in (run, plain)]
    assert torch.equal(*states)


def attention_free(model, x):
    """Logits whose way back passes by every attention, step by step from the layers."""
    net = model.net
    tokens = net.patch_embed(x)
    tokens = torch.cat((net.cls_token.expand(len(x), -1, -1), tokens), 1) + net.pos_embed
    for block in net.blocks:
        tokens = tokens + block.attn(block.norm1(tokens)).detach()
        tokens = tokens + block.mlp(block.norm2(tokens))
    return net.head(net.norm(tokens)[:, 1:].mean(1))


def gradient(run, batch, logits):
    leaf = batch.x.clone().requires_grad_()
    return torch.autograd.grad(cross_entropy(logits(leaf), batch.y).sum(), leaf)[0]


def test_nothing_passes_attention_where_all_is_dropped(monkeypatch):
    run = run_of("ap_trades")
    # The mean over patches, which see pixels without attention too.
    run.model.net.global_pool = "avg"
    batch = run.loader.batch(0)
    expected = gradient(run, batch, lambda x: attention_free(run.model, x))
    monkeypatch.setattr(ap, "kept", lambda run: 0.0)
    with ap.dropping(run):
        torch.testing.assert_close(gradient(run, batch, run.model), expected)
    whole = gradient(run, batch, run.model)
    assert min(expected.abs().max(), (whole - expected).abs().max()) > 1e-3 * whole.abs().max()
    # The forward pass is the same, and the hooks are gone.
    torch.testing.assert_close(run.model(batch.x), attention_free(run.model, batch.x))
    assert not any(branch._forward_hooks for branch in run.model.attention_branches)


def test_each_block_is_dropped_by_a_coin_of_its_own(monkeypatch):
    run = run_of("ap_trades")
    batch = run.loader.batch(0)
    monkeypatch.setattr(ap, "kept", lambda run: 0.25)
    seen = Counter()

    def watch(branch):
        def forward(_module, _inputs, out):
            out.register_hook(lambda grad: seen.update([(branch, bool(grad.abs().max() > 0))]))

        return forward

    branches = run.model.attention_branches
    with ap.dropping(run):
        # Registered later, so that it sees the gradient behind the coin.
        handles = [b.register_forward_hook(watch(n)) for n, b in enumerate(branches)]
        for _ in range(200):
            gradient(run, batch, run.model)
    for handle in handles:
        handle.remove()
    for number in range(len(branches)):
        # 50 of 200, give or take four deviations of 6.1.
        assert 25 <= seen[number, True] <= 75 and seen[number, True] + seen[number, False] == 200


@pytest.mark.parametrize(
    ("share", "masked"), [(0.0, 16), (0.3, 11), (0.5, 8), (0.9, 1), (0.97, 0), (1.0, 0)]
)
def test_as_many_patches_are_masked_as_are_not_kept(monkeypatch, share, masked):
    run = run_of("ap_trades")
    monkeypatch.setattr(ap, "kept", lambda run: share)
    x = run.loader.batch(0).x
    mask, drawn = ap.masking(run, x), set()
    for _ in range(5):
        back = mask(x + 1) == x
        assert mask(x + 1).stride() == x.stride()
        blocks = back.unflatten(3, (4, 4)).unflatten(2, (4, 4))
        # Whole patches, the same of all images and channels.
        patches = blocks[0, 0, :, 0, :, 0]
        assert torch.equal(blocks, patches[:, None, :, None].expand(blocks.shape))
        assert int(patches.sum()) == masked
        drawn.add(tuple(patches.flatten().tolist()))
    assert (len(drawn) > 1) == (0 < masked < 16)


@pytest.mark.parametrize("method", METHODS)
def test_all_is_masked_before_each_step_at_first(monkeypatch, method):
    run = run_of(method)
    monkeypatch.setattr(ap, "kept", lambda run: 0.0)
    batch, seen = run.loader.batch(0), []
    # The class token sees pixels by attention alone: nothing moves.
    assert torch.equal(run.method.attack(run, batch), batch.x)
    monkeypatch.setattr(ap, "dropping", lambda run: nullcontext())
    run.model.register_forward_pre_hook(
        lambda _model, inputs: seen.append(inputs[0].detach().clone())
    )
    made = run.method.attack(run, batch)
    # With TRADES a pass of the natural images more.
    assert len(seen) in (3, 4) and all(torch.equal(images, batch.x) for images in seen)
    # The last step moves all pixels, within its length.
    assert 0 < (made - batch.x).abs().max() <= run.config.attack.step_length + 1e-6


def literal_mix(x, y, seed, step, prob):
    """Mixup and CutMix of timm's "batch" mode, pixel by pixel."""
    random = np.random.default_rng((seed, step))
    n, _, height, width = x.shape
    share, mixed = 1.0, x.clone()
    if random.random() < prob:
        if random.random() < 0.5:
            share = random.beta(1.0, 1.0)
            tall, wide = (int(side * np.sqrt(1 - share)) for side in (height, width))
            row, column = random.integers(height), random.integers(width)
            top, bottom = (np.clip(row + s * (tall // 2), 0, height) for s in (-1, 1))
            left, right = (np.clip(column + s * (wide // 2), 0, width) for s in (-1, 1))
            for i in range(n):
                for r in range(top, bottom):
                    for c in range(left, right):
                        mixed[i, :, r, c] = x[n - 1 - i, :, r, c]
            share = 1 - (bottom - top) * (right - left) / (height * width)
        else:
            share = random.beta(0.8, 0.8)
            for i in range(n):
                mixed[i] = share * x[i] + (1 - share) * x[n - 1 - i]
    targets = torch.zeros(n, 4, dtype=torch.float64)
    for i in range(n):
        targets[i, y[i]] += share
        targets[i, y[n - 1 - i]] += 1 - share
    return mixed, targets


def test_batches_are_mixed_as_in_a_transcription():
    run, kinds = run_of("ap_at", pixels=8), Counter()
    x, y = torch.rand(5, 3, 6, 10), torch.tensor([0, 3, 1, 1, 2])
    policy = Mix(0.7)
    for step in range(40):
        run.step = step
        batch = policy.before(run, Batch(x, y, torch.arange(5)))
        mixed, targets = literal_mix(x, y, run.config.run.seed, step, 0.7)
        torch.testing.assert_close(batch.x, mixed)
        logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
        expected = -(targets * logits.log_softmax(1)).sum(1)
        found = ap.mixed_cross_entropy(logits, batch)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
        grads = [torch.autograd.grad(loss.sum(), logits)[0] for loss in (found, expected)]
        torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-7)
        kinds["some" if bool((batch.notes["share"] < 1).any()) else "none"] += 1
    # 28 of 40, give or take four deviations of 2.9; small boxes may be empty.
    assert 14 <= kinds["some"] <= 39


def test_attack_and_loss_see_the_mixed_batch():
    run = run_of("ap_at", ap_warmup=0.0, mix_prob=1.0)
    seen, given = {}, run.loader.batch(0)
    run.step = 2
    (policy,) = run.policies
    expected = policy.before(run, given)
    assert not torch.equal(expected.x, given.x)
    real = run.method

    def attack(run, batch):
        seen["attack"] = batch
        return real.attack(run, batch)

    def loss(run, batch):
        seen["loss"] = batch
        return real.loss(run, batch)

    run.method = replace(real, attack=attack, loss=loss)
    terms = next_step(run, given)[1]
    for batch in seen.values():
        assert torch.equal(batch.x, expected.x)
        assert torch.equal(batch.notes["share"], expected.notes["share"])
    assert (seen["loss"].x_adv - expected.x).abs().max() <= run.config.attack.eps + 1e-6
    assert terms.keys() == {"total", "adversarial_ce", "adversarial_accuracy", "gradient_norm"}


def test_over_trades_and_mart_batches_are_not_mixed():
    assert [len(run_of(method).policies) for method in METHODS] == [1, 0, 0]
    for method, loss in (("ap_trades", trades.loss), ("ap_mart", mart.loss)):
        run = run_of(method)
        assert run.method.loss is loss and run.settings.beta == 6.0


def test_a_network_without_attention_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(tiny_words("--model", "resnet-small", method="ap_mart")) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "expected a vision transformer (vit-base" in told
    assert list(tmp_path.iterdir()) == []
