"""No figure before the tests pass: an engine that computes something else is not fast but wrong.

On a GPU these are all tests that need one, of engines, kernels and the authors' engine
(``bench/authors.py``), whose steps there are compared with those of the host. A second process, for
some ten seconds on the host, has the authors' engine's other tests, which compare it with the eager
engine in double precision and count its passes. A rehearsal has a few tests on the CPU.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import torch

from bench.gpu.plan import Plan
from bench.gpu.record import TESTED
from bench.gpu.sources import CODE, ROOT, TESTS, digest_of
from bench.gpu.summary import read_results, write_summary
from cure_fast.files import write_json
from cure_fast.runs.environment import environment

# What has to pass, and pytest's words for it, a process each: with ``-m gpu`` kernels are compiled.
AUTHORS = "tests/test_bench_authors.py"
ON_GPU = (("-m", "gpu", "tests/engine", "tests/kernels", AUTHORS), ("-m", "not gpu", AUTHORS))
# Enough of a rehearsal: the whole takes four to ten minutes on two cores.
ON_CPU = (("-m", "not slow and not gpu", "tests/engine/test_fast.py", AUTHORS),)
# Of all tests; a command on a GPU that is lent often ends at ten minutes.
SECONDS = 540


class RedTestsError(Exception):
    """The tests that have to pass before anything is measured did not; says what is wrong."""


def require_green_tests(plan: Plan, *, root: Path = ROOT) -> None:
    """Run the engines' tests, unless they have passed before on the same sources and machine.

    Args:
        plan: where the figures are to be taken; its folder keeps what was tested.
        root: of the checkout.

    Raises:
        RedTestsError: if a test failed, if no test of a folder or file passed, or if the sources
            changed meanwhile.
    """
    state, kept = state_of(plan, root), plan.out / TESTED
    if kept.exists():
        found = json.loads(kept.read_text(encoding="utf-8"))
        if found.get("passed") and found.get("state") == state:
            print(f"tests: passed before on the same sources and machine ({kept})", flush=True)
            return
    # A summary of earlier figures must not claim tests that no longer hold, however this ends.
    _keep(plan, root, {"state": state, "problem": "they did not come to their end"})
    began = time.monotonic()
    try:
        passed = _run_all(plan, root, began)
        if state_of(plan, root) != state:
            raise RedTestsError("the sources changed while the tests ran")
    except RedTestsError as error:
        _keep(plan, root, {"state": state, "problem": str(error)})
        raise
    seconds = round(time.monotonic() - began)
    _keep(plan, root, {"state": state, "passed": passed, "seconds": seconds})
    print(f"tests: {passed} passed in {seconds} s", flush=True)


def _keep(plan: Plan, root: Path, status: dict[str, Any]) -> None:
    """Write how the tests stand, to the summary too where there is something to sum up."""
    write_json(plan.out / TESTED, status)
    if read_results(plan.out):
        write_summary(plan.out, root=root)


def _run_all(plan: Plan, root: Path, began: float) -> int:
    """Run the tests, a process after the other; return how many passed.

    Raises:
        RedTestsError: if one failed, or none of a folder or file passed.
    """
    runs = ON_GPU if plan.on_gpu else ON_CPU
    which = "tests first" if plan.on_gpu else "a rehearsal's few tests first"
    for path in paths(runs):
        if not list((root / path).glob("test_*.py")) and not (root / path).is_file():
            raise RedTestsError(f"{path}: expected test files there, found none")
    passed = 0
    for words in runs:
        print(f"{which}: pytest -q {' '.join(words)}", flush=True)
        # Not in the folder of the results: it names the machine.
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            if not run_tests(words, report, root, SECONDS - (time.monotonic() - began)):
                raise RedTestsError("the tests fail")
            counts = {path: passed_in(path, report) for path in paths((words,))}
        idle = [path for path, count in counts.items() if not count]
        if idle:
            raise RedTestsError(f"no test of {', '.join(idle)} passed")
        passed += sum(counts.values())
    return passed


def paths(runs: tuple[tuple[str, ...], ...]) -> list[str]:
    """Return the folders and files of tests among pytest's words, each once."""
    return list(dict.fromkeys(word for words in runs for word in words if "/" in word))


def run_tests(words: tuple[str, ...], report: Path, root: Path, seconds: float) -> bool:
    """Return whether pytest ends well within its time, and have it write ``report``.

    Raises:
        RedTestsError: if the time does not suffice.
    """
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report.resolve()}", *words]
    # A session of its own: Ctrl-C is this process's to answer, not pytest's with a traceback, and
    # what tests have started ends with them.
    with subprocess.Popen(
        command, cwd=root, stdin=subprocess.DEVNULL, start_new_session=True
    ) as process:
        try:
            return process.wait(seconds) == 0
        except subprocess.TimeoutExpired as error:
            raise RedTestsError(f"the tests were not done in {SECONDS} s") from error
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def passed_in(path: str, report: Path) -> int:
    """Return how many tests of a folder or file passed; those that were skipped did not."""
    if not report.exists():
        return 0
    name = path.removesuffix(".py").replace("/", ".")
    return sum(
        f"{case.get('classname', '')}.".startswith(f"{name}.") and len(case) == 0
        for case in ET.parse(report).getroot().iter("testcase")
    )


def state_of(plan: Plan, root: Path) -> dict[str, Any]:
    """Return what the answer of the tests depends on: commit, sources, tests, torch, machine."""
    found = environment()
    return {
        "commit": found["commit"],
        "sources": digest_of(root, (*CODE, *TESTS)),
        "tests": [" ".join(words) for words in (ON_GPU if plan.on_gpu else ON_CPU)],
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(plan.device) if plan.on_gpu else "cpu",
        "driver": found["driver"],
    }
