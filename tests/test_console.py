"""Printing goes on, or is given up, but never stops the work."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from cure_fast import console


def test_streams_that_are_absent_or_narrow_are_no_error(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    console.say("nobody hears this")
    console.warn("nor this")
    with (tmp_path / "out").open("w", encoding="ascii") as narrow:
        monkeypatch.setattr(sys, "stdout", narrow)
        console.say("Läufe \udcff")
    assert (tmp_path / "out").read_text() == "L\\xe4ufe \\udcff\n"


def test_a_warning_that_nobody_reads_is_no_error(monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as broken:
        monkeypatch.setattr(sys, "stdout", broken)
        monkeypatch.setattr(sys, "stderr", broken)
        console.say("x")
        console.warn("x")
        assert os.fstat(broken.fileno()).st_rdev == os.stat(os.devnull).st_rdev


def test_a_command_is_read_back_by_a_shell():
    folder = Path('my runs/it\'s "$HOME"')
    told = console.command("train", folder, "--resume")
    assert shlex.split(told) == ["cure-fast", "train", str(folder), "--resume"]
    assert console.command("report", Path("runs/x")) == "cure-fast report runs/x"
