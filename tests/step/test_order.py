"""The order of a step and of the end of an epoch, as docs/design.md has it, on both engines."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from operator import itemgetter
from types import SimpleNamespace

import pytest
import torch

import tiny_step
from cure_fast.errors import StoppedError
from cure_fast.methods.pgd_at import attack, loss
from cure_fast.policies.average import EmaSettings
from cure_fast.progress import Progress
from cure_fast.step.policy import Policy, Wanted
from cure_fast.training import trainer
from cure_fast.training.trainer import fit, next_step

STEP = [
    *("before", "attack", "around in", "loss", "on_loss", "gradients"),
    *("on_grads", "update", "around out", "on_step"),
]
EPOCH_END = ["on_epoch_end", "validate model", "on_validation", "validate ema", "save"]
# What decides on the host leaves hooks out; what decides on the device calls them all the same.
SKIPPED = {
    "eager": ["before", "attack", "around in", "loss", "on_loss", "gradients", "around out"],
    "fast": [name for name in STEP if name != "update"],
}


class Noting(Policy):
    """Notes its hooks, and ``update`` where it finds the weights moved since the hook before."""

    def __init__(self, run):
        super().__init__()
        self.notes = []
        self.weights = list(run.model.parameters())
        self.copies = [weight.detach().clone() for weight in self.weights]

    def note(self, name):
        moved = [not torch.equal(w, c) for w, c in zip(self.weights, self.copies, strict=True)]
        if any(moved):
            self.notes.append("update")
            self.copies = [weight.detach().clone() for weight in self.weights]
        self.notes.append(name)

    def before(self, run, batch):
        assert batch.made is None
        self.note("before")

    @contextmanager
    def around(self, run, batch):
        assert batch.made is not None
        self.note("around in")
        yield
        self.note("around out")

    def on_loss(self, run, batch, terms, logits):
        self.note("on_loss")

    def wants(self, run):
        return {"adversarial_ce": Wanted(itemgetter("adversarial_ce"), self.weights)}

    def on_grads(self, run):
        self.note("on_grads")
        # The total is the term that was asked for.
        for asked, weight in zip(run.gradients["adversarial_ce"], self.weights, strict=True):
            torch.testing.assert_close(asked, weight.grad, equal_nan=True)

    def on_step(self, run, batch):
        self.note("on_step")

    def on_epoch_end(self, run):
        self.note(f"on_epoch_end {run.epoch}")

    def on_validation(self, run, found):
        assert found == {"natural": 1.0, "robust": 1.0}
        self.note("on_validation")


def noting_run(changed, small_run):
    """A run whose method, and a policy of its, note all that is called, and these notes."""
    kept = []

    def noted_attack(run, batch):
        run.policy(Noting).note("attack")
        return attack(run, batch)

    def noted_loss(run, batch):
        policy = run.policy(Noting)
        policy.note("loss")
        terms = loss(run, batch)
        # Computed a second time, as the gradients of the total are others.
        terms["adversarial_ce"] = terms["adversarial_ce"] * 1
        terms["adversarial_ce"].register_hook(lambda grad: policy.note("gradients"))
        return terms

    def policies(run):
        kept.append(Noting(run))
        return tuple(kept)

    name = changed("pgd_at", attack=noted_attack, loss=noted_loss, policies=policies)
    run = small_run(name, policies={"ema": EmaSettings()})
    return run, kept[0].notes


def seen(notes, engine):
    """Leave out what the fast engine takes from its recording of the first step."""
    first = notes.index("on_step") if "on_step" in notes and engine == "fast" else len(notes)
    recorded = ("attack", "loss", "on_loss", "gradients")
    return notes[:first] + [name for name in notes[first:] if name not in recorded]


@pytest.fixture(autouse=True)
def unwatched(monkeypatch):
    """The watch over a run's first steps attacks a batch once more, after its step."""
    monkeypatch.setattr(trainer, "watch_step", lambda *given, **named: None)


def fit_noting(run, notes, *, validate=None):
    def valid(run, network):
        notes.append(f"validate {network}")
        return {"natural": 1.0, "robust": 1.0}

    rows = []
    fit(
        run,
        SimpleNamespace(
            stage="train", step=lambda *_, **__: None, epoch=rows.append, progress=Progress()
        ),
        validate=validate or valid,
        save=lambda run, best: notes.append("save"),
        stop=lambda: False,
    )
    return rows


def test_the_order_of_steps_and_of_the_end_of_an_epoch(engine, changed, small_run):
    run, notes = noting_run(changed, small_run)
    fit_noting(run, notes)
    ends = [[f"on_epoch_end {epoch}", *EPOCH_END[1:]] for epoch in (0, 1)]
    expected = [*STEP, *STEP, *ends[0], *STEP, *STEP, *ends[1]]
    assert seen(notes, engine) == seen(expected, engine)


def test_policies_may_train_on_other_images(engine, changed, small_run):
    class Darker(Policy):
        def before(self, run, batch):
            shade = batch.notes.get("shade", torch.ones(len(batch))) / 2
            return replace(batch, x=batch.x / 2, notes={"shade": shade})

    seen = []

    def noted_loss(run, batch):
        seen.append((batch.x, batch.notes["shade"]))
        return loss(run, batch)

    name = changed("natural", loss=noted_loss, policies=lambda run: (Darker(), Darker()))
    run = small_run(name)
    given = run.loader.batch(0)
    kept = given.x.clone()
    next_step(run, given)
    ((x, shade),) = seen
    assert torch.equal(x, given.x / 4) and torch.equal(shade, torch.full((8,), 0.25))
    assert torch.equal(given.x, kept) and not given.notes


def test_what_a_step_that_is_not_finite_calls(engine, changed, small_run):
    run, notes = noting_run(changed, small_run)
    assert next_step(run, tiny_step.poisoned(run.loader.batch(0)))[1] is None
    run.engine.flush()
    assert run.skipped == 1 and notes == SKIPPED[engine]
    notes.clear()
    next_step(run, run.loader.batch(1))
    assert notes[-4:] == STEP[-4:]


@pytest.mark.parametrize("stopped", ["model", "ema"])
def test_a_validation_that_was_stopped_is_acted_upon_once(engine, changed, small_run, stopped):
    run, notes = noting_run(changed, small_run)

    def stop(run, network):
        if network == stopped:
            raise StoppedError("stopped by a signal")
        return {"natural": 1.0, "robust": 1.0}

    with pytest.raises(StoppedError):
        fit_noting(run, notes, validate=stop)
    resumed, later = noting_run(changed, small_run)
    resumed.load_state_dict(run.state_dict())
    rows = fit_noting(resumed, later)
    assert [row["epoch"] for row in rows] == [1, 2]
    both = notes + later
    # One per epoch: two epochs in all.
    assert both.count("on_validation") == 2 and both.count("before") == 4


def test_an_attack_that_needs_no_gradient_is_in_attack_mode_too(changed, engine):
    seen = []

    def attack(run, batch):
        seen.append(run.model.training)
        return batch.x

    name = changed("natural", attack=attack)
    run = tiny_step.tiny_run(name, engine=engine, dtype=torch.float32)
    next_step(run, run.loader.batch(0))
    assert seen == [False] and run.engine.name == engine
