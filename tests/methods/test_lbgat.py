"""LBGAT against its official loss, what moves its two networks, its guides and its schedule."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tiny_step
from cure_fast.classifier import attack_mode
from cure_fast.cli.main import main
from cure_fast.config import Config, ModelConfig
from cure_fast.errors import InputError
from cure_fast.methods import check_config, find_method, publish, select_method
from cure_fast.methods.lbgat import LbgatSettings
from cure_fast.models.building import build_for_data
from cure_fast.recipes import find_recipe
from cure_fast.step.train_step import train_step
from cure_fast.training.schedules import lr_at


def official_loss(out_adv, out_natural, out, y, beta):
    """dvlab-research/LBGAT's lbgat.py, from the logits on."""
    loss_mse = nn.MSELoss()(out_adv, out) + nn.CrossEntropyLoss()(out, y)
    p, q = F.log_softmax(out_adv, dim=1), F.softmax(out_natural, dim=1)
    return loss_mse + beta * (1.0 / out.size(0)) * nn.KLDivLoss(reduction="sum")(p, q)


@pytest.mark.parametrize("beta", [0.0, 6.0])
def test_loss_and_gradients_are_the_official_ones(beta):
    """Of all three logits: nothing is detached."""
    logits = (2 * torch.randn(3, 32, 10, dtype=torch.float64)).requires_grad_().unbind()
    out_adv, out_natural, out = logits
    y = torch.randint(10, (32,))
    run = tiny_step.tiny_run("lbgat", beta=beta)
    given = iter((out_adv, out_natural))
    run.model, run.networks = lambda x: next(given), {"guide": lambda x: out}
    total = run.method.loss(run, tiny_step.batch_of(torch.zeros(32, 1, 1, 1), y))["total"]
    expected = official_loss(*logits, y, beta)
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)
    moved = (out_adv, out, *([out_natural] if beta else []))
    for a, b in zip(
        torch.autograd.grad(total, moved), torch.autograd.grad(expected, moved), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-15)
        assert a.abs().max() > 1e-4


@pytest.mark.parametrize("beta", [0.0, 6.0])
def test_one_optimiser_moves_both_networks_and_their_statistics(beta):
    torch.manual_seed(3)
    run = tiny_step.tiny_run("lbgat", model=tiny_step.Normalised(), beta=beta)
    robust, guide = copy.deepcopy(run.model), copy.deepcopy(run.networks["guide"])
    start, optim, seen = copy.deepcopy([robust, guide]), run.config.optim, []
    optimizer = torch.optim.SGD(
        [{"params": robust.parameters()}, {"params": guide.parameters()}],
        lr=optim.lr,
        momentum=optim.momentum,
        weight_decay=optim.weight_decay,
    )
    run.model.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    ways_back = []
    run.model.register_forward_hook(lambda *given: ways_back.append(given[2].requires_grad))
    for batch in run.loader:
        train_step(run, batch)
        # Adversarial images first: it shows in the running statistics.
        x_adv = seen[-2]
        assert torch.equal(seen[-1], batch.x) and not torch.equal(x_adv, batch.x)
        # Where the natural images count for statistics alone, they cost no way back.
        assert ways_back[-2:] == [True, beta > 0]
        out_adv, out_natural, out = robust(x_adv), robust(batch.x), guide(batch.x)
        optimizer.zero_grad()
        official_loss(out_adv, out_natural, out, batch.y, beta).backward()
        optimizer.step()
        for ours, theirs in ((run.model, robust), (run.networks["guide"], guide)):
            for (name, value), other in zip(
                ours.state_dict().items(), theirs.state_dict().values(), strict=True
            ):
                torch.testing.assert_close(value, other, rtol=1e-9, atol=1e-11, msg=name)
    counts = [int(net.norm.num_batches_tracked) for net in (run.model, run.networks["guide"])]
    assert counts == [8, 4]
    for former, now in zip(start, (robust, guide), strict=True):
        assert not any(map(torch.equal, former.parameters(), now.parameters()))


def test_images_stay_in_the_ball_and_in_the_box():
    run = tiny_step.tiny_run("lbgat")
    batch = run.loader.batch(0)
    with attack_mode(run.model, "eval"):
        x_adv = run.method.attack(run, batch)
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    assert 0.09 < (x_adv - batch.x).abs().max() <= 0.1 + 1e-12


def guide_of(model, **settings):
    """The guide of a network, without its weights."""
    run = tiny_step.tiny_run("natural")
    run.config = replace(run.config, settings=LbgatSettings(**settings))
    with torch.device("meta"):
        run.model = build_for_data(
            model, data="cifar10", num_classes=10, width=2, stem="cifar", normalize="none"
        )
        return find_method("lbgat").networks(run)["guide"].description


def test_a_wide_network_is_guided_by_resnet18_and_others_by_their_like():
    assert {guide_of(f"wrn{n}-10")["model"] for n in (28, 34)} == {"resnet18"}
    assert guide_of("wrn34-10")["width"] == ""
    small = guide_of("resnet-small")
    assert (small["model"], small["width"]) == ("resnet-small", "2")
    assert guide_of("wrn34-10", guide="resnet34")["model"] == "resnet34"


def test_an_unknown_guide_is_refused_before_anything_is_written(tmp_path, capsys):
    out = tmp_path / "run"
    words = f"train quickstart --method lbgat --guide resnet19 --out {out}".split()
    assert main(words) == 2 and not out.exists()
    error = capsys.readouterr().err
    assert "--guide: expected one of resnet18," in error and "Perhaps you meant resnet18" in error
    assert error.count("\n") == 1
    config = Config(
        method="lbgat",
        model=ModelConfig(model="resnet50", stem="imagenet"),
        settings=LbgatSettings(guide="resnet18"),
    )
    check_config(config)
    with pytest.raises(InputError, match="--guide: expected one of"):
        check_config(replace(config, settings=LbgatSettings(guide="wrn28-10")))


@pytest.mark.parametrize("model", ["resnet18", "wrn34-10"])
def test_the_published_set_up(model):
    config = select_method(find_recipe("cifar10-resnet18"), "lbgat")
    config = publish(replace(config, model=replace(config.model, model=model)))
    rates = {0: 0.02, 1: 0.1, 74: 0.1, 75: 0.01, 89: 0.01, 90: 1e-3, 99: 1e-3}
    assert {e: lr_at(config.optim, e / config.optim.epochs) for e in rates} == pytest.approx(rates)
    assert (config.optim.epochs, config.optim.weight_decay) == (100, 2e-4)
    assert (config.attack.eps, config.attack.step_length) == (0.031, 0.007)
    assert config.settings.beta == 0 and not config.attack.clamp_start
