"""The GPU benchmark as a command: the tests that come first, its parts, and a rehearsal."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch

from bench.gpu import __main__ as command
from bench.gpu import gate, plan
from bench.gpu.plan import Plan
from bench.gpu.record import Row
from cure_fast.config import EngineFeature

CPU = torch.device("cpu")


@pytest.fixture
def tiny(tmp_path) -> Plan:
    return Plan(CPU, True, 60.0, tmp_path)


# The tests that come first.


def checkout(root: Path, test: str) -> Path:
    for file in ("engine/test_fast.py", "kernels/test_it.py", "test_bench_authors.py"):
        path = root / "tests" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(GREEN if path.parent == root / "tests" else test, encoding="utf-8")
    return root


GREEN = "def test_it(): assert True"
ENGINE = re.escape("tests/engine/test_fast.py")


@pytest.fixture
def plain_pytest(monkeypatch) -> None:
    """Start pytest without plugins, which take seconds to import."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")


def test_a_missing_test_folder_is_a_failure(tiny, tmp_path) -> None:
    with pytest.raises(gate.RedTestsError, match=f"{ENGINE}: expected test files there"):
        gate.require_green_tests(tiny, root=tmp_path)


@pytest.mark.parametrize(
    ("test", "said"),
    [
        ("def test_it(): assert False", "the tests fail"),
        (
            "import pytest\ndef test_it(): pytest.skip('no GPU')",
            f"no test of {ENGINE} passed;",
        ),
        ("import missing_module", "the tests fail"),
        ("", f"no test of {ENGINE} passed;"),
    ],
    ids=["red", "skipped", "broken", "none"],
)
@pytest.mark.usefixtures("plain_pytest")
def test_red_tests_stop_the_benchmark(tiny, tmp_path, test, said) -> None:
    root = checkout(tmp_path / "root", test)
    with pytest.raises(gate.RedTestsError, match=said):
        gate.require_green_tests(tiny, root=root)
    # So they run anew next time.
    assert not (tiny.out / "tests.json").exists()


@pytest.mark.usefixtures("plain_pytest")
def test_green_tests_run_once_per_state_of_the_sources(tiny, tmp_path, monkeypatch) -> None:
    root = checkout(tmp_path / "root", GREEN)
    gate.require_green_tests(tiny, root=root)
    kept = json.loads((tiny.out / "tests.json").read_text())
    assert kept["passed"] == 2 and kept["state"]["device"] == "cpu"
    ran = []
    monkeypatch.setattr(gate, "run_tests", lambda *arguments: ran.append(arguments) or False)
    gate.require_green_tests(tiny, root=root)
    assert not ran
    for number, file in enumerate(("bench/new.py", "tests/golden.json", "pyproject.toml"), 1):
        saved = (tiny.out / "tests.json").read_bytes()
        (root / file).parent.mkdir(exist_ok=True)
        (root / file).write_text("1", encoding="utf-8")
        with pytest.raises(gate.RedTestsError):
            gate.require_green_tests(tiny, root=root)
        # What was tested before is no longer what is there.
        assert len(ran) == number and not (tiny.out / "tests.json").exists()
        (root / file).unlink()
        (tiny.out / "tests.json").write_bytes(saved)
        gate.require_green_tests(tiny, root=root)
        assert len(ran) == number


@pytest.mark.parametrize("what", ["commit", "driver", "torch"])
def test_another_commit_driver_or_torch_is_tested_anew(tiny, tmp_path, monkeypatch, what) -> None:
    root = checkout(tmp_path, GREEN)
    first = gate.state_of(tiny, root)
    assert first == gate.state_of(tiny, root)
    if what == "torch":
        monkeypatch.setattr(torch, "__version__", "0")
    else:
        found = {"commit": first["commit"], "driver": first["driver"], what: "another"}
        monkeypatch.setattr(gate, "environment", lambda: found)
    assert gate.state_of(tiny, root) != first


def report_of(report: Path, *names: str) -> None:
    cases = "".join(f'<testcase classname="{name}" name="test_it"/>' for name in names)
    report.write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")


def test_sources_that_change_while_the_tests_run_are_refused(tiny, tmp_path, monkeypatch) -> None:
    root = checkout(tmp_path / "root", GREEN)

    def run_tests(words, report, root, seconds) -> bool:
        (root / "tests" / "new.py").write_text("x = 1", encoding="utf-8")
        report_of(report, "tests.engine.test_fast", "tests.test_bench_authors")
        return True

    monkeypatch.setattr(gate, "run_tests", run_tests)
    with pytest.raises(gate.RedTestsError, match="the sources changed while the tests ran"):
        gate.require_green_tests(tiny, root=root)
    assert not (tiny.out / "tests.json").exists()


