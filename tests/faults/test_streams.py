"""Streams that nobody reads, that are closed, full or no terminal.

Most of it is tested in processes forked from one that has imported torch already.
"""

from __future__ import annotations

import errno
import json
import shlex
import subprocess
import sys

import pytest

import strange
from cure_fast.cli.main import main
from environments import QUICK, check_same, fresh, quick_run
from processes import finish


def test_head_reads_a_line_and_the_run_is_finished(plain, tmp_path):
    """What `cure-fast train ... | head -1` does to the program."""
    code, output = quick_run(plain, tmp_path, prepare=strange.read_by_head)
    assert code == 0 and "Traceback" not in output, output
    (first,) = (tmp_path / "head").read_text(encoding="utf-8").splitlines()
    assert first.startswith("cure-fast 0.1.0: resnet-small on digits")
    assert output.count("standard output failed") == 1
    check_same(tmp_path / "run", plain)
    assert (tmp_path / "run/results.json").exists() and (tmp_path / "run/report.html").exists()


def test_commands_that_nobody_reads_do_their_work(plain, tmp_path):
    """Standard output and error have no reader: nothing printed is a reason to stop."""
    prepare = strange.broken_pipes
    code, output = quick_run(plain, tmp_path, prepare=prepare)
    assert code == 0 and not output
    check_same(tmp_path / "run", plain)
    (tmp_path / "run/report.html").unlink()
    assert finish(["report", "run"], tmp_path, prepare=prepare) == (0, "")
    assert (tmp_path / "run/report.html").exists()
    words = ["eval", "run", "--attacks", "natural,fgsm", "--limit", "20", "--device", "cpu"]
    assert finish(words, tmp_path, prepare=prepare) == (0, "")
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert "fgsm" in results["models"]["trained"]["attacks"]
    words = ["export", "run", "--format", "safetensors"]
    assert finish(words, tmp_path, prepare=prepare) == (0, "")
    assert list((tmp_path / "run/export").glob("*.safetensors"))
    # An error keeps its code.
    assert finish([*QUICK, "--lr", "x"], tmp_path, prepare=prepare) == (2, "")


@pytest.mark.parametrize("words", [["list"], ["show", "quickstart"], ["--help"]])
def test_printing_to_nobody_is_no_error(tmp_path, words):
    assert finish(words, tmp_path, prepare=strange.broken_pipes) == (0, "")


def test_a_pipe_that_breaks_inside_the_work_is_an_error(monkeypatch, capsys):
    """Such as that to a child: only where output is all there is may its end be a success."""

    def broken(*_arguments: object, **_settings: object) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("cure_fast.training.job.train", broken)
    assert main(["train", "quickstart"]) == 2
    assert capsys.readouterr().err.startswith("cure-fast: Broken pipe. A program that was to read")


def test_output_into_a_full_disk_is_an_error_where_output_is_all(tmp_path):
    with open("/dev/full", "w") as full:
        done = fresh(["list"], tmp_path, stdout=full, stderr=subprocess.PIPE, capture_output=False)
    error = done.stderr.decode()
    assert done.returncode == 2 and "No space left" in error and error.count("\n") == 1, error


def test_closed_streams_do_not_end_training(plain, tmp_path):
    """What `cure-fast train ... <&- >&- 2>&-` does: the descriptors are free for other files."""
    code, output = quick_run(plain, tmp_path, prepare=strange.close_streams)
    assert code == 0 and not output
    check_same(tmp_path / "run", plain)
    assert (tmp_path / "run/report.html").exists()


def test_python_has_no_streams_where_there_are_none():
    """So a process that closes them is what a fresh interpreter would be."""
    text = "import sys; sys.exit(not (sys.stdin is sys.stdout is sys.stderr is None))"
    words = shlex.join([sys.executable, "-S", "-c", text])
    assert subprocess.run(["sh", "-c", f"{words} <&- >&- 2>&-"], check=False).returncode == 0


def test_list_into_a_reader_that_leaves(tmp_path):
    code, output = finish(["list"], tmp_path, prepare=strange.broken_pipe)
    assert code == 0 and not output


def test_a_run_without_a_terminal_draws_no_bar(plain):
    printed = (plain.parent / "stdout").read_bytes().decode()
    assert "report: plain" in printed and "\r" not in printed and "\x1b" not in printed
    assert (plain.parent / "stderr").read_bytes() == b""
