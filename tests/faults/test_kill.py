"""Kills at any moment: a resumed run starts from the newest checkpoint and ends as an unbroken."""

from __future__ import annotations

import random
import signal
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from killing import Outcome, Unbroken, kill_and_resume, same_end
from moments import hold_at, signal_after, signal_at, signal_at_change
from processes import finish, start
from tiny_command import checkpoints, differences, tiny_words

# As many at once as there are cores on a small machine.
AT_ONCE = 2


# In turn, each in a process that goes on after the one before it, with what the folder shows then.
# The tiny run takes 3 steps naturally, then twice 3; a call is counted anew in each process.
MOMENTS = [
    # The folder is made and locked, and there is nothing to resume yet.
    ("start", signal_at, "cure_fast.runs.folder:write_json", 1),
    ("start", signal_at, "cure_fast.files:flush", 1),
    ("pre-training", signal_at, "cure_fast.engine.eager:train_step", 2),
    ("saving", signal_at, "cure_fast.runs.checkpoint:_write_manifest", 1),
    # Trained naturally, and not cleared up.
    ("pre-training", signal_after, "pathlib:Path.touch"),
    ("training", signal_at, "cure_fast.engine.eager:train_step", 2),
    ("training", signal_at, "cure_fast.runs.checkpoint:tidy_checkpoints", 1),
    ("training", signal_at, "cure_fast.engine.eager:train_step", 2),
    ("evaluation", signal_at, "cure_fast.evaluation.measurement:Measurement.under_attack", 4),
    ("report", signal_at, "cure_fast.report:write_report", 1),
]


def test_a_run_killed_in_each_phase_ends_as_an_unbroken_one(tmp_path, unbroken):
    kills = [partial(act, *place, signal.SIGKILL) for _, act, *place in MOMENTS]
    outcome = kill_and_resume(tmp_path, unbroken, kills)
    assert outcome.faults() == []
    assert outcome.phases == [phase for phase, *_ in MOMENTS]


def killed(folder: Path, unbroken: Unbroken, seed: int) -> Outcome:
    """Kill a run at one to three moments of its duration and continue it."""
    chance = random.Random(seed)
    # Starting takes a part of each duration, so that later kills come in later phases too.
    delays = [chance.uniform(0, unbroken.seconds) for _ in range(chance.choice((1, 1, 2, 3)))]
    cwd = folder / f"seed-{seed}"
    cwd.mkdir()
    return kill_and_resume(cwd, unbroken, delays)


def kill_all(folder: Path, unbroken: Unbroken, seeds: range) -> dict[int, Outcome]:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return dict(zip(seeds, pool.map(partial(killed, folder, unbroken), seeds), strict=True))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_hundred_kills(tmp_path, unbroken, capsys):
    outcomes = kill_all(tmp_path, unbroken, range(1000, 1200))
    phases = Counter(phase for o in outcomes.values() for phase in o.phases)
    with capsys.disabled():
        print(f"\nkills: {phases.total()} of {len(outcomes)} runs, {dict(phases)}")
        for kind in ("lost", "different", "refused", "leftovers"):
            print(f"{kind}: {sum(bool(getattr(o, kind)) for o in outcomes.values())} runs")
    assert phases.total() >= 200
    assert {s: o.faults() for s, o in outcomes.items() if o.faults()} == {}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_run_killed_at_any_change_of_its_files_ends_as_an_unbroken_one(tmp_path, unbroken):
    """Random kills seldom hit the moments between two changes; here each is hit once."""

    def outcome(number: int) -> Outcome:
        cwd = tmp_path / f"change-{number}"
        cwd.mkdir()
        killed = partial(signal_at_change, number, signal.SIGKILL)
        return kill_and_resume(cwd, unbroken, [killed])

    faults, killed = {}, [True]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        # Beyond its last change a run ends by itself.
        while all(killed):
            numbers = range(len(killed), len(killed) + 8 * AT_ONCE)
            for number, found in zip(numbers, pool.map(outcome, numbers), strict=True):
                faults |= {number: found.faults()} if found.faults() else {}
                killed.append(bool(found.phases))
    assert faults == {} and killed.index(False) > 100


# With state of each kind: an average, a bank by image, a strategy that learns; above, a second
# network. That each method's state comes back is tested in one process, of tests/training too.
@pytest.mark.parametrize(
    "method",
    [
        "te",
        *(
            pytest.param(m, marks=pytest.mark.slow)
            for m in ("cure_eff", "piat_nmse", "cfa_at", "las_at")
        ),
    ],
)
def test_methods_end_the_same_after_a_kill_while_training(tmp_path, method):
    words = tiny_words("--pretrain-epochs", "0", method=method)
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    for cwd in (broken, whole):
        cwd.mkdir()
    in_the_second_epoch = partial(signal_at, "cure_fast.engine.eager:train_step", 5, signal.SIGKILL)
    runs = start(words, broken, prepare=in_the_second_epoch), start(words, whole)
    codes = [run.wait() for run in runs]
    assert codes == [-signal.SIGKILL, 0], [run.output() for run in runs]
    assert checkpoints(broken / "run") == [3]
    code, output = finish([*words, "--resume"], broken)
    assert code == 0 and "train: resumed after step 3\n" in output, output
    assert differences(whole / "run", broken / "run") == []
    assert same_end(whole / "run", broken / "run")


@pytest.mark.parametrize(
    "method",
    ["cure_eff", *(pytest.param(m, marks=pytest.mark.slow) for m in ("cure_paper", "pgd_at"))],
)
def test_a_run_killed_after_it_went_on_in_mid_epoch_ends_the_same(tmp_path, method):
    words = tiny_words("--pretrain-epochs", "0", method=method)
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    for cwd in (broken, whole):
        cwd.mkdir()
    unbroken = start(words, whole)
    stopped = partial(signal_at, "cure_fast.engine.eager:train_step", 4, signal.SIGTERM)
    code, output = finish(words, broken, prepare=stopped)
    assert code == 75 and checkpoints(broken / "run")[-1] == 4, output
    words.append("--resume")
    killed = start(
        words, broken, prepare=partial(signal_at, "cure_fast.engine.eager:train_step", 1, 9)
    )
    assert killed.wait() == -signal.SIGKILL, killed.output()
    code, output = finish(words, broken)
    assert code == 0 and "train: resumed after step 4\n" in output, output
    assert unbroken.wait() == 0, unbroken.output()
    assert differences(whole / "run", broken / "run") == []
    assert same_end(whole / "run", broken / "run")


def test_a_second_process_in_the_folder_is_refused_and_the_first_goes_on(tmp_path, unbroken):
    go = tmp_path / "go"
    hold = partial(hold_at, "cure_fast.engine.eager:train_step", 8, go)
    first = start(tiny_words(), tmp_path, prepare=hold)
    first.wait_for("train epoch   1/2")
    second = start(tiny_words("--resume"), tmp_path)
    code = second.wait()
    held = not first.ended()
    go.touch()
    assert held and code == 2, second.output()
    (line,) = second.stderr().splitlines()
    assert "another process is running in it" in line
    assert first.wait() == 0, first.output()
    assert differences(unbroken.folder, tmp_path / "run") == []
