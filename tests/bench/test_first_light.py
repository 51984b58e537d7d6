"""The first minutes on a GPU, rehearsed: whole calls, and parts that fail, hang or are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench.first_light import __main__ as first_light
from bench.first_light.page import verdicts, write_page
from bench.first_light.parts import BOUNDS, METHODS, difference, problem_of
from bench.first_light.processes import GRACE, Planned, run_all
from bench.first_light.training import cifar_words
from bench.gpu.plan import Plan

ROOT = Path(__file__).resolve().parents[2]
FAULTS = {
    "raises": "raise SystemExit(3)",
    "hangs": "import time; time.sleep(600)",
    "hangs on": "import signal as s, time; s.signal(s.SIGINT, s.SIG_IGN); time.sleep(600)",
    "crashes": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
    "leaves a child": "import subprocess; subprocess.Popen(['sleep', '600'])",
}
HOW = ["failed", "out of time", "out of time", "killed", "finished"]


def test_a_part_that_fails_hangs_or_crashes_costs_no_other_its_time(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.first_light.processes.GRACE", 0.5)
    parts = [Planned(name, 1.5, (sys.executable, "-c", code)) for name, code in FAULTS.items()]
    parts.append(Planned("last", 20, (sys.executable, "-c", "print('here')")))
    told = []
    ended = run_all(parts, tmp_path, 60, lambda so_far: told.append(len(so_far)))
    assert [part.how for part in ended] == [*HOW, "finished"]
    assert told == [1, 2, 3, 4, 5, 6]
    assert all(part.seconds < 4 for part in ended[:-1])
    assert ended[3].note == "SIGSEGV" and ended[0].note == "exit code 3"
    assert (tmp_path / "last.log").read_text() == "here\n"


def test_a_part_that_is_killed_shows_nothing_of_an_earlier_try(tmp_path):
    (tmp_path / "part.json").write_text("{}")
    run_all([Planned("part", 20, ("false",))], tmp_path, 60, lambda so_far: None)
    assert not (tmp_path / "part.json").exists()


# A call whose parts only say which process they are.
ENDLESS = """
import sys
from pathlib import Path
from bench.first_light import __main__ as call

code = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(600)"
call.command = lambda *given: (sys.executable, "-c", code, sys.argv[1])
call.main(["--tiny", "--device", "cpu", "--out", sys.argv[2]])
"""


def test_the_end_of_the_whole_is_the_end_of_its_part(tmp_path):
    told = tmp_path / "pid"
    words = [sys.executable, "-c", ENDLESS, str(told), str(tmp_path / "out")]
    with subprocess.Popen(words, cwd=ROOT) as whole:
        deadline = time.monotonic() + 60
        while not (told.exists() and told.read_text()) and time.monotonic() < deadline:
            time.sleep(0.1)
        whole.terminate()
        assert whole.wait(20) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int(told.read_text()), 0)


def test_a_part_without_time_left_is_not_begun(tmp_path):
    (ended,) = run_all([Planned("late", 9, ("false",))], tmp_path, GRACE, lambda so_far: None)
    assert ended.how == "not begun"


def test_both_calls_are_planned_below_ten_minutes():
    for call in first_light.SECONDS.values():
        assert sum(call.values()) <= first_light.CALL_S <= 300
    assert sum(sum(call.values()) for call in first_light.SECONDS.values()) < 600


def test_a_device_without_sizes_for_it_is_refused(capsys):
    assert first_light.main(["--device", "cpu"]) == 2
    assert "--tiny" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_machine_without_a_gpu_is_refused_before_anything_is_written(tmp_path, capsys):
    assert first_light.main(["--out", str(tmp_path / "out")]) == 2
    assert "no GPU" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_whole_plan_is_rehearsed(tmp_path):
    words = ["--tiny", "--device", "cpu", "--out", str(tmp_path)]
    assert first_light.main(words) == 0
    assert first_light.main([*words, "--call", "2"]) == 0
    found = json.loads((tmp_path / "first-light.json").read_text())
    assert [part["how"] for part in found["parts"]] == ["finished"] * 6
    assert all(line.startswith("not measured") for line in found["verdicts"])


def row(status="measured", seconds=(1.0, 1.0, 1.0), **key):
    note = "" if status == "measured" else "wrong: 3 of 4 elements"
    rounds = [1.0] if status == "measured" else []
    return {"key": key, "status": status, "note": note, "rounds": rounds, "seconds": seconds} | {
        "figures": {"epoch_seconds": 5.0, "share": 0.4},
        "together": 1,
    }


def results(*equality):
    steps = [
        row(method="cure", engine="fast", seconds=(1.1, 1.2, 1.3)),
        row(method="trades", engine="fast"),
        row(method="cure", engine="authors", seconds=(3, 3, 3)),
    ]
    about = {"tiny": False}
    found = {"resnet18-128": {"about": about, "rows": [s | {"key": {**s["key"], "batch": 128}}
                                                       for s in steps]}}  # fmt: skip
    return found | ({"equality": {"about": about, "rows": list(equality)}} if equality else {})


def test_a_target_is_reached_only_by_engines_that_were_compared():
    right = verdicts(results(row(method="cure")), tiny=False)
    assert right[0].startswith("reached: CURE's step over TRADES'")
    assert right[1].startswith("short by 50.0 %")
    assert right[6].startswith("not measured: CURE's step, WRN-34-10")
    wrong = verdicts(results(row("failed", None, method="cure")), tiny=False)
    assert wrong[0].startswith("wrong: reached") and wrong[6].startswith("not measured")
    unknown = verdicts(results(), tiny=False)
    assert unknown[0].startswith("not measured: reached") and "not compared" in unknown[0]


def test_the_page_has_every_failure(tmp_path):
    record = {"format": "cure-fast gpu benchmark 1", "part": "equality", "finished": True}
    record |= {"about": {"tiny": True}, "rows": [row("failed", None, method="cure")]}
    (tmp_path / "equality.json").write_text(json.dumps(record))
    page = write_page(tmp_path, [], {"tiny": True}).read_text()
    assert "REHEARSAL" in page and "- equality: cure: wrong: 3 of 4 elements" in page


@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_engines_that_are_equal_are_found_so(tmp_path, method, dtype):
    """Also in bf16, where autocast would keep weights that a step has moved."""
    plan = Plan(torch.device("cpu"), True, 60.0, tmp_path)
    assert problem_of(plan, "resnet-small", 8, dtype, method, ()) == ""


def test_engines_that_differ_are_not(tmp_path, monkeypatch):
    """One that computes its bf16 steps with the weights of the first."""
    monkeypatch.setattr("bench.first_light.parts.exact", lambda plan: torch.autocast("cpu"))
    plan = Plan(torch.device("cpu"), True, 60.0, tmp_path)
    assert "step " in problem_of(plan, "resnet-small", 8, torch.bfloat16, "pgd_at", ())


def test_what_differs_is_told_of_all_results():
    one, two = torch.tensor([1.0, 2.0]), torch.tensor([1.0, float("nan")])
    assert difference([one], [one], 0) == ""
    assert difference([two, one], [one, one + 1], 1e-6) == (
        "result 0: 1 of 2 elements, first 1; result 1: 2 of 2 elements, first 0"
    )
    assert "results instead of" in difference([one], [one, one], 0)


def test_training_fills_the_time_by_the_measured_step(tmp_path):
    plan = Plan(torch.device("cpu"), False, 285.0, tmp_path)
    words = cifar_words(plan, tmp_path, tmp_path / "start.safetensors")
    assert words[words.index("--epochs") + 1] == str(int((285 - 120) / (0.016 * 50_000 / 128)))
    record = {"format": "cure-fast gpu benchmark 1", "part": "resnet18-128"}
    (tmp_path / "resnet18-128.json").write_text(json.dumps(record | results()["resnet18-128"]))
    assert cifar_words(plan, tmp_path, None)[4:6] == ["--epochs", "2"]
