"""One attack at a time is the standard AutoAttack, its checks are heard, and nothing leaks."""

from __future__ import annotations

import logging
import sys

import pytest
import torch
from torch import nn

from cure_fast import progress
from cure_fast.evaluation.autoattack import (
    attack_batch,
    autoattack_settings,
    most_passes,
    note,
    run_autoattack,
)
from cure_fast.evaluation.trust import Guard

pytestmark = pytest.mark.usefixtures("one_thread")


def run(model, images, labels, *, eps, batch_size=32, queries=30, num_classes=4, work=None):
    guard = Guard(model.eval(), num_classes=num_classes)
    guard.requires_grad_(False)

    def load(indices):
        return images[indices].permute(0, 3, 1, 2) / 255, labels[indices]

    settings = autoattack_settings(
        eps=eps, num_classes=num_classes, batch_size=batch_size, seed=0
    ) | {"square_queries": queries}
    with torch.no_grad():
        x, y = load(torch.arange(len(images)))
        correct = guard(x).argmax(dim=1) == y
        return run_autoattack(guard, load, correct, settings=settings, work=work)


def test_each_attack_gets_the_numbers_of_the_standard_version(monkeypatch):
    import pyautoattack

    used = []

    def keep(adversary, x, y, *, batch_size):
        used.append(adversary)
        return x, y

    monkeypatch.setattr(pyautoattack.AutoAttack, "run_standard_evaluation", keep)
    settings = autoattack_settings(eps=0.1, num_classes=10, batch_size=5, seed=3)
    standard = pyautoattack.AutoAttack(nn.Identity(), eps=0.1, seed=3, version="standard")
    guard = Guard(nn.Identity())
    for attack in settings["attacks"]:
        attack_batch(guard, attack, torch.rand(5, 3, 4, 4), torch.zeros(5), settings)
    assert [a.attacks_to_run for a in used] == [[a] for a in standard.attacks_to_run or ()]
    own = ("model", "predict", "logger", "device")

    def numbers(part):
        return {name: value for name, value in vars(part).items() if name not in own}

    for adversary in used:
        for part in ("apgd", "apgd_targeted", "fab", "square"):
            assert numbers(getattr(adversary, part)) == numbers(getattr(standard, part))
    assert {standard.apgd.n_restarts, standard.square.n_restarts} == {settings["restarts"]}
    assert {standard.apgd.n_iter, standard.fab.n_iter} == {settings["iterations"]}
    assert standard.apgd_targeted.n_target_classes == settings["target_classes"]
    assert standard.square.n_queries == settings["square_queries"]


def test_equals_the_standard_version_of_pyautoattack(conv_net, data, short_autoattack):
    from pyautoattack import AutoAttack

    model = conv_net(4).eval().requires_grad_(False)
    images, labels = data(model, 12, wrong=2)
    eps = 0.05
    adversary = AutoAttack(model, eps=eps, seed=0, version="standard")
    adversary.square.n_queries = 30
    adversary.apgd_targeted.n_target_classes = adversary.fab.n_target_classes = 3
    with torch.random.fork_rng():
        x = (images.permute(0, 3, 1, 2) / 255).contiguous()
        _, predicted = adversary.run_standard_evaluation(x, labels, batch_size=6)
    outcome = run(model, images, labels, eps=eps, batch_size=6)
    assert torch.equal(outcome.robust, predicted == labels)
    assert 0 < int(outcome.robust.sum()) < 10


@pytest.mark.parametrize(
    ("classes", "attacks", "targets", "version"),
    [
        (2, ("apgd-ce", "fab-t", "square"), 1, "not standard"),
        (3, ("apgd-ce", "fab-t", "square"), 2, "not standard"),
        (4, ("apgd-ce", "apgd-t", "fab-t", "square"), 3, "standard"),
        (5, ("apgd-ce", "apgd-t", "fab-t", "square"), 4, "standard"),
        (10, ("apgd-ce", "apgd-t", "fab-t", "square"), 9, "standard"),
        (100, ("apgd-ce", "apgd-t", "fab-t", "square"), 9, "standard"),
    ],
)
def test_settings_for_few_classes(classes, attacks, targets, version):
    settings = autoattack_settings(eps=0.1, num_classes=classes, batch_size=1, seed=0)
    assert tuple(settings["attacks"]) == attacks
    assert (settings["target_classes"], settings["version"]) == (targets, version)


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_few_classes_reach_the_optimum_and_say_what_is_missing(
    linear, data, short_autoattack, classes
):
    model = linear(classes, 1)
    images, labels = data(model, 16, wrong=1)
    outcome = run(model, images, labels, eps=0.04, num_classes=classes)
    assert torch.equal(outcome.robust, model.robust(images, labels, 0.04))
    assert 0 < int(outcome.robust.sum()) < 15
    if classes < 4:
        assert outcome.warnings == ("not the standard AutoAttack: apgd-t needs 4 classes",)
        assert "apgd-t" not in outcome.robust_after
    else:
        assert outcome.warnings == ()


def test_nothing_right_is_nothing_robust(linear, data, short_autoattack):
    model = linear()
    images, labels = data(model, 5, wrong=5)
    outcome = run(model, images, labels, eps=0.04)
    assert not outcome.robust.any()
    assert set(outcome.robust_after.values()) == {0}


@pytest.mark.parametrize("count", [1, 2])
def test_one_or_two_images(linear, data, short_autoattack, count):
    model = linear()
    images, labels = data(model, count)
    outcome = run(model, images, labels, eps=0.04)
    assert torch.equal(outcome.robust, model.robust(images, labels, 0.04))


