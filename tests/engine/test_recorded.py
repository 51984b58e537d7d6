"""Recorded losses: their steps are the eager engine's, in fewer operations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import engine_runs as runs
from cure_fast.engine import fast
from cure_fast.engine.loss import Loss
from cure_fast.methods import METHODS
from cure_fast.policies.awp import AWP
from cure_fast.policies.revision import REVISION
from cure_fast.step.policy import Policy
from networks import Dense, Odd, Plain, Transformer, network

pytestmark = pytest.mark.usefixtures("one_thread", "sample_methods")

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def recording(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let losses be recorded on the CPU too, and not compiled."""
    monkeypatch.setattr(fast, "ON_GPU", ("graph", *fast.COMPILED))


def pair(method, kind=Plain, **options):
    """Two equal runs, each with a network of its own."""
    options.setdefault("data", runs.batches(1))
    # The attack is no part of the loss.
    options.setdefault("attack", {"attack_steps": 1})
    made = (runs.make_run(method, e, model=network(kind), **options) for e in ("fast", "eager"))
    return runs.Pair(*made)


def is_recorded(run):
    return run.engine.name == "fast" and bool(run.engine.prepared.loss.recorded)


# Methods and networks.


# Losses that differ in kind: of others' terms, weights and networks these are made.
KINDS = ("natural", "trades", "mart", "alp", "cure", "cure_eff", "gairat", "te", "lbgat", "las_at")
KINDS += ("iad2", "rat", "ap_mart", "guided", "derived", "hooked")


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(method, marks=() if method in KINDS else pytest.mark.slow)
        for method in [*METHODS, "guided", "derived", "hooked"]
    ],
)
def test_a_recorded_step_is_the_eager_one(method):
    """With stilled statistics, trained second networks, and gradients inside the loss."""
    settings = {"natural_share": 0.5} if method.startswith("cure_eff") else {}
    kind = Transformer if method.startswith("ap_") else Plain
    both = pair(method, kind, **settings)
    runs.assert_steps_equal(both, 2, signs=0.05)
    assert is_recorded(both.fast)


@pytest.mark.parametrize("kind", [Dense, Odd, Transformer])
def test_any_network_is_recorded(kind):
    both = pair("cure", kind)
    runs.assert_steps_equal(both, 2)
    assert is_recorded(both.fast)


@pytest.mark.parametrize(
    "model",
    [
        "preactresnet18",
        *(pytest.param(m, marks=pytest.mark.slow) for m in ("resnet18", "wrn28-10")),
    ],
)
def test_the_models_here_are_recorded(model):
    attack = {"attack_steps": 1}
    both = runs.pair("trades", model=model, data=runs.batches(1), attack=attack)
    runs.assert_steps_equal(both, 1)
    assert is_recorded(both.fast)


def test_teachers_are_not_trained():
    teachers = {name: network(Plain) for name in ("natural", "robust")}
    nn.init.normal_(teachers["robust"].linear.weight)
    both = pair("taught", teachers=teachers)
    runs.assert_steps_equal(both, 2)
    assert is_recorded(both.fast)
    for name, teacher in both.fast.teachers.items():
        assert not runs.differing(teacher.state_dict(), teachers[name].state_dict())


def test_weights_are_perturbed_by_the_gradients_of_the_recorded_loss():
    both = pair("cure", policies={"awp": replace(AWP.settings, awp_gamma=0.05)})
    runs.assert_steps_equal(both, 2)
    assert len(both.fast.engine.prepared.loss.recorded) == 2


@pytest.mark.parametrize("method", ["pgd_at", "trades"])
def test_what_policies_add_to_the_loss_is_recorded(method):
    """With the logits of the method's own loss, or passes of the policy's."""
    settings = replace(REVISION.settings, revision_rate=0.9, revision_decay=0.5)
    both = pair(method, policies={"revision": settings})
    runs.assert_steps_equal(both, 3)
    assert is_recorded(both.fast) and both.fast.policies[0].moves > 0


# What a loss may hold.


def penalised(run, batch):
    """Cross-entropy, and the squared gradient of the images."""
    with torch.enable_grad():
        leaf = batch.x_adv.detach().requires_grad_()
        ce = F.cross_entropy(run.model(leaf), batch.y)
        (grad,) = torch.autograd.grad(ce, leaf, create_graph=True)
    return ce + grad.square().sum()


