"""Losses that the fast engine cannot take apart are the eager engine's, and never half computed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import engine_runs as runs
from cure_fast.engine.passes import leaves_of

pytestmark = pytest.mark.usefixtures("one_thread")


def penalised(run, x, x_adv, y):
    """Cross-entropy, and the squared gradient of the images."""
    with torch.enable_grad():
        leaf = x_adv.detach().requires_grad_()
        logits = run.model(leaf)
        ce = nn.functional.cross_entropy(logits, y)
        (grad,) = torch.autograd.grad(ce, leaf, create_graph=True)
    return {"total": ce + grad.square().sum()}


@pytest.mark.parametrize("method", ["pgd_at", "cure_paper"])
def test_a_loss_with_the_gradient_of_its_images_goes_to_the_eager_engine(method, capsys):
    settings = {"revision_rate": 1.0, "rgp": False} if method == "cure_paper" else {}
    made = [
        runs.make_run(method, engine, data=runs.batches(2), **settings)
        for engine in ("fast", "eager")
    ]
    for run in made:
        run.method = replace(run.method, loss=penalised)
        runs.train(run, 3)
    fast, eager = made
    assert runs.differing(runs.snapshot(fast), runs.snapshot(eager)) == []
    assert fast.engine.name == "eager" and fast.counted == eager.counted
    assert fast.engine.reason == "a loss with the gradient of its images"
    assert capsys.readouterr().err.count("\n") == 1


def weight_penalty(run, x):
    return 0.1 * sum(p.square().sum() for p in run.model.parameters())


def feature_penalty(run, x):
    return run.model.conv1(x).square().mean()


def other_leaf(run, x):
    return (torch.ones(3, requires_grad=True) * x.mean()).sum()


@pytest.mark.parametrize(
    ("extra", "what"),
    [(weight_penalty, "conv1.weight"), (feature_penalty, "conv1.weight"), (other_leaf, "a tensor")],
)
@pytest.mark.parametrize("method", ["natural", "trades", "cure"])
def test_a_loss_that_goes_around_the_logits_goes_to_the_eager_engine(method, extra, what, capsys):
    """Its gradient would be lost without a word."""
    made = [runs.make_run(method, engine, data=runs.batches(2)) for engine in ("fast", "eager")]
    for run in made:
        loss = run.method.loss

        def more(run, x, x_adv, y, loss=loss):
            terms = loss(run, x, x_adv, y)
            return {**terms, "total": terms["total"] + extra(run, x)}

        run.method = replace(run.method, loss=more)
        runs.train(run, 3)
    fast, eager = made
    assert runs.differing(runs.snapshot(fast), runs.snapshot(eager)) == []
    assert fast.engine.name == "eager"
    assert fast.engine.reason == (
        f"a loss that reaches {what} other than through the network's logits"
    )
    assert capsys.readouterr().err.count("\n") == 1


def test_leaves_of_a_loss():
    a, b = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    shared = a * 2
    assert {id(leaf) for leaf in leaves_of((shared * shared + b.detach()).sum())} == {id(a)}
    assert {id(leaf) for leaf in leaves_of((shared + b).sum() + shared.sum())} == {id(a), id(b)}
    assert leaves_of(a) == [a] and leaves_of(a.detach().sum()) == []


def test_parts_of_the_fast_engine_cannot_be_left_out_of_the_eager_one(capsys):
    runs.make_run("pgd_at", "eager", without=["fold"])
    assert "--engine-without has no effect on the eager engine" in capsys.readouterr().err
    runs.make_run("pgd_at", "fast", without=["fold"])
    assert capsys.readouterr().err == ""
