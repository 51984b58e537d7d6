"""Revision as a policy: against CURE, against its formula, and what it asks of a method."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

import tiny_step
from cure_fast.methods.cure import CureSettings
from cure_fast.policies.average import Average
from cure_fast.policies.revision import RevisionSettings
from cure_fast.step.train_step import loss_of
from cure_fast.training.trainer import next_step

SETTINGS = {"revision_rate": 0.6, "revision_decay": 0.9, "revision_rate_decay": "cosine"}


def revising(method, *, batches=None, **settings):
    torch.manual_seed(3)
    return tiny_step.tiny_run(
        method,
        model=tiny_step.Normalised(),
        batches=batches,
        policies={"revision": RevisionSettings(**SETTINGS, **settings)},
    )


@pytest.mark.parametrize("pieces", [None, 5])
def test_trades_with_revision_is_cure_without_its_mask(pieces):
    torch.manual_seed(3)
    settings = {"rgp": False, "beta": 6.0, "gamma": 0.7, **SETTINGS}
    cure = tiny_step.tiny_run("cure", model=tiny_step.Normalised(), **settings)
    trades = revising("trades", revision_weight=0.7)
    for run in (cure, trades):
        run.micro_batch_size = pieces
        for batch in run.loader:
            next_step(run, batch)
    for name, network in cure.all_networks.items():
        for key, tensor in network.state_dict().items():
            assert torch.equal(tensor, trades.all_networks[name].state_dict()[key]), (name, key)
    moves = trades.policy(Average).moves
    assert 0 < moves < trades.step


def move_apart(network):
    torch.manual_seed(7)
    for parameter in network.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)


def kl(p, q):
    """Batch mean of KL(softmax(p) || softmax(q)), with p taken as given."""
    p = p.detach().softmax(1)
    return (p * (p.log() - q.log_softmax(1))).sum(1).mean()


@pytest.mark.parametrize("method", ["pgd_at", "natural", "mart"])
def test_it_adds_its_formula_to_any_loss(method):
    run, plain = revising(method, revision_weight=0.7), revising(method)
    plain.policies = ()
    for network in (run.networks["revision"], plain.networks["revision"]):
        move_apart(network)
    batch = run.loader.batch(0)
    x_adv = (batch.x + 0.05 * torch.cos(17 * batch.x)).clamp(0, 1)
    batch = batch.attacked(batch.x if method == "natural" else x_adv)
    terms = loss_of(run, batch)
    expected = plain.method.loss(plain, batch)
    taught = copy.deepcopy(plain.networks["revision"]).train()
    term = kl(taught(batch.x), plain.model(batch.x))
    if method != "natural":
        term = term + kl(taught(batch.x_adv), plain.model(batch.x_adv))
    torch.testing.assert_close(terms["consistency"], term)
    torch.testing.assert_close(terms["total"], expected["total"] + 0.7 * term)
    accuracies = {"natural_accuracy", "adversarial_accuracy"}
    assert (
        terms.keys() - accuracies == expected.keys() - accuracies | {"consistency"}
        and term.detach() > 1e-3
    )
    pairs = [
        torch.autograd.grad(total, [*r.model.parameters()])
        for r, total in ((run, terms["total"]), (plain, expected["total"] + 0.7 * term))
    ]
    for ours, theirs in zip(*pairs, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_passes_in_evaluation_mode_or_without_gradient_are_not_taken_for_the_losses():
    """A method may look at the images in other ways before it computes its loss."""
    run = revising("trades")
    move_apart(run.networks["revision"])
    batch = run.loader.batch(0)
    batch = batch.attacked((batch.x + 0.05).clamp(0, 1))
    original = run.method.loss

    def peeking(run, batch):
        with torch.no_grad():
            run.model(batch.x)
        run.model.eval()
        run.model(batch.x_adv)
        run.model.train()
        return original(run, batch)

    run.method = replace(run.method, loss=peeking)
    terms = loss_of(run, batch)
    revision = run.networks["revision"]
    images = (batch.x, batch.x_adv)
    expected = sum(kl(revision(x), run.model(x)) for x in images)
    torch.testing.assert_close(terms["consistency"], expected)
    slopes = [
        torch.autograd.grad(term, [*run.model.parameters()])
        for term in (terms["consistency"], expected)
    ]
    for ours, theirs in zip(*slopes, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_forward_hook_is_gone_when_the_loss_is_computed_or_fails():
    run = revising("trades")
    batch = run.loader.batch(0)
    loss_of(run, batch.attacked(batch.x))
    assert not run.model._forward_hooks
    with pytest.raises(AttributeError):
        loss_of(run, None)
    assert not run.model._forward_hooks


def test_cure_and_the_policy_have_the_same_flags_for_the_revision_model():
    shared = vars(RevisionSettings()).keys() - {"revision_weight"}
    ours, theirs = CureSettings(), RevisionSettings()
    assert shared <= vars(ours).keys()
    assert all(getattr(ours, name) == getattr(theirs, name) for name in shared)
