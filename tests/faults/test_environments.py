"""Strange machines: clock, locale, paths, streams, absent packages, absent GPUs.

What Python reads once at its start (locale, streams, import hooks) is tested in a fresh
interpreter, one for many things at once; the rest in processes forked from one that has imported
torch already.
"""

from __future__ import annotations

import errno
import json
import os
import shlex
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

import strange
from cure_fast.cli import main
from cure_fast.log import read_rows
from processes import finish, start
from tiny_job import same_weights, stable_rows

TINY = (
    "train quickstart --train-images 60 --val-images 20 --width 4 --pretrain-epochs 1 --epochs 1 "
    "--batch-size 30 --attack-steps 1 --attacks natural,pgd2 --eval-step-size 0.1 --limit 20 "
    "--val-attack-steps 1 --device cpu --log-every 1"
).split()
QUICK = [*TINY, "--loader", "resident", "--no-tensorboard"]
OPTIONAL = ("ffcv", "triton", "timm", "matplotlib", "tensorboard", "wandb")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run with nothing strange about it; the others take their natural start from its cache."""
    base = tmp_path_factory.mktemp("environments")
    code, output = finish([*QUICK, "--cache", str(base / "cache"), "--out", "plain"], base)
    assert code == 0, output
    return base / "plain"


def quick_run(plain, tmp_path, words=(), **options):
    """Run the command of `plain` in another way; return exit code and output."""
    cache = str(plain.parent / "cache")
    return finish([*QUICK, "--cache", cache, "--out", "run", *words], tmp_path, **options)


def check_same(folder, plain):
    assert same_weights(folder, plain) and stable_rows(folder) == stable_rows(plain)


def fresh(words, cwd, env=None, *, module="cure_fast", **options):
    """Run the command line in a new interpreter; `env` as for `processes.start`."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    return subprocess.run(
        [sys.executable, "-m", module, *words],
        cwd=cwd,
        env={name: value for name, value in variables.items() if value is not None},
        timeout=120,
        check=False,
        **{"capture_output": True, **options},
    )


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


# Locale, paths, home and streams, in a fresh interpreter.


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


def test_a_reader_that_leaves_does_not_end_training(plain, tmp_path):
    """What `cure-fast train ... | head -1` does to the program."""
    code, output = quick_run(plain, tmp_path, prepare=strange.broken_pipe)
    assert code == 0 and "Traceback" not in output, output
    assert output.count("standard output failed") == 1
    check_same(tmp_path / "run", plain)
    assert (tmp_path / "run/report.html").exists()


def test_head_reads_a_line_and_the_run_is_finished(plain, tmp_path):
    """In a shell, where Python writes each line at once."""
    cache = str(plain.parent / "cache")
    program = shlex.join([sys.executable, "-m", "cure_fast"])
    words = shlex.join([*QUICK, "--cache", cache, "--out", "run"])
    done = subprocess.run(
        ["bash", "-c", f"{program} {words} | head -1; echo ${{PIPESTATUS[0]}}"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        timeout=120,
        check=False,
        capture_output=True,
        text=True,
    )
    first, code = done.stdout.splitlines()
    assert first.startswith("data: digits") and code == "0", done.stderr
    assert done.stderr.count("standard output failed") == 1 and "Traceback" not in done.stderr
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
    words = ["eval", "run", "--attacks", "natural,fgsm", "--device", "cpu"]
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

    monkeypatch.setattr("cure_fast.job.train", broken)
    assert main(["train", "quickstart"]) == 2
    assert capsys.readouterr().err.startswith("cure-fast: Broken pipe. A program that was to read")


def test_output_into_a_full_disk_is_an_error_where_output_is_all(tmp_path):
    with open("/dev/full", "w") as full:
        done = fresh(["list"], tmp_path, stdout=full, stderr=subprocess.PIPE, capture_output=False)
    error = done.stderr.decode()
    assert done.returncode == 2 and "No space left" in error and error.count("\n") == 1, error


def test_closed_streams_do_not_end_training(plain, tmp_path):
    """What `cure-fast train ... <&- >&- 2>&-` does: the descriptors are free for other files."""
    cache = str(plain.parent / "cache")
    words = [*QUICK, "--cache", cache, "--out", "run"]
    done = fresh(
        words, tmp_path, preexec_fn=strange.close_streams, stdout=None, stderr=None,
        capture_output=False,
    )  # fmt: skip
    assert done.returncode == 0
    check_same(tmp_path / "run", plain)
    assert (tmp_path / "run/report.html").exists()


def test_list_into_a_reader_that_leaves(tmp_path):
    code, output = finish(["list"], tmp_path, prepare=strange.broken_pipe)
    assert code == 0 and not output


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
        "from cure_fast.cli import main\n"
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
        "FFCV": "is installed but fails",
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
    assert code == 2 and output.count("\n") == 1, output
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


def test_a_run_without_a_terminal_draws_no_bar(plain, tmp_path):
    running = start([*QUICK, "--cache", str(plain.parent / "cache"), "--out", "run"], tmp_path)
    assert running.wait() == 0
    assert running.stderr() == "" and "\r" not in running.stdout()
    assert "\x1b" not in running.stdout()
