"""No figure before the tests pass: an engine that computes something else is not fast but wrong."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import torch

from bench.gpu.plan import Plan
from cure_fast.environment import commit
from cure_fast.files import write_json

ROOT = Path(__file__).resolve().parents[2]
ON_GPU = ("-m", "gpu", "tests/engine", "tests/kernels")
ON_CPU = ("-m", "not slow", "tests/engine")
# What the tests and the figures depend on.
SOURCES = ("cure_fast", "kernels", "loaders", "bench", "tests")
SECONDS = 540


class RedTestsError(Exception):
    """The tests that have to pass before anything is measured did not; says what is wrong."""


def require_green_tests(plan: Plan, *, root: Path = ROOT) -> None:
    """Run the engines' tests, unless they have passed before on the same sources and device.

    Args:
        plan: where the figures are to be taken; its folder keeps the answer.
        root: of the checkout.

    Raises:
        RedTestsError: if a test failed, or if no test of one of the folders passed.
    """
    arguments = ON_GPU if plan.on_gpu else ON_CPU
    folders = [argument for argument in arguments if argument.startswith("tests/")]
    for folder in folders:
        if not list((root / folder).glob("test_*.py")):
            raise RedTestsError(f"{folder}: expected test files there, found none")
    state = state_of(plan, arguments, root)
    kept = plan.out / "tests.json"
    if kept.exists() and json.loads(kept.read_text(encoding="utf-8")).get("state") == state:
        return
    print(f"tests first: pytest -q {' '.join(arguments)}", flush=True)
    report = plan.out / "tests-pytest.xml"
    report.unlink(missing_ok=True)
    passed = run_tests(arguments, report, root)
    idle = [folder for folder in folders if not passed_in(folder, report)]
    if not passed:
        raise RedTestsError("the tests fail; nothing was measured")
    if idle:
        raise RedTestsError(f"no test of {', '.join(idle)} passed; nothing was measured")
    write_json(kept, {"state": state, "passed": sum(passed_in(f, report) for f in folders)})


def run_tests(arguments: tuple[str, ...], report: Path, root: Path) -> bool:
    """Return whether pytest ends well, and have it write ``report``."""
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report.resolve()}", *arguments]
    try:
        return subprocess.run(command, cwd=root, timeout=SECONDS, check=False).returncode == 0
    except subprocess.TimeoutExpired as error:
        raise RedTestsError(f"the tests were not done in {SECONDS} s") from error


def passed_in(folder: str, report: Path) -> int:
    """Return how many tests of the folder passed; those that were skipped did not."""
    if not report.exists():
        return 0
    prefix = folder.replace("/", ".") + "."
    cases = ET.parse(report).getroot().iter("testcase")
    return sum(case.get("classname", "").startswith(prefix) and len(case) == 0 for case in cases)


def state_of(plan: Plan, arguments: tuple[str, ...], root: Path) -> dict[str, str | None]:
    """Return what the answer of the tests depends on: sources, torch, device."""
    digest = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode())
            digest.update(path.read_bytes())
    gpu = torch.cuda.get_device_name(plan.device) if plan.on_gpu else "cpu"
    return {
        "commit": commit()["commit"],
        "sources": digest.hexdigest(),
        "tests": " ".join(arguments),
        "torch": torch.__version__,
        "device": gpu,
    }