def test_on_a_gpu_every_folder_has_to_pass_within_one_time(tmp_path, monkeypatch) -> None:
    root = checkout(tmp_path / "root", GREEN)
    cuda = Plan(torch.device("cuda"), False, 1, tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H200")
    asked, passing = [], ["tests.engine.test_it", "tests.test_bench_authors"]

    def run_tests(words, report, root, seconds) -> bool:
        asked.append(words)
        assert 530 < seconds <= 540
        report_of(report, *passing)
        return True

    monkeypatch.setattr(gate, "run_tests", run_tests)
    with pytest.raises(gate.RedTestsError, match="no test of tests/kernels passed;"):
        gate.require_green_tests(cuda, root=root)
    authors = "tests/test_bench_authors.py"
    assert asked == [("-m", "gpu", "tests/engine", "tests/kernels", authors)]
    passing.append("tests.kernels.deeper.test_it")
    gate.require_green_tests(cuda, root=root)
    assert asked[2:] == [("-m", "not gpu", authors)]
    kept = json.loads((cuda.out / "tests.json").read_text())
    assert kept["passed"] == 4 and kept["state"]["device"] == "H200"


def test_tests_of_another_name_do_not_count(tmp_path) -> None:
    report = tmp_path / "r.xml"
    report_of(report, "tests.engines.test_it", "tests.test_bench_authors_too", "tests.engine.t")
    assert gate.passed_in("tests/engine", report) == 1
    assert gate.passed_in("tests/test_bench_authors.py", report) == 0
    assert gate.passed_in("tests/engine", tmp_path / "missing.xml") == 0


def test_tests_that_take_too_long_are_red(tmp_path) -> None:
    with pytest.raises(gate.RedTestsError, match="not done in 540 s"):
        gate.run_tests((), tmp_path / "r.xml", tmp_path, 0.01)


def test_the_gate_alone_measures_nothing(tmp_path, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(command, "require_green_tests", asked.append)
    for name in command.PARTS:
        monkeypatch.setitem(command.PARTS, name, lambda *arguments: pytest.fail("measured"))
    arguments = ["--part", "gate", "--tiny", "--device", "cpu", "--out", str(tmp_path)]
    assert command.main(arguments) == 0
    assert [plan.out for plan in asked] == [tmp_path.resolve()] and not list(tmp_path.iterdir())


def test_no_option_skips_the_tests_and_no_figure_is_taken_of_red_ones(
    tmp_path, monkeypatch, capsys
) -> None:
    def red(plan) -> None:
        raise gate.RedTestsError("the tests fail; nothing was measured")

    def measure(plan, record) -> None:
        pytest.fail("measured in spite of red tests")

    monkeypatch.setattr(command, "require_green_tests", red)
    monkeypatch.setitem(command.PARTS, "ceilings", measure)
    arguments = ["--part", "ceilings", "--tiny", "--device", "cpu", "--out", str(tmp_path)]
    assert command.main(arguments) == 1
    assert "nothing was measured" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert "skip" not in command.parser().format_help()


# The command.


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "cpu"], "--device cpu: expected --tiny with it"),
        (["--device", "tpu"], "--device: expected cpu, cuda"),
        (["--tiny", "--device", "cpu", "--seconds-per-part", "0"], "expected more than 0, got 0"),
    ],
)
def test_wrong_options_are_refused_in_one_line(arguments, said, capsys) -> None:
    assert command.main(arguments) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_a_machine_without_gpu_is_told_so(monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main([]) == 2
    assert "this machine has 0 usable GPUs" in capsys.readouterr().err


def test_each_of_several_parts_is_a_process_and_one_failure_is_told(
    tmp_path, monkeypatch, capsys
) -> None:
    ran = []

    def run_process(arguments, seconds) -> int:
        ran.append((arguments[1:5], seconds))
        return int("feeds" in arguments)

    monkeypatch.setattr(command, "run_process", run_process)
    monkeypatch.setattr(command, "require_green_tests", lambda plan: None)
    arguments = ["--part", "ceilings", "feeds", "gate", "wrn34-10", "feeds", "--tiny"]
    arguments += ["--device", "cpu"]
    assert command.main([*arguments, "--out", str(tmp_path), "--seconds-per-part", "7"]) == 1
    parts = ["ceilings", "feeds", "wrn34-10-128", "wrn34-10-512", "wrn34-10-256"]
    assert [call[0][-1] for call in ran] == parts
    assert all(seconds == 7 + command.GRACE for _, seconds in ran)
    assert capsys.readouterr().err == "error: see the failures in feeds\n"


def test_a_part_that_hangs_is_stopped(capsys) -> None:
    # A shell's background job ignores SIGINT, and what it starts does so too.
    script = (
        "import signal, time; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "time.sleep(600)"
    )
    assert command.run_process([sys.executable, "-c", script], 0.5) != 0
    assert "not done in 0 s" in capsys.readouterr().err
    assert command.run_process([sys.executable, "-c", ""], 20) == 0


def test_a_part_that_breaks_is_written_and_fails(tiny, monkeypatch) -> None:
    def broken(plan, record) -> None:
        record.add(Row({"engine": "fast"}, rounds=(0.016,)))
        raise RuntimeError("driver lost")

    monkeypatch.setitem(command.PARTS, "feeds", broken)
    assert command.run_part("feeds", tiny) == 1
    written = json.loads((tiny.out / "feeds.json").read_text())
    assert [row["status"] for row in written["rows"]] == ["measured", "failed"]
    assert written["rows"][1]["note"] == "RuntimeError: driver lost" and not written["finished"]


def test_there_is_a_part_per_model_and_batch_and_what_targets_name_comes_first() -> None:
    parts = [
        f"{m}-{b}" for m in ("resnet18", "preactresnet18", "wrn34-10") for b in (128, 256, 512)
    ]
    assert sorted(plan.STEP_PARTS) == sorted(parts)
    assert set(command.PARTS) == {*parts, "ceilings", "ablation", "feeds", "kernels"}
    assert list(command.PARTS)[:2] == ["ceilings", "resnet18-128"]
    assert command.parser().parse_args([]).part == list(command.PARTS)
    # Start and end take some of the eight minutes, and a machine's ten hold all there can be.
    assert command.SECONDS < 480 and command.SECONDS + command.GRACE + command.ENDING < 600


def test_a_rehearsal_of_all_engines_on_the_cpu(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(command, "require_green_tests", lambda plan: None)
    monkeypatch.setattr(plan, "TINY", replace(plan.TINY, methods={"resnet18-128": ("cure",)}))
    arguments = ["--part", "resnet18-128", "--tiny", "--device", "cpu", "--out", str(tmp_path)]
    assert command.main(arguments) == 0
    found = json.loads((tmp_path / "resnet18-128.json").read_text())
    rows = {row["key"]["engine"]: row for row in found["rows"]}
    assert set(rows) == set(plan.ENGINES) and found["finished"] and found["about"]["tiny"]
    for row in rows.values():
        assert row["status"] == "measured" and row["together"] == 1 and len(row["rounds"]) == 5
        low, median, high = row["seconds"]
        assert 0 < low <= median <= high and row["figures"]["share"] > 0
        assert row["figures"]["epoch_seconds"] == pytest.approx(12_500 * median)
    assert "not measured" in (tmp_path / "summary.md").read_text()
    assert (tmp_path / "resnet18-128.svg").exists()
    page = (tmp_path / "resnet18-128.md").read_text()
    assert "torch.compile in its default mode" in page
    for name in ("commit", "dirty", "cuda", "driver", "torch", "triton", "date", "command"):
        assert name in found["about"]


def test_ceilings_and_ablation_rehearsed_on_the_cpu(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(command, "require_green_tests", lambda plan: None)
    arguments = ["--tiny", "--device", "cpu", "--out", str(tmp_path)]
    assert command.main(["--part", "ceilings", *arguments]) == 0
    found = json.loads((tmp_path / "ceilings.json").read_text())["rows"]
    assert {row["status"] for row in found} == {"measured"}
    assert {row["key"].get("pass") for row in found} > {"forward", "to inputs", "to weights"}
    copies = [row for row in found if row["key"].get("operation") == "copy"]
    assert len(copies) == 1 and copies[0]["figures"]["bytes_per_second"] > 1e6
    assert command.main(["--part", "ablation", *arguments]) == 0
    rows = json.loads((tmp_path / "ablation.json").read_text())["rows"]
    along = {"fold": " (and compile)", "stack": " (and compile-loss in part)"}
    along["copies"] = " (and stack, compile-loss)"
    names = [f"without {name}{along.get(name, '')}" for name in get_args(EngineFeature)]
    assert [row["key"]["engine"] for row in rows] == ["all features", *names]
    assert rows[0]["figures"]["gain"] == 1 and all(row["figures"]["gain"] > 0 for row in rows)


def test_it_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu", "--help"],
        capture_output=True, text=True, cwd=gate.ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and "--seconds-per-part" in done.stdout, done.stderr
