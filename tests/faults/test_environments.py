"""Strange machines: clock, locale, paths, absent packages, absent GPUs.

What Python reads once at its start (locale, import hooks) is tested in a fresh interpreter, one
for many things at once; the rest in processes forked from one that has imported torch already.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest

import strange
from cure_fast.runs.log import read_rows
from environments import QUICK, TINY, check_same, fresh, quick_run
from processes import finish
from tiny_job import same_weights

OPTIONAL = ("ffcv", "triton", "timm", "matplotlib", "tensorboard", "wandb")


# Clock.


def test_a_clock_that_is_set_back_changes_nothing(plain, tmp_path):
    code, output = quick_run(plain, tmp_path, ["--tensorboard"], prepare=strange.jumping_clock)
    assert code == 0 and "Traceback" not in output, output
    check_same(tmp_path / "run", plain)
    seconds = [row["seconds"] for row in read_rows(tmp_path / "run/metrics.jsonl")[-1:]]
    assert 0 < seconds[0] < 60
    results = json.loads((tmp_path / "run/results.json").read_text())
    attacks = results["models"]["trained"]["attacks"].values()
    assert all(0 <= attack["seconds"] < 60 for attack in attacks)


# Locale, paths and home.


def test_a_german_machine_with_blanks_and_umlauts(plain, tmp_path):
    """All at once: locale, TMPDIR, run folder and cache, no HOME, no standard input, no terminal.

    The locale itself may not be installed; what a program reads of it (the variables) is there.
    """
    work = tmp_path / "Läufe und Mäuse"
    for name in (work, work / "tmp mit Leerzeichen"):
        name.mkdir()
    env = {
        **dict.fromkeys(("LC_ALL", "LANG", "LC_NUMERIC"), "de_DE.UTF-8"),
        "TMPDIR": str(work / "tmp mit Leerzeichen"),
        "HOME": None,
        "TERM": "dumb",
    }
    words = [*TINY, "--cache", "Ablage für später", "--out", "Lauf-Größe-日本", "--eps", "4/255"]
    done = fresh(words, work, env, stdin=subprocess.DEVNULL, preexec_fn=partial(os.close, 0))
    output = (done.stdout + done.stderr).decode()
    assert done.returncode == 0 and "Traceback" not in output, output
    run = work / "Lauf-Größe-日本"
    assert f"report: {run.name}" in output and "\x1b" not in output
    for path in [run / "metrics.jsonl", run / "config.json", run / "results.json"]:
        text = path.read_text(encoding="utf-8")
        assert "0.0" in text and "0,0" not in text.replace(", 0", ""), path
    assert json.loads((run / "config.json").read_text())["attack"]["eps"] == 4 / 255
    assert "4/255" in (run / "report.html").read_text(encoding="utf-8")
    assert list((work / "Ablage für später").rglob("model.safetensors"))


def test_a_number_with_a_comma_is_refused_in_any_locale(tmp_path):
    code, output = finish([*QUICK, "--eps", "0,1"], tmp_path, env={"LC_ALL": "de_DE.UTF-8"})
    assert code == 2 and "Traceback" not in output and "--eps" in output


def test_without_a_home_the_default_cache_is_the_accounts(tmp_path):
    """The command falls back on the account's folder; where that is absent too, it says so."""
    words = ["show", "quickstart"]
    code, output = finish(words, tmp_path, env={"HOME": None}, prepare=strange.no_account)
    assert code == 0, output
    code, output = finish(QUICK, tmp_path, env={"HOME": None}, prepare=strange.no_account)
    assert code == 2 and "Traceback" not in output, output
    assert "home" in output.lower() and "--cache" in output


def test_a_temporary_folder_that_is_absent_is_not_needed(plain, tmp_path):
    code, output = quick_run(plain, tmp_path, env={"TMPDIR": str(tmp_path / "none")})
    assert code == 0, output
    check_same(tmp_path / "run", plain)


# Packages that are absent or do not load.