EXTRAS = {
    "weights": lambda run, batch: 0.1 * sum(p.square().sum() for p in run.model.parameters()),
    "features": lambda run, batch: run.model.conv1(batch.x).square().mean(),
    "images": penalised,
    "a leaf": lambda run, batch: (torch.ones(3, requires_grad=True) * batch.x.mean()).sum(),
    "values in place": lambda run, batch: batch.x.mean(dim=(1, 2, 3)).clone().clamp_(max=0.5).sum(),
    "a number": lambda run, batch: (
        run.engine.number("weight", lambda run: run.step + 1.0) * run.model(batch.x).square().mean()
    ),
}


def add(run, extra):
    """Add to the total of the run's loss."""
    loss = run.method.loss

    def more(run, batch):
        terms = loss(run, batch)
        return {**terms, "total": terms["total"] + extra(run, batch)}

    run.method = replace(run.method, loss=more)


@pytest.mark.parametrize(
    ("method", "extra"),
    [*(("natural", extra) for extra in EXTRAS), ("cure", "images"), ("cure", "features")],
)
def test_losses_around_the_logits_are_recorded(method, extra):
    both = pair(method, **({"rgp": False} if (method, extra) == ("cure", "images") else {}))
    for run in (both.fast, both.eager):
        add(run, EXTRAS[extra])
    runs.assert_steps_equal(both, 3, bound=3e-5)
    assert is_recorded(both.fast)


def held(run, batch):
    return 0.1 * HELD[id(run)].square().sum()


HELD: dict[int, torch.Tensor] = {}
GRAPHLESS = {
    "a held weight": (held, "the loss holds a tensor itself that takes a gradient"),
    "a read value": (
        lambda run, batch: batch.x.mean().item() * run.model(batch.x).sum(),
        "the loss reads the value",
    ),
    "a generator": (
        lambda run, batch: (
            torch.empty(3).uniform_(generator=run.generators["attack"]).sum()
            * run.model(batch.x).sum()
        ),
        "Generator",
    ),
}


@pytest.mark.parametrize("case", GRAPHLESS)
def test_a_loss_without_a_graph_is_computed_as_it_is_written(case, capsys):
    extra, reason = GRAPHLESS[case]
    both = pair("trades")
    for run in (both.fast, both.eager):
        HELD[id(run)] = run.model.linear.weight
        add(run, extra)
    runs.assert_steps_equal(both, 2, bound=3e-5)
    assert not is_recorded(both.fast) and both.fast.engine.name == "fast"
    assert both.fast.engine.description == "fast without compile-loss, stack"
    (line,) = capsys.readouterr().err.splitlines()
    assert "goes on without stack and compile-loss, as the loss has no graph" in line
    assert reason in line


def test_a_fault_of_the_loss_is_raised_by_the_loss():
    run = runs.make_run("pgd_at", model=network(Plain), data=runs.batches(1))
    add(run, lambda run, batch: torch.autograd.grad(batch.x.sum(), batch.x))
    with pytest.raises(RuntimeError, match="does not require grad"):
        runs.train(run, 1)


# Precision.


@pytest.mark.parametrize(
    ("method", "kind"),
    [("natural", Plain), ("trades", Dense), *(("cure", k) for k in (Plain, Odd, Transformer))],
)
def test_gradients_in_double_precision_are_those_of_autograd(method, kind):
    """And statistics; without kernels of other precision in the way."""
    model = network(kind)
    run = runs.make_run(method, "eager", model=model.double(), data=runs.batches(1))
    batch = run.loader.batch(0)
    batch = replace(batch, x=batch.x.double())
    batch = batch.attacked((batch.x + 0.05 * torch.rand_like(batch.x)).clamp(0, 1))
    loss = Loss(run, stacked=True, compiled=False)
    found = []
    start = runs.snapshot(run)
    for recorded in ("a kind", None):
        for name, tensor in runs.tensors(run).items():
            tensor.detach().copy_(start[name])
        run.optimizer.zero_grad()
        run.gradients.clear()
        terms = loss.step(batch, recorded)
        grads = {name: p.grad.clone() for name, p in run.model.named_parameters()}
        further = runs.flat(run.gradients)
        found.append({**terms, **grads, **further, **runs.snapshot(run)})
    assert runs.worst(*found)[0] < 1e-12
    assert runs.differing(start, found[0])


@pytest.mark.parametrize(
    ("method", "kind"), [("trades", Plain), ("cure", Plain), ("trades", Odd), ("cure", Transformer)]
)
def test_half_precision_is_the_eager_one(method, kind):
    both = pair(method, kind, dtype=runs.HALF)
    before = {name: value.clone() for name, value in runs.tensors(both.fast).items()}
    ours, theirs = both.step(*both.fast.loader.batches[0])
    assert is_recorded(both.fast) and both.fast.engine.prepared.copies
    runs.assert_equal_terms(ours, theirs, 2**-6)
    assert runs.half_distance(both.fast, both.eager, before) < runs.HALF_BOUND


