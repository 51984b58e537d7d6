"""What goes wrong in a fast step: nothing moves, or the eager engine takes over where it stood."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import engine_runs as runs
from cure_fast import attacks
from cure_fast.cli.main import main
from cure_fast.engine import fast
from cure_fast.engine import update as engine_update
from cure_fast.errors import DivergedError, MemoryExhaustedError
from cure_fast.kernels import pgd_step_
from cure_fast.methods import METHODS
from cure_fast.models import ImageClassifier
from cure_fast.step.policy import Wanted
from networks import network

pytestmark = pytest.mark.usefixtures("one_thread")

HALF = torch.bfloat16


def poisoned(batch):
    x, y = batch
    x = x.clone(memory_format=torch.preserve_format)
    x[1, 0] = float("nan")
    return x, y


def copies(run):
    return {str(i): c.clone() for i, c in enumerate(run.engine.prepared.copies.values())}


# Steps that are not finite.


@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        *((method, None) for method in METHODS),
        ("trades", HALF),
        ("cure", HALF),
    ],
)
def test_a_batch_with_nan_moves_nothing(method, dtype):
    # Where the revision model moves first: see below.
    still = {"revision_rate": 0.0} if method == "cure_paper" else {}
    run = runs.make_run(method, data=runs.batches(2), dtype=dtype, **still)
    runs.train(run, 1)
    before, cast = runs.snapshot(run), copies(run)
    assert bool(cast) == (dtype is HALF)
    assert runs.step(run, *poisoned(run.loader.batches[1])) is None
    assert runs.differing(before, runs.snapshot(run)) == []
    assert runs.differing(cast, copies(run)) == []
    assert (run.skipped, run.skipped_in_row, run.counted, run.step) == (1, 1, 1, 2)
    assert all(p.grad is None for p in run.model.parameters()) and not run.gradients
    assert runs.step(run, *run.loader.batches[1]) is not None
    assert runs.differing(before, runs.snapshot(run))
    assert (run.skipped, run.skipped_in_row, run.counted) == (1, 0, 2)


ORDERS = {
    "the revision model moves first": {
        "revision_order": "before",
        "revision_buffers": "average",
        "revision_mode": "eval",
        "revision_rate": 1.0,
    },
    "its statistics are its own": {"revision_order": "before", "revision_rate": 1.0},
    "the step behind a warm-up": {"natural_share": 0.5, "revision_rate": 0.0},
    "hard freeze": {"freeze": "hard", "revision_rate": 1.0},
}


@pytest.mark.parametrize("order", ORDERS)
def test_what_policies_do_before_a_loss_that_is_not_finite_stands(order):
    """As in the eager engine: see cure_fast/step/train_step.py."""
    both = runs.pair("cure", data=runs.batches(2), **ORDERS[order])
    for place in range(3):
        for run in (both.fast, both.eager):
            runs.reach(run, place)
        both.align()
        before = runs.snapshot(both.fast)
        batch = both.fast.loader.batches[place % 2]
        terms = both.step(*(poisoned(batch) if place == 2 else batch))
    assert terms == (None, None)
    runs.assert_equal_step(both, before)
    runs.assert_equal_counters(both)
    for run in (both.fast, both.eager):
        values = [v for v in runs.tensors(run).values() if v.is_floating_point()]
        assert all(value.isfinite().all() for value in values)


def steep(run):
    """Make the run's gradients infinite under a finite loss."""
    loss = run.method.loss

    def infinite(run, batch):
        terms = loss(run, batch)
        # A root at zero adds nothing, and its slope is infinite.
        weights = sum(parameter.sum() for parameter in run.model.parameters())
        return {**terms, "total": terms["total"] + (weights - weights.detach()).sqrt()}

    run.method = replace(run.method, loss=infinite)


def test_an_infinite_gradient_under_a_finite_loss_moves_nothing_but_has_terms():
    both = runs.pair("trades", data=runs.batches(1))
    both.step(*both.fast.loader.batches[0])
    both.align()
    before = runs.snapshot(both.fast)
    for run in (both.fast, both.eager):
        steep(run)
        runs.reach(run, 0)
    runs.assert_equal_terms(*both.step(*both.fast.loader.batches[0]))
    assert runs.differing(before, runs.snapshot(both.fast)) == []
    runs.assert_equal_counters(both)
    assert (both.fast.counted, both.fast.skipped, both.fast.skipped_in_row) == (2, 1, 1)


@pytest.mark.parametrize("name", ["natural_ce", "adversarial_ce"])
def test_a_score_that_is_not_finite_leaves_the_step_out(name):
    """The gradient that updates is finite."""
    run = runs.make_run("cure", data=runs.batches(1))
    runs.train(run, 1)
    before, (conserve, *_) = runs.snapshot(run), run.policies
    wants = conserve.wants

    def steep(run):
        of, parameters = (wanted := wants(run))[name]
        return {**wanted, name: Wanted(lambda terms: of(terms) * float("nan"), parameters)}

    conserve.wants = steep
    assert runs.train(run, 1)[0] is not None
    assert runs.differing(before, runs.snapshot(run)) == [] and run.skipped == 1


