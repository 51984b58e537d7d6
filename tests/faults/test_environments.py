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


RUN, CACHE = "Lauf-Größe-日本", "Ablage für später"
COMMANDS = """
import sys
from cure_fast.__main__ import main
for words in COMMANDS:
    sys.argv = ["cure-fast", *words]
    print("code", main())
"""


@pytest.fixture(scope="module")
def german(tmp_path_factory):
    """A fresh interpreter on which all is strange at once: its folder, code and output.

    Locale, TMPDIR, run folder and cache, no HOME, no standard input, no terminal, other hashes of
    strings; and no optional package can be imported, not even by torch. The locale itself may not
    be installed; what a program reads of it (the variables) is there.
    """
    work = tmp_path_factory.mktemp("strange") / "Läufe und Mäuse"
    for folder in (work, work / "tmp mit Leerzeichen"):
        folder.mkdir()
    text = f"import strange\nstrange.block(*{OPTIONAL!r})\n"
    (work / "sitecustomize.py").write_text(text, encoding="utf-8")
    words = [[*TINY, "--cache", CACHE, "--out", RUN], ["report", RUN], ["list"], ["doctor"]]
    text = f"COMMANDS = {words!r}{COMMANDS}"
    (work / "all_commands.py").write_text(text, encoding="utf-8")
    env = {
        **dict.fromkeys(("LC_ALL", "LANG", "LC_NUMERIC"), "de_DE.UTF-8"),
        "TMPDIR": str(work / "tmp mit Leerzeichen"),
        "HOME": None,
        "TERM": "dumb",
        "PYTHONHASHSEED": "7",
        "PYTHONPATH": os.pathsep.join(
            filter(
                None, [str(work), str(Path(strange.__file__).parent), os.environ.get("PYTHONPATH")]
            )
        ),
    }
    close = partial(os.close, 0)
    done = fresh([], work, env, module="all_commands", stdin=subprocess.DEVNULL, preexec_fn=close)
    return work, done.returncode, (done.stdout + done.stderr).decode()


def test_a_german_machine_with_blanks_and_umlauts(plain, german):
    work, code, output = german
    # The last one, which looks at the machine, leaves the program with its code.
    assert code == 0 and output.count("code 0\n") == 3 and "Traceback" not in output, output
    run = work / RUN
    assert f"report: {run.name}" in output and "\x1b" not in output
    for path in [run / "metrics.jsonl", run / "config.json", run / "results.json"]:
        text = path.read_text(encoding="utf-8")
        assert "0.0" in text and "0,0" not in text.replace(", 0", ""), path
    assert json.loads((run / "config.json").read_text())["attack"]["eps"] == 4 / 255
    assert "4/255" in (run / "report.html").read_text(encoding="utf-8")
    assert list((work / CACHE).rglob("model.safetensors"))


def test_the_same_seed_in_two_processes_gives_the_same_run(plain, german):
    run = german[0] / RUN
    check_same(run, plain)
    stored = [(folder / "model.safetensors").read_bytes() for folder in (run, plain)]
    assert stored[0] == stored[1]


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


# Packages that are absent or do not load.


# What is used together is not absent together; each by itself, too, with --slow.
@pytest.mark.parametrize(
    "names",
    [
        ("ffcv", "matplotlib", "wandb"),
        ("triton", "timm", "tensorboard"),
        *(pytest.param((name,), marks=pytest.mark.slow) for name in OPTIONAL),
    ],
    ids="+".join,
)
def test_packages_that_do_not_load_change_nothing(plain, tmp_path, names):
    # Left to itself the program would take FFCV, whose import needs seconds.
    words = ["--loader", "auto" if "ffcv" in names else "resident", "--tensorboard"]
    words += ["--wandb", "project"]
    prepare = partial(strange.block_with_many_images, *names)
    code, output = quick_run(plain, tmp_path, words, prepare=prepare)
    assert code == 0 and "Traceback" not in output, output
    assert same_weights(tmp_path / "run", plain)
    told = {
        "ffcv": "loader: resident: FFCV",
        "tensorboard": "warning: TensorBoard failed and is off from here",
        "wandb": "warning: Weights & Biases failed and is off from here",
    }
    assert all(told.get(name, "loader: ") in output for name in names)
    assert (tmp_path / "run/report.html").exists()


def test_a_fresh_program_without_any_of_them(german):
    output = german[2]
    assert "loader: resident: " in output and "TensorBoard failed" in output
    assert "Ready: training can run" in output
    for name, told in {
        "FFCV": "is installed but fails" if find_spec("ffcv") else "not installed",
        "Triton": "triton cannot be imported",
        "tensorboard": "--tensorboard only warns",
        "wandb": "--wandb only warns",
    }.items():
        (line,) = [line for line in output.splitlines() if line.split(" ")[0] == name]
        assert told in line


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
    """And a temporary folder, which is absent here, is not needed."""
    env = {"CUDA_VISIBLE_DEVICES": "", "TMPDIR": str(tmp_path / "none")}
    code, output = quick_run(plain, tmp_path, ["--device", "auto"], env=env)
    assert code == 0 and "on cpu" in output, output
    check_same(tmp_path / "run", plain)


def has_gpu():
    import torch

    return torch.cuda.is_available()