# The graph.


def graph_of(method, *, stacked=True, in_two=False, kind=Plain, extra=None, **options):
    run = runs.make_run(method, "eager", model=network(kind), data=runs.batches(1), **options)
    if extra is not None:
        add(run, extra)
    batch = run.loader.batch(0)
    batch = batch.attacked((batch.x + 0.01).clamp(0, 1))
    loss = Loss(run, stacked=stacked, compiled=in_two)
    return loss, batch, loss.record(batch)


def calls(graph, target):
    return [n for p in graph.parts for n in p.graph.find_nodes(op="call_function", target=target)]


@pytest.mark.parametrize(("method", "sweeps"), [("natural", 1), ("trades", 1), ("cure", 2)])
def test_sweeps_through_a_pass_share_their_input_gradients(method, sweeps):
    passes = 1 if method == "natural" else 2
    for stacked, each in ((False, sweeps), (True, 1)):
        backward = calls(graph_of(method, stacked=stacked)[2], aten.convolution_backward.default)
        # The images take no gradient, so the first convolution has none of its input.
        assert sum(node.args[10][0] for node in backward) == passes * each
        assert sum(node.args[10][1] for node in backward) == passes * sweeps * 2


def test_sweeps_that_need_one_another_are_not_joined():
    """The gradient of the images is in the loss whose sweep would share it."""
    found = graph_of("pgd_at", extra=penalised)[2]
    plain = graph_of("pgd_at", extra=penalised, stacked=False)[2]
    both = [len(calls(graph, aten.convolution_backward.default)) for graph in (found, plain)]
    assert both[0] == both[1]


@pytest.mark.parametrize("method", ["cure", "derived"])
def test_a_cut_graph_computes_what_the_whole_one_does(method):
    """One of them writes in place between its first way back and the loss."""
    found = []
    for in_two in (False, True):
        loss, batch, graph = graph_of(method, in_two=in_two)
        assert len(graph.parts) == 1 + in_two
        values = graph(loss._given(batch))
        found.append({str(name): value for name, value in values.items()} | runs.snapshot(loss.run))
    assert runs.differing(*found) == []


def test_batches_are_counted_outside_of_the_graph():
    loss, batch, graph = graph_of("trades")
    assert not calls(graph, aten.add_.Tensor)
    graph(loss._given(batch))
    assert int(loss.run.model.bn1.num_batches_tracked) == 2


def test_tensors_that_a_loss_holds_are_read_where_they_are():
    weight = torch.ones(())
    loss, batch, graph = graph_of("natural", extra=lambda run, batch: weight * batch.x.mean())
    assert not [n for part in graph.parts for n in part.graph.find_nodes(op="get_attr")]
    totals = []
    for value in (1.0, 3.0):
        weight.fill_(value)
        totals.append(float(graph(loss._given(batch))["term", "total"]))
    assert totals[1] - totals[0] == pytest.approx(2 * float(batch.x.mean()), rel=1e-5)


def test_recording_computes_and_moves_nothing():
    run = runs.make_run("cure", "eager", model=network(Plain), data=runs.batches(1))
    before = runs.snapshot(run)
    loss = Loss(run, stacked=True, compiled=True)
    loss.record(run.loader.batch(0))
    assert runs.differing(before, runs.snapshot(run)) == []
    assert all(p.grad is None for p in run.model.parameters()) and not run.gradients
    assert not loss.leaves


def test_a_cpu_records_nothing_that_is_not_asked_for(monkeypatch):
    monkeypatch.undo()
    run = runs.make_run("cure", model=network(Plain), data=runs.batches(1))
    runs.train(run, 1)
    assert not run.engine.prepared.loss.recorded


def test_notes_of_a_recorded_loss_are_as_wide_as_the_loss_made_them():
    found = []
    for without in ((), ("stack", "compile-loss")):
        run = runs.make_run(
            "natural", model=network(Plain), data=runs.batches(1), dtype=runs.HALF, without=without
        )
        loss, seen = run.method.loss, {}

        def noting(run, batch, loss=loss):
            terms = loss(run, batch)
            batch.notes["logits"] = run.model(batch.x)
            return terms

        class Seeing(Policy):
            def on_step(self, run, batch, seen=seen):
                seen.update(batch.notes)

        run.method = replace(run.method, loss=noting)
        run.policies = (Seeing(),)
        runs.train(run, 1)
        assert is_recorded(run) == (without == ())
        found.append(seen["logits"])
    assert found[0].dtype == found[1].dtype == torch.float32
    assert not found[0].requires_grad and found[0].shape == found[1].shape