def test_a_nan_in_an_attack_gradient_leaves_the_step_out(monkeypatch):
    def broken(x_adv, x, grad, **settings):
        grad[0] = float("nan")
        return pgd_step_(x_adv, x, grad, **settings)

    monkeypatch.setattr("cure_fast.attacks.pgd_step_", broken)
    run = runs.make_run("pgd_at", data=runs.batches(1))
    before = {name: value.clone() for name, value in runs.tensors(run).items()}
    assert runs.train(run, 1) == [None] and run.skipped == 1
    after = runs.tensors(run)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def test_only_logged_steps_are_looked_at():
    """The others' terms may be NaN; sums and counts leave them out."""
    run = runs.make_run("trades", data=runs.batches(4), run={"log_every": 3})
    losses = []
    for place in range(4):
        runs.reach(run, place)
        batch = run.loader.batches[place]
        losses.append(runs.step(run, *(poisoned(batch) if place in (1, 3) else batch)))
    assert losses[1] is not None and losses[1]["total"].isnan()
    assert losses[3] is None and (run.counted, run.skipped, run.skipped_in_row) == (2, 2, 1)
    assert all(value.isfinite() for value in run.sums.values())


@pytest.mark.parametrize("place", ["weight", 0, 1, 2, 3])
def test_one_gradient_that_is_not_finite_is_found_among_two_dtypes(place):
    run = runs.make_run("cure")
    prepared = run.engine.prepare()
    parameters = list(run.model.parameters())
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    grads = [torch.ones(9, dtype=d) for d in (torch.float32, HALF, torch.float32, HALF)]
    run.gradients["natural"] = grads
    terms = {"total": torch.tensor(1.0)}
    finite, skip = prepared.judge(terms)
    assert bool(finite) and not bool(skip)
    hit = parameters[-1].grad if place == "weight" else grads[place]
    hit.view(-1)[3] = float("inf")
    finite, skip = prepared.judge(terms)
    assert bool(finite) and bool(skip)


def test_too_many_skipped_steps_in_a_row_end_the_run_where_it_is_logged():
    run = runs.make_run("trades", data=runs.batches(1), run={"log_every": 5, "max_skipped": 2})
    batch = run.loader.batches[0]
    # Two in a row, twice, are not three in a row.
    for bad in (0, 1, 1, 0, 1, 1):
        runs.reach(run, 0)
        runs.step(run, *(poisoned(batch) if bad else batch))
    run.engine.flush()
    assert (run.skipped, run.skipped_in_row, run.counted) == (4, 2, 2)
    # The third in a row is found at the next step that is logged, though that one is finite.
    for bad in (1, 0, 0, 0):
        runs.step(run, *(poisoned(batch) if bad else batch))
    with pytest.raises(DivergedError, match=r"epoch 1, up to step 10, for 3 steps in a row"):
        runs.step(run, *batch)


def test_steps_in_a_row_are_counted_across_a_resumption():
    options = {"data": runs.batches(1), "run": {"max_skipped": 2}}
    run, resumed = (runs.make_run("trades", **options) for _ in range(2))
    batch = poisoned(run.loader.batches[0])
    for _ in range(2):
        runs.step(run, *batch)
    resumed.load_state_dict(copy.deepcopy(run.state_dict()))
    assert resumed.skipped_in_row == 2
    with pytest.raises(DivergedError, match="3 steps in a row"):
        runs.step(resumed, *batch)


# Memory.


def out_of_memory():
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize("method", ["pgd_at", "cure"])
def test_a_step_that_does_not_fit_goes_on_in_the_eager_engine(method, monkeypatch, capsys):
    """It ends where an eager run ends that met the same limit, random numbers included."""
    made = [runs.make_run(method, engine, data=runs.batches(3)) for engine in ("fast", "eager")]
    fast, eager = made
    runs.train(fast, 2)
    eager.load_state_dict(copy.deepcopy(fast.state_dict()))
    real = attacks.pgd_step_

    def limited(x_adv, *arguments, **settings):
        if len(x_adv) > 3:
            raise out_of_memory()
        return real(x_adv, *arguments, **settings)

    monkeypatch.setattr(attacks, "pgd_step_", limited)
    capsys.readouterr()
    for run in made:
        runs.train(run, 2, start=2)
    assert runs.differing(runs.snapshot(fast), runs.snapshot(eager)) == []
    assert fast.engine.name == "eager" and "memory" in fast.engine.reason
    assert (fast.counted, fast.micro_batch_size) == (eager.counted, 3)
    assert fast.sums == eager.sums
    lines = capsys.readouterr().err.splitlines()
    assert len([line for line in lines if "gives way to the eager one" in line]) == 1
    assert len([line for line in lines if "3 images per pass" in line]) == 2


