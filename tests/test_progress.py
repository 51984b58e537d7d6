"""Times left against jobs whose steps take known times; lines, bar and names of what is printed."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys

import pytest

from cure_fast import progress as module
from cure_fast.progress import Part, Progress, duration


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands until a test moves it on: `clock[0]` is its seconds."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


NATURAL, ROBUST, VALIDATION, TEST = 3.0, 33.0, 21.0, 41.0
# Seconds per pass of training and of attacks, and of what comes between epochs.
TRAIN_S, ATTACK_S, SAVE_S = 0.001, 0.0007, 0.5


def job(progress, clock, natural=10, robust=8):
    """A job of two training stages and an attack, yielding (stage, share of it, known left)."""
    progress.stages = ["natural", "robust", "attacks"]
    progress.plan("pretrain", Part("train", [NATURAL] * natural, 100, 1))
    progress.plan("train", Part("train", [ROBUST] * robust, 100, 2))
    progress.plan("val", Part("attack", [VALIDATION] * robust, 50, 2))
    progress.plan("pgd20", Part("attack", [TEST], 200, 3))

    def work(name, images, step, epoch, epochs, seconds):
        with progress.work(name, name, round=epoch) as told:
            for done in range(step, images + 1, step):
                clock[0] += step * seconds * told.cost
                told.advance(step)
                yield name, (epoch + done / images) / epochs

    for stage, (name, epochs) in enumerate([("pretrain", natural), ("train", robust)], 1):
        progress.begin(stage)
        for epoch in range(epochs):
            yield from work(name, 100, 10, epoch, epochs, TRAIN_S)
            if name == "train":
                yield from work("val", 50, 50, epoch, epochs, ATTACK_S)
            clock[0] += SAVE_S
    progress.begin(3)
    yield from work("pgd20", 200, 50, 0, 1, ATTACK_S)


def test_a_tenth_into_a_stage_the_time_left_is_right(clock, capsys):
    progress = Progress()
    told = [
        (name, share, clock[0], sum(progress.seconds_left() or (0, 0)))
        for name, share in job(progress, clock)
    ]
    end = clock[0]
    late = [(n, s, end - at, left) for n, s, at, left in told if s >= 0.11 and n != "val"]
    assert {name for name, *_ in late} == {"pretrain", "train", "pgd20"}
    for name, share, truth, left in late:
        assert left == pytest.approx(truth, rel=0.3, abs=0.01), (name, share)
    # Measured once, attacks and the pauses are known too, but for the one after the last epoch.
    sure = [(truth, left) for name, share, truth, left in late if name == "train" and share > 0.3]
    for truth, left in sure:
        assert left == pytest.approx(truth, abs=1.1 * SAVE_S)
    assert progress.seconds_left() == (pytest.approx(0, abs=1e-6), 0)
    output = capsys.readouterr().out
    assert "1 of 3: natural\n" in output and output.count("time: ") == 1


def test_nothing_is_guessed_before_a_step_was_measured(clock):
    progress = Progress()
    steps = job(progress, clock)
    next(steps)
    # The first step also loads and compiles.
    assert progress.seconds_left() is None and progress.times().endswith("time left known soon")
    next(steps)
    assert progress.seconds_left() is not None


def test_a_resumed_or_skipped_part_is_done_but_measures_nothing(clock):
    progress = Progress()
    progress.plan("train", Part("train", [1.0] * 4, 10))
    with progress.work("train", "train", round=2) as work:
        work.advance(5, skip=True)
        clock[0] += 100
        work.advance(1)
        clock[0] += 2
        work.advance(1)
    assert progress.seconds_left() == (13 * 2.0, 0.0)
    progress.finish("train")
    assert progress.seconds_left() == (0.0, 0.0)


def test_images_that_an_attack_leaves_out_are_left_out_of_the_times(clock):
    progress = Progress()
    progress.plan("val", Part("attack", [1.0] * 3, 100))
    progress.plan("pgd20", Part("attack", [1.0], 100))
    with progress.work("val", "val") as work:
        # 10 of 100 are right, and their call takes as long as one on 32.
        work.advance(90, skip=True)
        clock[0] += 32
        work.advance(10)
    sure, _ = progress.seconds_left() or (0.0, 0.0)
    assert sure == 2 * 32 + 100


def test_stages_that_are_over_leave_nothing(clock, capsys):
    progress = Progress()
    steps = job(progress, clock)
    for _ in range(5):
        next(steps)
    progress.begin(3)
    sure, _ = progress.seconds_left() or (0.0, 0.0)
    assert sure == pytest.approx(200 * TEST * TRAIN_S)


@pytest.mark.parametrize(("beside", "expected"), [(4.0, 20 + 4), (-0.5, 20)])
def test_what_natural_training_takes_beside_its_passes_is_no_measure_of_attacks(
    clock, beside, expected
):
    progress = Progress()
    progress.paces = {"train": 1.0, "attack": 2.0}
    progress.plan("pretrain", Part("train", [3.0], 30))
    progress.plan("train", Part("train", [0.0, 20.0], 10))
    progress.plan("aa", Part("autoattack", (1.0,), 50, bound=True))
    with progress.work("pretrain", "pretrain") as work:
        for _ in range(3):
            clock[0] += 10 * (3.0 + beside)
            work.advance(10)
    # An image of the adversarial epoch: twenty passes, and what comes beside them once.
    assert progress.seconds_left() == (pytest.approx(10 * expected), pytest.approx(50 * 2.0))


def test_what_is_not_known_is_said_to_be_a_bound(clock):
    progress = Progress()
    progress.plan("train", Part("train", [1.0], 100))
    progress.plan("aa", Part("autoattack", (1.0,), 0, bound=True))
    progress.expect("aa", 300)
    with progress.work("train", "train") as work:
        for _ in range(2):
            clock[0] += 10
            work.advance(10)
        assert progress.left() == "1 min 20 s left, AutoAttack up to 5 min 0 s more"
    progress.finish("train")
    assert progress.left() == "AutoAttack up to 5 min 0 s more"
    with progress.work("aa", "aa") as work:
        clock[0] += 4
        work.advance(4)
        work.expect(50)
    assert progress.left() == "AutoAttack up to 50 s more"


def test_a_line_comes_each_minute_in_which_there_was_no_other(clock, capsys):
    progress = Progress()
    progress.plan("pgd20", Part("attack", [1.0], 1000))
    with progress.work("pgd20", "PGD-20, CURE") as work:
        for _ in range(15):
            clock[0] += 10
            work.advance(1, ": 3 images left")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0].startswith("PGD-20, CURE: 3 images left  1 min 10 s ela")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_has_one_bar_and_lines_above_it(monkeypatch, tmp_path):
    from cure_fast.console import say, transcript

    screen, out = Terminal(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    with transcript() as kept, Progress() as progress:
        progress.stages = ["natural training", "CURE"]
        progress.plan("train", Part("train", [1.0], 100))
        progress.begin(1)
        with progress.work("train", "train epoch 1/2") as work:
            for _ in range(3):
                work.advance(10)
            say("a line")
            assert progress.bar is not None
            progress.bar.refresh()
        kept.write_to(tmp_path / "console.log")
    assert "1 of 2  train epoch 1/2" in screen.getvalue() and "elapsed" in screen.getvalue()
    assert out.getvalue() == "1 of 2: natural training\na line\n"
    assert (tmp_path / "console.log").read_text() == out.getvalue()


def test_a_bar_that_is_on_no_terminal_is_none(monkeypatch):
    for stream in (None, io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        with Progress() as progress:
            assert progress.bar is None


def test_the_first_line_needs_no_torch(tmp_path):
    program = (
        "import sys; from cure_fast.config import Config; "
        "from cure_fast.training.opening import opening; print(opening(Config())); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'rich')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("cure-fast ") and "200 epochs of cure within eps 8/255" in (
        done.stdout
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((0.04, "0.0 s"), (9.94, "9.9 s"), (59.4, "59 s"), (59.6, "1 min 0 s")),
        *((700, "11 min 40 s"), (3725, "1 h 2 min")),
    ],
)
def test_times_read_well(seconds, text):
    assert duration(seconds) == text


def test_text_is_kept_from_before_there_is_a_file_and_appended_to_one(tmp_path, capsys):
    from cure_fast.console import keep, say, transcript, warn

    path = tmp_path / "console.log"
    for _ in range(2):
        with transcript() as kept:
            say("first\nsecond")
            kept.write_to(path)
            warn("odd \x1b[1;31mred\x1b[0m\x1b[2K\ttext")
        say("not kept")
        keep("nor this")
    each = "first\nsecond\nwarning: odd red\\x1b[2K\\ttext\n"
    assert path.read_text() == each * 2
    with contextlib.ExitStack() as stack:
        kept = stack.enter_context(transcript())
        kept.write_to(tmp_path / "none" / "console.log")
        say("goes on")
        say("goes on")
    assert capsys.readouterr().err.count("No such file") == 1
