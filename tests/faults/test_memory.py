"""Running out of memory in a step: smaller passes, the same batch; then an end with advice."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import tiny_step
from cure_fast import attacks, errors
from cure_fast.errors import MemoryExhaustedError, StoppedError
from cure_fast.methods import METHODS
from cure_fast.signals import StopSignals
from cure_fast.step import train_step as step
from cure_fast.step.train_step import pieces_of, train_step
from cure_fast.training.job import train
from cure_fast.training.trainer import next_step
from tiny_job import same_weights, stable_rows, tiny


def run_of(method, **options):
    """A run whose attack draws the same start however the batch is cut."""
    return tiny_step.tiny_run(method, attack={"start": "uniform"}, **options)


def out_of_memory():
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def fits_only(monkeypatch, largest):
    """Let a pass of more than ``largest`` images run out of memory, inside the attack."""
    real = attacks.pgd_step_

    def limited(x_adv, *arguments, **settings):
        if len(x_adv) > largest:
            raise out_of_memory()
        return real(x_adv, *arguments, **settings)

    monkeypatch.setattr(attacks, "pgd_step_", limited)


class Noisy(tiny_step.Tiny):
    """The tiny network with BatchNorm and dropout, which move statistics and random numbers."""

    def __init__(self):
        torch.manual_seed(3)
        super().__init__()
        self.norm = nn.BatchNorm2d(tiny_step.HIDDEN)

    def logits(self, x):
        h = nn.functional.dropout(self.norm(torch.tanh(self.conv1(x))), 0.3, self.training)
        return self.linear(torch.tanh(self.layer1[0].conv1(h)).flatten(1))


# Many passes, the last one smaller, equal ones, and one that is nearly the batch. One method has
# each, the others have one each, in turn.
SIZES = (2, 5, 6, 11)
# RAT's soft targets are of the gradients of a pass, so that a smaller pass has others.
CUT = [
    pytest.param(
        size, method, marks=() if number % 4 == place or method == "cure" else pytest.mark.slow
    )
    for number, method in enumerate(name for name in METHODS if name != "rat")
    for place, size in enumerate(SIZES)
]


@pytest.mark.parametrize(("size", "method"), CUT)
def test_passes_add_up_to_the_step_of_the_whole_batch(method, size):
    # Each pass of A&P's warm-up drops others.
    strong = {"ap_warmup": 0.0} if method.startswith("ap_") else {}
    whole, parts = (run_of(method, **strong) for _ in range(2))
    parts.micro_batch_size = size
    for _ in range(3):
        _, expected = next_step(whole, whole.loader.batch(0))
        _, found = next_step(parts, parts.loader.batch(0))
        torch.testing.assert_close(found, expected)
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_step_out_of_memory_goes_on_in_smaller_passes(monkeypatch, capsys):
    """It ends where a run ends that took these passes from the start."""
    given_up, small = (run_of("cure", model=Noisy(), revision_rate=0.5) for _ in range(2))
    small.micro_batch_size = 6
    torch.manual_seed(7)
    expected = train_step(small, small.loader.batch(0))
    fits_only(monkeypatch, 6)
    torch.manual_seed(7)
    assert train_step(given_up, given_up.loader.batch(0)) == expected
    assert given_up.micro_batch_size == 6
    states = (
        [net.state_dict() for net in (run.model, *run.networks.values())]
        for run in (given_up, small)
    )
    for a, b in zip(*states, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in b)
    error = capsys.readouterr().err
    assert "6 images per pass, 12 per step as before" in error and error.count("\n") == 1


@pytest.mark.parametrize("place", ["loss", "further gradients"])
def test_memory_that_runs_out_behind_the_attack_is_no_different(monkeypatch, place):
    run, small = (run_of("cure", model=Noisy()) for _ in range(2))
    small.micro_batch_size = 6
    torch.manual_seed(7)
    expected = train_step(small, small.loader.batch(0))
    calls = []

    def limited(real):
        def once(*arguments):
            calls.append(place)
            if len(calls) == 1:
                real(*arguments)  # so that statistics or gradients have moved already
                raise out_of_memory()
            return real(*arguments)

        return once

    if place == "loss":
        run.method = replace(run.method, loss=limited(run.method.loss))
    else:
        monkeypatch.setattr(step, "add_to", limited(step.add_to))
    torch.manual_seed(7)
    assert train_step(run, run.loader.batch(0)) == expected
    states = (r.model.state_dict() | r.networks["revision"].state_dict() for r in (run, small))
    a, b = states
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_no_cut_is_tried_twice(monkeypatch):
    """Five images go in passes of three and two, and no smaller."""
    tried = []

    def nothing_fits(x_adv, *_, **__):
        tried.append(len(x_adv))
        raise out_of_memory()

    monkeypatch.setattr(attacks, "pgd_step_", nothing_fits)
    run = tiny_step.tiny_run("trades", batches=tiny_step.tiny_batches(1, size=5))
    with pytest.raises(MemoryExhaustedError, match="even 3 of the batch's 5"):
        train_step(run, run.loader.batch(0))
    assert tried == [5, 3]


def test_two_images_that_do_not_fit_end_the_step(monkeypatch):
    fits_only(monkeypatch, 1)
    run = tiny_step.tiny_run("trades")
    with pytest.raises(MemoryExhaustedError, match=r"even 2 of the batch's 12.*--width"):
        train_step(run, run.loader.batch(0))


def test_memory_that_runs_out_in_the_update_is_not_tried_again(monkeypatch):
    run = tiny_step.tiny_run("pgd_at")

    def no_room(*_):
        raise out_of_memory()

    monkeypatch.setattr(run.optimizer, "step", no_room)
    with pytest.raises(MemoryExhaustedError, match="update of the weights in step 0"):
        train_step(run, run.loader.batch(0))


def test_another_error_is_not_taken_for_it(monkeypatch):
    run = tiny_step.tiny_run("pgd_at")

    def broken(*_arguments, **_settings):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(attacks, "pgd_step_", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        train_step(run, run.loader.batch(0))


@pytest.mark.usefixtures("short_pictures")
def test_the_size_of_a_pass_survives_a_stop(tmp_path, monkeypatch, capsys):
    fits_only(monkeypatch, 20)
    small = {"model": {"width": 4}, "eval": {"attacks": ("natural",), "limit": 2}}
    whole = train(tiny(tmp_path, out="whole", **small))
    config = tiny(tmp_path, out="broken", **small)
    with pytest.raises(StoppedError):
        train(config, stop=Poll(6))
    capsys.readouterr()
    assert same_weights(whole, train(config, resume=True))
    assert stable_rows(whole) == stable_rows(tmp_path / "broken")
    # Not found out a second time.
    assert "did not fit" not in capsys.readouterr().err
    rows = [r for r in stable_rows(whole) if r["event"] == "epoch" and r["stage"] == "train"]
    assert [r["micro_batch_size"] for r in rows] == [16, 16]


class Poll(StopSignals):
    """Asks for a stop when it is polled for the ``count``-th time."""

    def __init__(self, count):
        super().__init__()
        self.count = count

    def __call__(self):
        self.count -= 1
        return self.count <= 0


@given(st.integers(1, 200), st.integers(1, 200))
def test_pieces_are_near_equal_and_never_one_image(count, size):
    whole = tiny_step.batch_of(torch.zeros(count, 1, 1, 1), torch.zeros(count, dtype=torch.int64))
    pieces = whole.split(pieces_of(count, size))
    lengths = [len(piece) for piece in pieces]
    assert torch.equal(torch.cat([piece.index for piece in pieces]), torch.arange(count))
    assert max(lengths) - min(lengths) <= 1 and (count == 1 or min(lengths) >= 2)
    assert max(lengths) <= max(size, 3) or count == 1


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (out_of_memory(), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("shapes differ"), False),
        (ValueError("can't allocate memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, expected):
    assert errors.is_out_of_memory(error) is expected
    assert step.is_out_of_memory is errors.is_out_of_memory