@pytest.mark.parametrize("settings", [{}, {"revision_order": "before", "revision_rate": 1.0}])
@pytest.mark.parametrize("place", ["loss", "gradients"])
def test_memory_that_runs_out_behind_the_attack_is_no_different(place, settings):
    """What a policy has done before the loss is not done twice."""
    made = [
        runs.make_run("cure", engine, data=runs.batches(2), **settings)
        for engine in ("fast", "eager")
    ]
    fast, eager = made
    runs.train(fast, 1)
    eager.load_state_dict(copy.deepcopy(fast.state_dict()))
    conserve = fast.policies[0]
    real, calls = fast.method.loss if place == "loss" else conserve.wants, []

    def limited(*arguments):
        calls.append(place)
        found = real(*arguments)  # So that half of the work is done already.
        if len(calls) == 1:
            raise out_of_memory()
        return found

    if place == "loss":
        fast.method = replace(fast.method, loss=limited)
    else:
        conserve.wants = limited
    for run in made:
        runs.train(run, 1, start=1)
    assert fast.engine.name == "eager" and len(calls) == 2
    assert runs.differing(runs.snapshot(fast), runs.snapshot(eager)) == []


@pytest.mark.parametrize("place", ["update", "policy"])
def test_memory_that_runs_out_behind_the_first_moved_weight_ends_the_run(place, monkeypatch):
    """The step cannot be done again: some weights have moved."""
    run = runs.make_run("cure", data=runs.batches(2))
    runs.train(run, 1)
    real, calls = engine_update.masked_sgd_, []

    def short(*arguments, **settings):
        calls.append(None)
        if len(calls) == 2:
            raise out_of_memory()
        real(*arguments, **settings)

    def fail(run, batch):
        raise out_of_memory()

    if place == "update":
        monkeypatch.setattr(engine_update, "masked_sgd_", short)
    else:
        run.policies[-1].on_step = fail
    with pytest.raises(MemoryExhaustedError, match="no memory for the update"):
        runs.train(run, 1, start=1)


# What the fast engine cannot compute.


def test_an_error_that_both_engines_would_meet_is_raised():
    run = runs.make_run("pgd_at", data=runs.batches(1))

    def broken(run, batch):
        raise ValueError("a loss with a fault")

    run.method = replace(run.method, loss=broken)
    with pytest.raises(ValueError, match="a loss with a fault"):
        runs.train(run, 1)
    assert run.engine.name == "fast"


CHOICES = {
    "Adam": ({"optim": {"optimizer": "adam"}}, "update is SGD's, and --optimizer is adam"),
    "parts of a batch": ({"optim": {"micro_batch_size": 3}}, "--micro-batch-size cuts them"),
    "fp16": ({"dtype": torch.float16}, "no loss scaling, which fp16 needs; --amp bf16"),
}


@pytest.mark.parametrize("case", CHOICES)
def test_the_eager_engine_takes_what_the_fast_one_cannot(case):
    options, reason = CHOICES[case]
    run = runs.make_run("pgd_at", data=runs.batches(1), **options)
    assert run.engine.name == "eager"
    assert reason in run.engine.reason
    if case != "fp16":
        assert runs.train(run, 1)[0] is not None


@pytest.mark.parametrize("engine", ["eager", "auto"])
def test_on_a_cpu_the_eager_engine_is_the_default(engine):
    run = runs.make_run("cure", engine, data=runs.batches(1))
    assert (run.engine.name, run.engine.reason) == ("eager", None)


class Idle(ImageClassifier):
    """A network with a layer that no pass calls."""

    stem_names = ("conv1",)
    classifier_name = "linear"

    def __init__(self):
        super().__init__(4)
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.unused = nn.Linear(2, 2)
        self.linear = nn.Linear(4, runs.CLASSES)

    def logits(self, x):
        return self.linear(torch.relu(self.bn1(self.conv1(x))).mean(dim=(2, 3)))


@pytest.mark.parametrize("records", [False, True])
def test_weights_that_take_no_part_in_the_loss_stay_as_they_are(records, monkeypatch):
    """torch's SGD leaves weights without a gradient alone, weight decay included."""
    if records:
        monkeypatch.setattr(fast, "ON_GPU", ("graph", *fast.COMPILED))
    made = [
        runs.make_run("natural", e, model=network(Idle), optim={"weight_decay": 0.1})
        for e in ("fast", "eager")
    ]
    before = copy.deepcopy(made[0].model.unused.state_dict())
    for run in made:
        runs.train(run, 3)
    states = [run.model.state_dict() for run in made]
    assert runs.worst(*states)[0] < runs.ROUNDING and made[0].engine.name == "fast"
    assert runs.differing(before, made[0].model.unused.state_dict()) == []


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--engine-without", "fold"], "expected any of graph, stack, copies, fuse, compile, comp"),
        (["--joint-forward"], "--joint-forward is no more: one pass for both images"),
    ],
    ids=["part", "flag"],
)
def test_parts_that_are_no_more_are_refused_in_a_line(words, reason, capsys):
    assert main(["train", "quickstart", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert reason in line


def test_parts_of_the_fast_engine_cannot_be_left_out_of_the_eager_one(capsys):
    runs.make_run("pgd_at", "eager", without=["fuse"])
    assert "--engine-without has no effect on the eager engine" in capsys.readouterr().err
    runs.make_run("pgd_at", "fast", without=["fuse"])
    assert capsys.readouterr().err == ""
