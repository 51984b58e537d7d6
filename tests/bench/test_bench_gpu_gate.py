"""The GPU benchmark's gate: no figure before the tests pass, and what is said where they do not."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench.gpu import __main__ as command
from bench.gpu import gate
from bench.gpu.plan import Plan
from bench.gpu.record import Record
from bench.gpu.sources import CODE, digest_of

CPU = torch.device("cpu")
ABOUT = {"gpu": None, "cpu": "x", "tiny": True, "date": "2026-11-21", "commit": "a", "dirty": False}


@pytest.fixture
def tiny(tmp_path) -> Plan:
    return Plan(CPU, True, 60.0, tmp_path)


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
            f"no test of {ENGINE} passed$",
        ),
        ("import missing_module", "the tests fail"),
        ("", f"no test of {ENGINE} passed$"),
    ],
    ids=["red", "skipped", "broken", "none"],
)
@pytest.mark.usefixtures("plain_pytest")
def test_red_tests_stop_the_benchmark(tiny, tmp_path, test, said) -> None:
    root = checkout(tmp_path / "root", test)
    with pytest.raises(gate.RedTestsError, match=said):
        gate.require_green_tests(tiny, root=root)
    # So they run anew next time.
    kept = json.loads((tiny.out / "tests.json").read_text())
    assert "passed" not in kept and re.search(said, kept["problem"])


@pytest.mark.usefixtures("plain_pytest")
def test_green_tests_run_once_per_state_of_the_sources(tiny, tmp_path, monkeypatch) -> None:
    root = checkout(tmp_path / "root", GREEN)
    gate.require_green_tests(tiny, root=root)
    kept = json.loads((tiny.out / "tests.json").read_text())
    assert kept["passed"] == 2 and kept["state"]["device"] == "cpu"
    # Pytest's report names the machine, so it is not left among the results.
    assert [path.name for path in tiny.out.glob("*.*")] == ["tests.json"]
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
        assert len(ran) == number
        assert "passed" not in json.loads((tiny.out / "tests.json").read_text())
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
    assert "passed" not in json.loads((tiny.out / "tests.json").read_text())


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
    with pytest.raises(gate.RedTestsError, match=r"no test of tests/kernels passed$"):
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


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        (KeyboardInterrupt(), "they did not come to their end"),
        (gate.RedTestsError("the tests were not done in 540 s"), "not done in 540 s"),
        (None, "the tests fail"),
    ],
    ids=["interrupted", "slow", "red"],
)
def test_a_summary_of_earlier_figures_claims_no_tests_that_do_not_hold(
    tiny, tmp_path, monkeypatch, ends, said
) -> None:
    root = checkout(tmp_path / "root", GREEN)
    sources = digest_of(root, CODE)
    Record("ceilings", {**ABOUT, "sources": sources}).write(tiny.out)

    def green(words, report, root, seconds) -> bool:
        report_of(report, "tests.engine.test_fast", "tests.test_bench_authors")
        return True

    monkeypatch.setattr(gate, "run_tests", green)
    gate.require_green_tests(tiny, root=root)
    page = (tiny.out / "summary.md").read_text()
    assert "2 tests passed on the present sources" in page and "| present |" in page

    def stop(words, report, root, seconds) -> bool:
        if ends is not None:
            raise ends
        return False

    (root / "bench").mkdir()
    (root / "bench" / "new.py").write_text("1", encoding="utf-8")
    monkeypatch.setattr(gate, "run_tests", stop)
    with pytest.raises(gate.RedTestsError if ends is None else type(ends)):
        gate.require_green_tests(tiny, root=root)
    page = (tiny.out / "summary.md").read_text()
    assert f"**The tests have not passed**: {said}" in page.replace("the tests were ", "")
    assert "tests passed" not in page and "| **changed since** |" in page


@pytest.mark.slow
def test_an_interrupted_gate_says_one_line_and_no_more(tmp_path) -> None:
    """Ctrl-C as a terminal sends it, to all processes in the foreground."""
    root = tmp_path / "root"
    slow = "import pathlib, time\ndef test_it():\n    pathlib.Path('began').touch(); time.sleep(99)"
    checkout(root, slow)
    script = (
        "import signal, sys; from pathlib import Path; from functools import partial; "
        "signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from bench.gpu import __main__ as c; "
        f"c.require_green_tests = partial(c.require_green_tests, root=Path({str(root)!r})); "
        f"sys.exit(c.main(['--tiny', '--device', 'cpu', '--out', {str(tmp_path / 'out')!r}]))"
    )
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=gate.ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    ) as process:  # fmt: skip
        deadline = time.monotonic() + 60
        while not (root / "began").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == command.INTERRUPTED
    assert err == "interrupted while the tests ran; nothing was measured\n"
    assert "KeyboardInterrupt" not in out
    kept = json.loads((tmp_path / "out" / "tests.json").read_text())
    assert kept["problem"] == "they did not come to their end"


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
        raise gate.RedTestsError("the tests fail")

    def measure(plan, record) -> None:
        pytest.fail("measured in spite of red tests")

    monkeypatch.setattr(command, "require_green_tests", red)
    monkeypatch.setitem(command.PARTS, "ceilings", measure)
    arguments = ["--part", "ceilings", "--tiny", "--device", "cpu", "--out", str(tmp_path)]
    assert command.main(arguments) == 1
    assert capsys.readouterr().err == "error: the tests fail; nothing was measured\n"
    assert not list(tmp_path.iterdir())
    assert "skip" not in command.parser().format_help()
