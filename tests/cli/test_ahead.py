"""Answers before torch is there: they come without it, and are those that come with it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from cure_fast.cli.main import main

# What is asked, and whether it is answered without torch.
ASKED = {
    "--help": True,
    "--version": True,
    "train --help": True,
    "train quickstart --method trades --policies awp --help": True,
    "list": True,
    "list methods": True,
    "list recipes --json": True,
    "show trades-cifar10-wrn34-10 --toml": True,
    # What auto comes to on this machine is asked of torch.
    "show quickstart --json": False,
    "train quickstart --epz 3": True,
    "train quikstart": True,
    "train quickstart --method cure_eff --epochs 1": True,
    "compare quickstart --methods cure+pait": True,
    "eval run --batch-size 0": True,
    "export run --format onx": True,
    "analyze cka --help": True,
    "study toy --help": True,
    "analyze nosuch": True,
    "eval nowhere": False,
    "report nowhere": False,
}


def run(words, **environment):
    return subprocess.run(
        [sys.executable, "-m", "cure_fast", *words.split()],
        env={**os.environ, "COLUMNS": "80", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory):
    """A search path on which importing torch ends the program."""
    folder = tmp_path_factory.mktemp("poisoned")
    (folder / "torch.py").write_text("raise SystemExit('torch was imported')")
    return f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"


@pytest.mark.parametrize("words", ASKED)
def test_what_is_answered_without_torch_is_what_comes_with_it(words, poisoned, capsys, monkeypatch):
    done = run(words, PYTHONPATH=poisoned)
    if not ASKED[words]:
        assert "torch was imported" in done.stderr
        return
    monkeypatch.setenv("COLUMNS", "80")
    code = main(words.split())
    expected = capsys.readouterr()
    assert (done.returncode, done.stdout) == (code, expected.out)
    assert done.stderr == expected.err and (done.stdout or done.stderr)
