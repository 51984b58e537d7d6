"""Batches cut in pieces and put together again, and steps that are tried again in smaller ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny_step
from cure_fast.batch import Batch
from cure_fast.methods.pgd_at import attack, loss
from cure_fast.step.policy import Policy
from cure_fast.step.train_step import train_step

SHAPES = st.lists(st.integers(0, 3), max_size=2).map(tuple)


def out_of_memory():
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def whole_batch(count):
    x = torch.arange(count, dtype=torch.float32).view(-1, 1, 1, 1).expand(count, 3, 2, 2)
    return Batch(x, torch.arange(count) % 7, torch.arange(count) * 11)


@given(
    count=st.integers(1, 40),
    pieces=st.integers(1, 40),
    attacked=st.booleans(),
    before=st.dictionaries(st.sampled_from("ab"), SHAPES),
    inside=st.dictionaries(st.sampled_from("bc"), SHAPES),
)
def test_images_and_notes_survive_any_number_of_pieces(count, pieces, attacked, before, inside):
    pieces = min(pieces, count)
    batch = whole_batch(count)
    if attacked:
        batch = batch.attacked(batch.x + 0.5)
    given_notes = {name: torch.randn(count, *shape) for name, shape in before.items()}
    written = {name: torch.randn(count, *shape) for name, shape in inside.items()}
    batch.notes.update(given_notes)
    parts = batch.split(pieces)
    assert len(parts) == pieces and sum(map(len, parts)) == count
    for name in ("x", "y", "index", "x_adv"):
        joined = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(joined, getattr(batch, name))
    for part in parts:
        assert (part.made is None) == (not attacked)
        # The place in the whole batch, which the images show.
        rows = part.x[:, 0, 0, 0].long()
        assert torch.equal(part.index, rows * 11)
        assert all(torch.equal(part.notes[name], note[rows]) for name, note in given_notes.items())
        part.notes.update({name: note[rows] for name, note in written.items()})
    assert batch.notes.keys() == given_notes.keys()
    batch.join(parts)
    expected = given_notes | written
    assert batch.notes.keys() == expected.keys()
    assert all(torch.equal(batch.notes[name], note) for name, note in expected.items())


def test_notes_are_taken_over_without_their_gradients():
    for pieces in (1, 3):
        batch = whole_batch(6)
        parts = batch.split(pieces)
        for part in parts:
            part.notes["loss"] = torch.ones(len(part), requires_grad=True) * 2
        batch.join(parts)
        assert torch.equal(batch.notes["loss"], torch.full((6,), 2.0))
        assert not batch.notes["loss"].requires_grad


def test_an_attacked_batch_shares_its_notes():
    batch = whole_batch(2)
    batch.attacked(batch.x).notes["here"] = torch.zeros(2)
    assert "here" in batch.notes


class Reader(Policy):
    """Keeps the notes that batches came to hold."""

    def __init__(self):
        super().__init__()
        self.found = []

    def on_step(self, run, batch):
        self.found.append({name: note.clone() for name, note in batch.notes.items()})


def noting_run(changed, **fail):
    """A run whose attack and loss note their images, and run out of memory above a size."""
    tried = []

    def noting_attack(run, batch):
        batch.notes["attacked"] = batch.index.clone()
        tried.append(("attack", len(batch)))
        if len(batch) > fail.get("attack", 12):
            raise out_of_memory()
        return attack(run, batch)

    def noting_loss(run, batch):
        # What the attack noted of these very images.
        assert torch.equal(batch.notes["attacked"], batch.index)
        logits = run.model(batch.x_adv)
        batch.notes["logits"] = logits
        tried.append(("loss", len(batch)))
        if len(batch) > fail.get("loss", 12):
            raise out_of_memory()
        return loss(run, batch)

    name = changed(
        "pgd_at", attack=noting_attack, loss=noting_loss, policies=lambda run: (Reader(),)
    )
    return tiny_step.tiny_run(name, attack={"start": "uniform"}), tried


@pytest.mark.parametrize(
    ("fail", "passes"),
    [
        ({}, [("attack", 12), ("loss", 12)]),
        (
            {"attack": 3},
            [("attack", 12), ("attack", 6), *[("attack", 3)] * 4, *[("loss", 3)] * 4],
        ),
        ({"loss": 6}, [("attack", 12), ("loss", 12), *[("loss", 6)] * 2]),
    ],
    ids=str,
)
def test_a_retry_in_smaller_pieces_leaves_notes_of_the_whole_batch(changed, fail, passes):
    run, tried = noting_run(changed, **fail)
    batch = run.loader.batch(1)
    train_step(run, batch)
    assert tried == passes
    (found,) = run.policy(Reader).found
    assert found.keys() == {"attacked", "logits"}
    # The second batch of the set.
    assert torch.equal(found["attacked"], torch.arange(12, 24))
    whole, _ = noting_run(changed)
    train_step(whole, whole.loader.batch(1))
    (expected,) = whole.policy(Reader).found
    torch.testing.assert_close(found["logits"], expected["logits"], rtol=1e-12, atol=1e-12)


def test_a_try_that_fails_leaves_no_notes(changed):
    """Its last note would keep the graph of a pass that did not fit, and its memory, alive."""
    run, _ = noting_run(changed, loss=6)
    seen = []
    real = run.method.loss

    def watched(run, batch):
        seen.append("logits" in batch.notes)
        return real(run, batch)

    run.method = replace(run.method, loss=watched)
    train_step(run, run.loader.batch(0))
    assert seen == [False, False, False]
