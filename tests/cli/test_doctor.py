"""What `cure-fast doctor` finds out, and the command it gives for what is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import cure_fast
from cure_fast.cli import doctor as doc

ALL_PACKAGES = [
    *("g++", "pkg-config", f"python{sys.version_info.major}.{sys.version_info.minor}-dev"),
    *("libturbojpeg0-dev", "libopencv-dev", "libgl1", "libglib2.0-0"),
]


@pytest.mark.parametrize("works", [True, False])
def test_report_of_this_machine(
    works: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    monkeypatch.setattr(doc, "check_ffcv", lambda: (works, "as the set-up has found"))
    code = doc.doctor()
    lines = capsys.readouterr().out.splitlines()
    assert code == 0
    assert lines[-1].startswith("Ready: training can run on the ")
    values = dict(line.split(maxsplit=1) for line in lines if len(line.split(maxsplit=1)) == 2)
    assert values["cure_fast"] == cure_fast.__version__
    assert values["torch"] == torch.__version__.split("+")[0]
    assert values["python"].startswith(".".join(map(str, sys.version_info[:3])))
    assert values["CPU"] == f"{len(os.sched_getaffinity(0))} usable cores"
    assert (values["GPU"] == "none") == (not torch.cuda.is_available())
    assert ("To install FFCV:" in lines) == (not works)


def test_broken_torch_is_reported_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(
        "raise OSError('libtorch.so is damaged')\n", encoding="utf-8"
    )
    program = "from cure_fast.cli.doctor import doctor; raise SystemExit(doctor())"
    paths = {"PYTHONPATH": str(tmp_path), "PATH": os.environ["PATH"]}
    done = subprocess.run(
        [sys.executable, "-c", program], env=paths, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith("Not ready: torch cannot be imported (OSError: libtorch.so is damaged)")


def test_read_only_folder_stops_training(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(doc, "check_ffcv", lambda: (True, "not tried"))
    assert doc.doctor() == 2
    verdict = capsys.readouterr().out.splitlines()[-1]
    assert verdict.startswith("Not ready: runs are written below the current folder, ")
    assert verdict.endswith(", which is read-only.")


def test_missing_packages_names_all_that_is_absent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(doc.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    monkeypatch.setattr(doc, "find_library", lambda name: None)
    assert doc.missing_packages() == ALL_PACKAGES


def test_missing_packages_is_empty_where_all_is_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _put(tmp_path / "g++", "exit 0")
    _put(tmp_path / "pkg-config", '[ "$1" = --exists ]')
    (tmp_path / "Python.h").touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(doc.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    monkeypatch.setattr(doc, "find_library", lambda name: f"lib{name}.so")
    assert doc.missing_packages() == []


def test_pkg_config_without_opencv_names_opencv_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _put(tmp_path / "g++", "exit 0")
    _put(tmp_path / "pkg-config", '[ "$2" != opencv4 ]')
    (tmp_path / "Python.h").touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(doc.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    monkeypatch.setattr(doc, "find_library", lambda name: f"lib{name}.so")
    assert doc.missing_packages() == ["libopencv-dev"]


@pytest.mark.parametrize(
    ("uid", "commands", "start"),
    [
        (0, {"apt-get"}, "apt-get update && apt-get install -y --no-install-recommends a b && "),
        (
            1000,
            {"apt-get", "sudo"},
            "sudo apt-get update && sudo apt-get install -y --no-install-recommends a b && ",
        ),
        (1000, {"apt-get"}, "Ask for this to be run as root: apt-get update && apt-get install"),
        (0, set(), "Install what Debian calls a b; then run: "),
    ],
)
def test_the_mending_line(
    monkeypatch: pytest.MonkeyPatch, uid: int, commands: set[str], start: str
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    monkeypatch.setattr(shutil, "which", lambda name: name if name in commands else None)
    line = doc.mend_ffcv(["a", "b"])
    assert line.startswith(start)
    assert line.endswith("ffcv==1.0.2 'setuptools>=69'")
    assert f"{sys.executable} -m pip install " in line
    assert "\n" not in line
    assert doc.mend_ffcv([]).startswith(sys.executable)


@pytest.mark.slow  # the set-up has tried the same
def test_ffcv_works_where_it_is_installed() -> None:
    if doc.package_version("ffcv") is None:
        pytest.skip("ffcv is not installed")
    works, detail = doc.check_ffcv()
    assert works, detail


def test_ffcv_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doc, "package_version", lambda name: None)
    assert doc.check_ffcv() == (False, "not installed")


def test_ffcv_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doc, "package_version", lambda name: "1.0.2")
    monkeypatch.setattr(doc, "FFCV_PROBE", "import lib_gl_is_missing")
    works, detail = doc.check_ffcv()
    assert not works
    assert "No module named 'lib_gl_is_missing'" in detail


def test_a_probe_reports_how_it_ended() -> None:
    assert doc.run_probe("print('fine')") == ""
    assert doc.run_probe("1 / 0") == "ZeroDivisionError: division by zero"
    abort = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert doc.run_probe(abort) == "ended with code -9"


def test_a_hanging_probe_ends_with_its_children(tmp_path: Path) -> None:
    """The grandchild holds the pipe, as FFCV's writer processes do when a sample raises."""
    child = "import subprocess, time; p = subprocess.Popen(['sleep', '600']); "
    child += "open('pid', 'w').write(str(p.pid)); time.sleep(600)"
    program = f"import os; os.chdir({str(tmp_path)!r}); {child}"
    begun = time.monotonic()
    assert doc.run_probe(program, seconds=2) == "no answer in 2 s"
    assert time.monotonic() - begun < 120
    state = Path("/proc", (tmp_path / "pid").read_text(encoding="utf-8"), "stat")
    # A killed process ends when it next runs, which takes a while on a busy machine.
    deadline = time.monotonic() + 120
    while state.exists() and state.read_text(encoding="utf-8").split()[2] != "Z":
        assert time.monotonic() < deadline, "the child was left behind"
        time.sleep(0.05)


def test_memory_is_the_smaller_of_machine_and_container(tmp_path: Path) -> None:
    machine = doc.memory_limit(tmp_path / "absent")
    limit = tmp_path / "memory.max"
    limit.write_text("max\n", encoding="ascii")
    assert doc.memory_limit(limit) == machine
    limit.write_text(f"{2**30}\n", encoding="ascii")
    assert doc.memory_limit(limit) == 2**30
    limit.write_text(f"{2**60}\n", encoding="ascii")
    assert doc.memory_limit(limit) == machine


def test_little_shared_memory_is_pointed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=64 * 2**20))
    assert doc.shared_memory() == (
        "64 MiB free; little for loader processes (in a container, start it with --shm-size=2g)"
    )
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**31))
    assert doc.shared_memory() == "2,048 MiB free"


def test_a_gpu_that_torch_cannot_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doc, "nvidia_driver", lambda: "450.1")
    lines, note = doc.find_gpus()
    assert lines == []
    assert "driver 450.1 sees one" in note
    monkeypatch.setattr(doc, "nvidia_driver", lambda: None)
    assert doc.find_gpus() == ([], "none")


@pytest.mark.gpu
def test_a_gpu_is_described_and_compiled_for() -> None:
    lines, problem = doc.find_gpus()
    assert lines and problem == ""
    assert all("compute" in line and "driver" in line for line in lines)
    assert doc.check_triton(on_gpu=True) == "compiles for this GPU"


def test_triton_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "interpreter" in doc.check_triton(on_gpu=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert doc.check_triton(on_gpu=False).startswith("triton cannot be imported")


def _put(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
    path.chmod(0o755)
