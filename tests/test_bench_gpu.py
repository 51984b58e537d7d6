"""The GPU benchmark as a command: the tests that come first, its parts, and a rehearsal."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.gpu import __main__ as command
from bench.gpu import gate, plan
from bench.gpu.plan import Plan
from bench.gpu.record import Row

CPU = torch.device("cpu")


@pytest.fixture
def tiny(tmp_path) -> Plan:
    return Plan(CPU, True, 60.0, tmp_path)


# The tests that come first.


def checkout(root: Path, test: str) -> Path:
    for folder in ("engine", "kernels"):
        (root / "tests" / folder).mkdir(parents=True, exist_ok=True)
        (root / "tests" / folder / "test_it.py").write_text(test, encoding="utf-8")
    return root


@pytest.fixture
def plain_pytest(monkeypatch) -> None:
    """Start pytest without plugins, which take seconds to import."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")


def test_a_missing_test_folder_is_a_failure(tiny, tmp_path) -> None:
    with pytest.raises(gate.RedTestsError, match="tests/engine: expected test files there"):
        gate.require_green_tests(tiny, root=tmp_path)


@pytest.mark.parametrize(
    ("test", "said"),
    [
        ("def test_it(): assert False", "the tests fail"),
        ("import pytest\ndef test_it(): pytest.skip('no GPU')", "no test of tests/engine passed"),
        ("import missing_module", "the tests fail"),
        ("", "the tests fail"),
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
    root = checkout(tmp_path / "root", "def test_it(): assert True")
    gate.require_green_tests(tiny, root=root)
    kept = json.loads((tiny.out / "tests.json").read_text())
    assert kept["passed"] == 1 and kept["state"]["device"] == "cpu"
    ran = []
    monkeypatch.setattr(gate, "run_tests", lambda *arguments: ran.append(arguments) or False)
    gate.require_green_tests(tiny, root=root)
    assert not ran
    (root / "bench").mkdir()
    (root / "bench" / "new.py").write_text("x = 1", encoding="utf-8")
    with pytest.raises(gate.RedTestsError):
        gate.require_green_tests(tiny, root=root)
    assert len(ran) == 1


def test_on_a_gpu_every_folder_has_to_pass(tmp_path, monkeypatch) -> None:
    root = checkout(tmp_path / "root", "def test_it(): assert True")
    cuda = Plan(torch.device("cuda"), False, 1, tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H200")
    asked = []

    def run_tests(arguments, report, root) -> bool:
        asked.append(arguments)
        case = '<testcase classname="tests.engine.test_it" name="test_it"/>'
        report.write_text(f"<testsuites><testsuite>{case}</testsuite></testsuites>")
        return True

    monkeypatch.setattr(gate, "run_tests", run_tests)
    with pytest.raises(gate.RedTestsError, match="no test of tests/kernels passed"):
        gate.require_green_tests(cuda, root=root)
    assert asked == [("-m", "gpu", "tests/engine", "tests/kernels")]


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
    arguments = ["--part", "ceilings", "feeds", "kernels", "--tiny", "--device", "cpu"]
    assert command.main([*arguments, "--out", str(tmp_path), "--seconds-per-part", "7"]) == 1
    assert [call[0][-1] for call in ran] == ["ceilings", "feeds", "kernels"]
    assert all(seconds == 7 + command.GRACE for _, seconds in ran)
    assert capsys.readouterr().err == "error: see the failures in feeds\n"


def test_a_part_that_hangs_is_stopped(capsys) -> None:
    waiting = [sys.executable, "-c", "import time; time.sleep(60)"]
    began = time.monotonic()
    assert command.run_process(waiting, 0.5) != 0
    assert time.monotonic() - began < 20 and "not done in 0 s" in capsys.readouterr().err
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


def test_a_rehearsal_of_all_engines_on_the_cpu(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(command, "require_green_tests", lambda plan: None)
    monkeypatch.setattr(plan, "TINY", replace(plan.TINY, methods={"resnet18": ("cure",)}))
    arguments = ["--part", "steps-resnet18", "--tiny", "--device", "cpu", "--out", str(tmp_path)]
    assert command.main(arguments) == 0
    found = json.loads((tmp_path / "steps-resnet18.json").read_text())
    rows = {row["key"]["engine"]: row for row in found["rows"]}
    assert set(rows) == set(plan.ENGINES) and found["finished"] and found["about"]["tiny"]
    for row in rows.values():
        assert row["status"] == "measured" and row["together"] == 1 and len(row["rounds"]) == 5
        low, median, high = row["seconds"]
        assert 0 < low <= median <= high and row["figures"]["share"] > 0
        assert row["figures"]["epoch_seconds"] == pytest.approx(12_500 * median)
    assert "not measured" in (tmp_path / "summary.md").read_text()
    assert (tmp_path / "steps-resnet18-b4.svg").exists()
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
    names = ["all features", *(f"without {f}" for f in ("graph", "fold", "stack", "copies"))]
    assert [row["key"]["engine"] for row in rows] == [*names, "without fuse", "without compile"]
    assert rows[0]["figures"]["gain"] == 1 and all(row["figures"]["gain"] > 0 for row in rows)


def test_it_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu", "--help"],
        capture_output=True, text=True, cwd=gate.ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and "--seconds-per-part" in done.stdout, done.stderr
