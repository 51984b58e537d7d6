"""Signals in every phase: exit code 75 after at most a step, and the same end after --resume."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest

from cure_fast.files import locked
from cure_fast.runs.checkpoint import check_checkpoint
from killing import pretraining
from moments import quick_autoattack, signal_after, signal_and_sleep_at, signal_at
from processes import Running, finish, start
from tiny_command import checkpoints, differences, stable_results, tiny_words

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# What happens after a signal has come is the same for each; in a run's phases all of them come.
ONE_SIGNAL = [
    signal.SIGTERM,
    *(pytest.param(n, marks=pytest.mark.slow) for n in SIGNALS if n != signal.SIGTERM),
]
# How long a signalled process may take, a slow machine's tiny step included.
SOON_S = 120.0
# Where the signal comes, the number of the call, and the checkpoint that is there afterwards: of
# the natural pre-training, and of the run. The tiny run takes 3 steps naturally, then twice 3. In a
# run that goes on, calls are counted from there.
PHASES = {
    "reading data": ("cure_fast.loaders.datasets:_read_digits", 1, None, None),
    "pre-training": ("cure_fast.engine.eager:train_step", 2, 2, None),
    # One step was left naturally.
    "training step": ("cure_fast.engine.eager:train_step", 2, None, 1),
    # Two of the calls are those of the step whose passes are counted at the start.
    "inside the attack": ("cure_fast.attacks:pgd_step_", 3, None, 2),
    "validation": ("cure_fast.evaluation.measurement:Measurement.under_attack", 1, None, 3),
    "saving": ("cure_fast.training.saving:save_checkpoint", 1, None, 4),
    "evaluation": ("cure_fast.evaluation.measurement:Measurement.under_attack", 4, None, 6),
    "pictures": ("cure_fast.evaluation.results:adversarial_examples", 1, None, 6),
    "report": ("cure_fast.report:write_report", 1, None, 6),
}


# Only the processes that are started import it, which takes seconds.
needs_ffcv = pytest.mark.skipif(find_spec("ffcv") is None, reason="FFCV is not installed")


def check_stopped(run: Running) -> None:
    assert run.wait(SOON_S) == 75, run.output()
    told = run.output()
    # One advice, in a sentence of its own.
    assert "Traceback" not in told and ".;" not in told
    assert told.count("continue with:") + told.count("the same command") <= 1


def test_a_signal_in_each_phase_stops_within_a_step_and_the_run_goes_on(tmp_path, unbroken):
    """One run, stopped by each of the signals in turn."""
    words = tiny_words()
    for number, (phase, (place, call, natural_step, step)) in enumerate(PHASES.items()):
        name = SIGNALS[number % len(SIGNALS)]
        run = start(words, tmp_path, prepare=partial(signal_at, place, call, name))
        check_stopped(run)
        begun = phase != "reading data"
        assert (tmp_path / "run").exists() == begun, phase
        assert ("continue with: cure-fast train run --resume" in run.stderr()) == begun, phase
        assert checkpoints(tmp_path / "run")[-1:] == ([step] if step else []), phase
        if natural_step:
            assert checkpoints(pretraining(tmp_path))[-1:] == [natural_step], phase
        words = tiny_words("--resume") if begun else tiny_words()
    code, output = finish(words, tmp_path)
    assert code == 0, output
    assert differences(unbroken.folder, tmp_path / "run") == []


def test_a_second_interrupt_leaves_at_once(tmp_path, unbroken):
    slow = partial(
        signal_and_sleep_at, "cure_fast.engine.eager:train_step", 8, signal.SIGINT, 600.0
    )
    run = start(tiny_words(), tmp_path, prepare=slow)
    run.wait_for("SIGINT: stopping")
    time.sleep(0.3)
    assert not run.ended()
    began = time.monotonic()
    run.signal(signal.SIGINT)
    # A tenth of a second on a quiet machine.
    assert run.wait(SOON_S) == 75 and time.monotonic() - began < 10
    assert checkpoints(tmp_path / "run") == [3]
    assert check_checkpoint(tmp_path / "run" / "checkpoints" / "checkpoint-000000003") == ""
    code, output = finish(tiny_words("--resume"), tmp_path)
    assert code == 0 and "train: resumed after step 3\n" in output, output
    assert differences(unbroken.folder, tmp_path / "run") == []


def test_a_signal_between_two_others_is_no_second_interrupt(tmp_path):
    """Schedulers send the same signal again and again; only a second Ctrl-C means at once."""
    slow = partial(signal_and_sleep_at, "cure_fast.engine.eager:train_step", 8, signal.SIGTERM, 1.0)
    run = start(tiny_words(), tmp_path, prepare=slow)
    run.wait_for("SIGTERM: stopping")
    for number in (signal.SIGTERM, signal.SIGUSR1):
        run.signal(number)
    check_stopped(run)
    assert checkpoints(tmp_path / "run") == [3, 5]


AUTOATTACK = ["--attacks", "natural,aa", "--aa-limit", "24", "--device", "cpu"]


@pytest.mark.parametrize("number", ONE_SIGNAL)
def test_a_signal_in_autoattack_stops_and_goes_on_later(tmp_path, unbroken, number):
    for name in ("whole", "broken"):
        shutil.copytree(unbroken.folder, tmp_path / name)
    whole = start(["eval", "whole", *AUTOATTACK], tmp_path, prepare=quick_autoattack)
    at_third = partial(quick_autoattack, number, 3)
    broken = start(["eval", "broken", *AUTOATTACK], tmp_path, prepare=at_third)
    check_stopped(broken)
    assert whole.wait() == 0, whole.output()
    (state,) = (tmp_path / "broken" / "evaluation").rglob("aa.json")
    assert list(json.loads(state.read_text())["progress"]["after"]) == ["apgd-ce", "apgd-t"]
    # Two of four attacks are left, and all of the start's: one more would be one run twice.
    again = partial(quick_autoattack, signal.SIGKILL, 2 + 4 + 1)
    code, output = finish(["eval", "broken", *AUTOATTACK], tmp_path, prepare=again)
    assert code == 0, output
    results = [evaluations(tmp_path / name) for name in ("whole", "broken")]
    assert results[0] == results[1] and results[0]


def test_a_signal_in_the_real_autoattack_stops_it_within_a_pass(tmp_path, unbroken):
    shutil.copytree(unbroken.folder, tmp_path / "run")
    inside = partial(signal_at, "pyautoattack.autopgd_base:APGDAttack.attack_single_run", 1, 15)
    check_stopped(start(["eval", "run", *AUTOATTACK], tmp_path, prepare=inside))


def evaluations(folder: Path) -> dict[str, object]:
    """Return all results of a run folder, those of other settings too."""
    files = [*folder.glob("results.json"), *folder.glob("evaluation/*/results.json")]
    return {
        path.relative_to(folder).as_posix(): stable_results(path.parent) for path in sorted(files)
    }


@pytest.mark.parametrize("number", ONE_SIGNAL)
def test_a_signal_while_another_run_pre_trains_ends_the_wait(tmp_path, unbroken, number):
    shutil.copytree(unbroken.folder.parent / "cache", tmp_path / "cache")
    cached = pretraining(tmp_path)
    (cached / "done").unlink()
    with locked(cached / "lock"):
        run = start(tiny_words(), tmp_path)
        run.wait_for("waiting for another run")
        run.signal(number)
        check_stopped(run)
    code, output = finish(tiny_words("--resume"), tmp_path)
    assert code == 0, output
    assert differences(unbroken.folder, tmp_path / "run") == []


@needs_ffcv
@pytest.mark.parametrize("number", ONE_SIGNAL)
def test_a_signal_while_ffcv_writes_ends_the_writer_too(tmp_path, number):
    run = start(tiny_words("--loader", "ffcv"), tmp_path)
    while not writers(tmp_path) and not run.ended():
        time.sleep(0.01)
    # The one that started it has to come back from that: see the next test.
    time.sleep(0.3)
    assert writers(tmp_path), run.output()
    run.signal(number)
    check_stopped(run)
    check_nothing_written(tmp_path)


@needs_ffcv
def test_a_signal_as_the_writer_starts_leaves_no_writer_behind(tmp_path):
    at_start = partial(signal_after, "subprocess:Popen._execute_child", signal.SIGTERM)
    run = start(tiny_words("--loader", "ffcv"), tmp_path, prepare=at_start)
    assert run.wait() == 75, run.output()
    check_nothing_written(tmp_path)


def check_nothing_written(cwd: Path) -> None:
    # A writer that its parent never came to know ends when it finds its standard input closed.
    deadline = time.monotonic() + 120
    while writers(cwd) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not writers(cwd)
    left = [path.name for path in (cwd / "cache" / "ffcv").iterdir() if path.suffix != ".lock"]
    assert left == [] and not (cwd / "run").exists()


def writers(cwd: Path) -> list[str]:
    """Return the command lines of the processes that write an FFCV file in the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
        if "ffcv_writer" in line and (os.readlink(path.with_name("cwd")) == str(cwd)):
            found.append(line)
    return found


# Of Python's own, SIGINT alone would leave a traceback.
@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_signal_while_torch_is_imported_ends_the_program(tmp_path, number):
    program = subprocess.Popen(
        [sys.executable, "-m", "cure_fast", *tiny_words()],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=dict(os.environ) | {"OMP_NUM_THREADS": "1"},
    )
    maps = Path(f"/proc/{program.pid}/maps")
    deadline = time.monotonic() + 120
    while "libtorch_cpu" not in maps.read_text() and time.monotonic() < deadline:
        time.sleep(0.005)
    program.send_signal(number)
    try:
        output = program.communicate(timeout=SOON_S)[0]
    finally:
        program.kill()
    assert program.returncode == 75, output
    assert "Traceback" not in output and not (tmp_path / "run").exists()