class Around(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base


class Softmax(Around):
    def forward(self, x):
        return self.base(x).softmax(dim=1)


class Noisy(Around):
    def forward(self, x):
        return self.base(x) + 0.1 * torch.randn(len(x), 4)


class Quantised(Around):
    def forward(self, x):
        return self.base((x * 8).round() / 8)


class Dynamic(Around):
    def forward(self, x):
        with torch.enable_grad():
            leaf = x.detach().clone().requires_grad_()
            (grad,) = torch.autograd.grad(self.base(leaf).sum(), leaf)
        return self.base(x + 0 * grad)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Softmax, "output is a probability distribution"),
        (Noisy, "randomized defense"),
        (Quantised, "points with zero gradient"),
        (Dynamic, "dynamic defense"),
    ],
)
def test_checks_of_pyautoattack_are_heard(linear, data, short_autoattack, kind, message):
    base = linear()
    base.requires_grad_(False)
    images, labels = data(base, 8)
    outcome = run(kind(base), images, labels, eps=0.01)
    assert any(message in text for text in outcome.warnings), outcome.warnings
    # Nothing of it stays behind for the next model.
    assert run(base, images, labels, eps=0.01).warnings == ()


def test_square_that_breaks_what_gradients_cannot_is_told(linear, data, short_autoattack):
    model = Quantised(linear())
    images, labels = data(model, 24)
    outcome = run(model, images, labels, eps=0.08, queries=300)
    broken = outcome.robust_after["fab-t"] - outcome.robust_after["square"]
    assert broken > 0
    assert any(t.startswith(f"square: broke {broken} of 24 images") for t in outcome.warnings)


class Told:
    """Work that keeps what it is told: notes, passes that are done, and those expected then."""

    def __init__(self):
        self.notes, self.done, self.expected = [], 0.0, []

    def advance(self, images, note="", *, skip=False):
        self.notes.append(note)
        self.done += images

    def expect(self, passes):
        self.expected.append(self.done + passes)


def test_it_tells_how_far_it_is_and_what_it_takes_at_most(linear, data):
    model = linear()
    images, labels = data(model, 7, wrong=2)
    told = Told()
    outcome = run(model, images, labels, eps=0.02, work=told)
    assert torch.equal(outcome.robust, model.robust(images, labels, 0.02))
    assert 0 < int(outcome.robust.sum()) < 5
    words = [": APGD-CE (1 of 4), iteration 1 of 102, images left: 5, "]
    words += [f": APGD-T (2 of 4), target {n} of 3, " for n in (1, 2, 3)]
    words += [f": FAB-T (3 of 4), target {n} of 3, " for n in (1, 2, 3)]
    words += [": Square (4 of 4), query 2 of 30, "]
    places = [[n for n, note in enumerate(told.notes) if note.startswith(word)] for word in words]
    assert all(places) and [found[0] for found in places] == sorted(f[0] for f in places)
    settings = autoattack_settings(eps=0.02, num_classes=4, batch_size=32, seed=0)
    most = most_passes(5, 5, settings | {"square_queries": 30})
    # A bound, to what it took; the looks at the model beforehand add a little.
    assert told.done <= told.expected[-1] + 1
    assert told.expected[0] == pytest.approx(told.done, rel=0.1)
    assert told.expected[0] == pytest.approx(most, rel=0.1)


def test_a_log_has_a_line_of_it_each_minute(linear, data, monkeypatch, capsys):
    seconds = iter(range(10**9))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(seconds))
    model = linear()
    images, labels = data(model, 8)
    job = progress.Progress()
    job.plan("aa", progress.Part("autoattack", (1.0,), 0, bound=True))
    with job.work("aa", "AutoAttack, CURE") as work:
        run(model, images, labels, eps=0.01, work=work)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 10
    assert all(line.startswith("AutoAttack, CURE: ") and " images left: " in line for line in lines)
    assert all(" elapsed, AutoAttack up to " in line for line in lines[:9])


def test_warnings_that_differ_in_numbers_are_one():
    warnings = {}
    for text in ("3 points with zero gradient", "11 points with zero gradient", "random"):
        note(warnings, text)
    assert list(warnings.values()) == [["3 points with zero gradient", 2], ["random", 1]]


def test_process_is_left_as_it_was(linear, data):
    from pyautoattack import checks

    model = linear()
    images, labels = data(model, 6)
    x = images.permute(0, 3, 1, 2) / 255
    guard = Guard(model).requires_grad_(False)
    settings = autoattack_settings(eps=0.02, num_classes=4, batch_size=6, seed=0)
    logger = logging.getLogger("auto-attack")
    records: list[logging.LogRecord] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record)

    handler = Keep()
    logger.addHandler(handler)
    checks.funcs["grad"] = 3

    def tracer(frame, event, arg):
        return None

    torch.manual_seed(5)
    random = torch.get_rng_state()
    former = sys.gettrace()
    sys.settrace(tracer)
    try:
        x_adv, broken, told = attack_batch(guard, "apgd-ce", x, labels, settings)
        found = sys.gettrace()
    finally:
        sys.settrace(former)
        logger.removeHandler(handler)
    assert found is tracer
    # A stale count would have called this model a dynamic defence.
    assert told == [] and records == []
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(broken, model(x_adv).argmax(dim=1) != labels)
    assert set(checks.funcs.values()) == {0}