@pytest.mark.parametrize("name", OPTIONAL)
def test_a_package_that_does_not_load_changes_nothing(plain, tmp_path, name):
    # Left to itself the program would take FFCV, whose import needs seconds.
    words = ["--loader", "auto" if name == "ffcv" else "resident", "--tensorboard"]
    words += ["--wandb", "project"]
    code, output = quick_run(plain, tmp_path, words, prepare=partial(strange.block, name))
    assert code == 0 and "Traceback" not in output, output
    assert same_weights(tmp_path / "run", plain)
    told = {
        "ffcv": "loader: resident: FFCV",
        "tensorboard": "warning: TensorBoard failed and is off from here",
        "wandb": "warning: Weights & Biases failed and is off from here",
    }
    assert told.get(name, "loader: ") in output
    assert (tmp_path / "run/report.html").exists()


def test_a_fresh_program_without_any_of_them(plain, tmp_path):
    """One interpreter in which no optional package can be imported, not even by torch."""
    site = tmp_path / "site"
    site.mkdir()
    text = f"import strange\nfor name in {OPTIONAL!r}:\n    strange.block(name)\n"
    (site / "sitecustomize.py").write_text(text, encoding="utf-8")
    path = os.pathsep.join([str(site), str(Path(strange.__file__).parent)])
    cache = str(plain.parent / "cache")
    code = (
        "from cure_fast.cli.main import main\n"
        f"codes = [main({TINY!r} + ['--cache', {cache!r}, '--out', 'run'])]\n"
        "codes += [main(['report', 'run']), main(['list'])]\n"
        "print('codes', codes)\n"
        "main(['doctor'])\n"
    )
    (site / "all_commands.py").write_text(code, encoding="utf-8")
    done = fresh([], tmp_path, {"PYTHONPATH": path}, module="all_commands")
    output = (done.stdout + done.stderr).decode()
    assert "codes [0, 0, 0]" in output and "Traceback" not in output, output
    assert "loader: resident: FFCV" in output and "TensorBoard failed" in output
    assert done.returncode == 0 and "Ready: training can run" in output
    for name, told in {
        "FFCV": "is installed but fails" if find_spec("ffcv") else "not installed",
        "Triton": "triton cannot be imported",
        "tensorboard": "--tensorboard only warns",
        "wandb": "--wandb only warns",
    }.items():
        (line,) = [line for line in output.splitlines() if line.split(" ")[0] == name]
        assert told in line
    assert same_weights(tmp_path / "run", plain)


# GPUs that are not there.


@pytest.mark.parametrize("visible", [None, "", "99"])
@pytest.mark.parametrize("device", ["cuda", "cuda:3"])
def test_a_gpu_that_is_absent_is_refused_with_advice(plain, tmp_path, device, visible):
    if visible is None and device == "cuda" and has_gpu():
        pytest.skip("this machine has the GPU that should be absent")
    env = {"CUDA_VISIBLE_DEVICES": visible}
    began = time.monotonic()
    code, output = quick_run(plain, tmp_path, ["--device", device], env=env)
    # The opening line, and the error.
    assert code == 2 and output.count("\n") == 2, output
    assert f"--device {device}" in output and "cpu" in output and "cure-fast doctor" in output
    assert not (tmp_path / "run").exists() and time.monotonic() - began < 30
    weights = str(plain / "model.safetensors")
    code, output = finish(["eval", weights, "--device", device], tmp_path, env=env)
    assert code == 2 and output.count("\n") == 1 and f"--device {device}" in output, output


def test_auto_takes_the_processor_where_no_gpu_is_visible(plain, tmp_path):
    env = {"CUDA_VISIBLE_DEVICES": ""}
    code, output = quick_run(plain, tmp_path, ["--device", "auto"], env=env)
    assert code == 0 and "on cpu" in output, output
    check_same(tmp_path / "run", plain)


def has_gpu():
    import torch

    return torch.cuda.is_available()
