"""The command line as a user meets it: help, lists, wrong input, exit codes, evaluation, report."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import is_dataclass
from functools import partial
from inspect import Parameter, signature
from pathlib import Path
from typing import Literal

import pytest

import strange
from cure_fast.cli.configure import read_config
from cure_fast.cli.flags import flags_of, parameters, read_flags
from cure_fast.cli.main import COMMANDS, main
from cure_fast.config.values import convert
from cure_fast.methods import METHODS
from cure_fast.policies import POLICIES
from processes import finish, start
from tiny_job import same_weights

TINY = (
    "--train-images 60 --val-images 20 --width 4 --pretrain-epochs 1 --epochs 1 --batch-size 30 "
    "--attack-steps 1 --step-size 0.15 --val-attack-steps 1 --attacks natural,pgd2 "
    "--eval-step-size 0.1 --limit 20 --loader resident --device cpu --no-tensorboard"
).split()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("command", ["", *COMMANDS, "train quickstart"])
def test_help(command, capsys):
    assert main([*command.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert "Usage: cure-fast" in text
    flags = {}
    for name, kind in parameters(COMMANDS[command]).items() if command in COMMANDS else ():
        flags |= flags_of(kind) if is_dataclass(kind) else {name: kind}
    given = signature(COMMANDS[command]).parameters if flags else {}
    words = {name for name, one in given.items() if one.kind is not Parameter.KEYWORD_ONLY}
    assert not [name for name in flags.keys() - words if f"--{name.replace('_', '-')}" not in text]


@pytest.mark.parametrize("name", ["overfitting", "cka"])
def test_help_of_an_analysis_has_its_flags_and_where_to_write(name, capsys):
    assert main(["analyze", name, "--help"]) == 0
    text = capsys.readouterr().out
    assert "--out" in text and ("--limit" in text) == (name == "cka")
    assert ("--training" if name == "overfitting" else "--layers") in text


@pytest.mark.parametrize("command", ["compare", "sweep", "study layerwise"])
def test_help_lists_no_flag_that_each_run_has_of_its_own(command, capsys):
    assert main([*command.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert "--seed " not in text and "Folder for the runs" in text and "--epochs" in text
    assert ("--method " in text) == (command == "sweep")


def test_every_flag_has_help(capsys):
    assert main(["train", "quickstart", "--help"]) == 0
    text = capsys.readouterr().out
    config = read_config("quickstart", [], "x", {})[0]
    for section in ("settings", "data", "model", "pretrain", "attack", "optim", "eval", "run"):
        for name in vars(getattr(config, section)):
            assert f"--{name.replace('_', '-')}" in text, name
    assert "--resume" in text and "Exit codes" in text and "Handwritten digits" in text
    assert "--policies" in text and "--regime" in text and "--awp-gamma" not in text


def test_help_shows_the_flags_of_the_policies_that_are_named(capsys):
    assert main(["train", "quickstart", "--policies", "awp,piat", "--help"]) == 0
    text = capsys.readouterr().out
    assert (
        "Policy awp" in text
        and "Policy piat" in text
        and "--awp-gamma" in text
        and "--piat-share" in text
    )


def test_list_names_everything(capsys):
    assert main(["list"]) == 0
    text = capsys.readouterr().out
    for name in (
        "quickstart",
        "svhn-resnet18",
        "cure_official",
        "pgd_at",
        "wrn34-10",
        "digits",
        "aa",
    ):
        assert name in text
    for policy in POLICIES.values():
        assert f"  {policy.name} " in text and policy.title in text and policy.paper in text


def test_list_of_methods_has_paper_cost_needs_and_result(capsys):
    assert main(["list", "methods"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = {words[0]: " ".join(words) for words in lines if words}
    assert rows["pgd_at"] == "pgd_at Madry et al., ICLR 2018 33 1.00 82.78 / 51.30 / 44.63 -"
    assert "2024 43 1.30 86.76 / 54.92 / 49.69 a natural start, network revision" in rows["cure"]
    assert "2024 3 to 43 1.30" in rows["cure_eff"] and METHODS.keys() <= rows.keys()


def test_list_of_policies_counts_what_each_adds(capsys):
    assert main(["list", "policies"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "awp Wu, Xia and Wang, NeurIPS 2020 36 1.09 AWP: " in text


def test_list_of_recipes_has_those_of_methods_which_the_overview_names_once(capsys):
    assert main(["list", "recipes"]) == 0
    assert "  trades-cifar10-wrn34-10 " in capsys.readouterr().out
    assert main(["list"]) == 0
    text = capsys.readouterr().out
    assert "trades-cifar10" not in text and "METHOD-DATA-MODEL" in text


def test_show_prints_values_and_alternatives(capsys):
    assert main(["show", "cifar10-wrn34-10", "--method", "cure_official", "--eps", "4/255"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--percentile 50" in text and "--score signed or abs, abs_of_sum" in text
    # The code's 0.007 within 0.031, for this radius; and the evaluation is within it too.
    assert "--eps 4/255" in text and "--step-size 0.00354206 [--step-share of --eps]" in text
    assert "--eval-eps 4/255 [--eps]" in text and "--rgp True or False" in text
    assert "policy:" not in text


def test_show_prints_policies_and_their_settings(capsys):
    words = ["show", "quickstart", "--method", "trades", "--policies", "piat,awp"]
    assert main([*words, "--awp-gamma", "0.01"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "policy: piat (PIAT: " in text and "policy: awp (AWP: " in text
    assert "awp --awp-gamma 0.01 [given] --awp-warmup 0" in text
    assert "--piat-buffers interpolate or keep" in text


def test_what_a_run_goes_without_is_none_on_the_command_line_too(capsys):
    """A choice of that name is not the absence of one: an evaluation of weights alone has both."""
    assert main(["show", "quickstart", "--policies", "piat", "--lr-factors", "0.5,0.1"]) == 0
    assert main(["show", "quickstart", "--policies", "none", "--lr-factors", "none"]) == 0
    before, after = capsys.readouterr().out.split("name: ")[1:]
    assert "--piat" in before and "--piat" not in after
    absent = [line.split()[0] for line in after.splitlines() if line[29:].split()[:1] == ["none"]]
    assert {"--aux", "--lr-factors", "--clip-grad", "--teacher", "--wandb"} <= {*absent}
    flags = {"normalize": Literal["none", "dataset"] | None, "aux": str | None}
    words = ["--normalize", "none", "--aux", "none"]
    assert read_flags(words, flags) == {"normalize": "none", "aux": None}
    assert convert("normalize", flags["normalize"], "none") == "none"
    assert convert("aux", flags["aux"], "none") is None


def test_flags_reach_every_section():
    words = (
        "--epochs 7 --batch-size 32 --model wrn28-10 --width 2 --method trades --beta 3 "
        "--data-root x --train-images 500 --attack-steps 4 --eps 8/255 --device cpu --seed 5 "
        "--out y --milestones 0.2,1/2 --attacks natural,aa --no-flip"
    ).split()
    config = read_config("cifar10-resnet18", words, "x", {})[0]
    assert (config.optim.epochs, config.optim.batch_size, config.model.model) == (7, 32, "wrn28-10")
    assert (config.model.width, config.method, config.settings.beta) == (2, "trades", 3)
    assert (config.data.data_root, config.data.train_images, config.data.flip) == ("x", 500, False)
    assert (config.attack.attack_steps, config.attack.eps) == (4, 8 / 255)
    assert (config.run.device, config.run.seed, config.run.out) == ("cpu", 5, "y")
    assert config.optim.milestones == (0.2, 0.5) and config.eval.attacks == ("natural", "aa")


WRONG = {
    "train": "recipe",
    "train quikstart": "Perhaps you meant quickstart",
    "train quickstart --epochs many": "--epochs",
    "train quickstart --epochs 0": "--epochs",
    "train quickstart --epsilon 3": "--eps",
    "train quickstart --eps 8": "--eps",
    "train quickstart --eps 8/0": "zero",
    "train quickstart --method cuer": "Perhaps you meant cure",
    "train quickstart --model resnet19": "resnet18",
    "train quickstart --data digit": "digits",
    "train quickstart --data folder:nowhere": "nowhere",
    "train quickstart --attacks pgd": "pgd20",
    "train quickstart --device tpu": "--device",
    "train quickstart --device cuda:99": "usable GPUs",
    "train quickstart --loader resident --init-from none.safetensors": "none.safetensors",
    "train quickstart --val-images 1430": "--val-images",
    "train quickstart --train-images 100000": "--train-images",
    "train quickstart --method cure_eff --epochs 1": "--natural-share",
    "train quickstart --loader resident --no-revision --networks revision": "no network 'revision'",
    "train quickstart --policies swaa": "piat, awp",
    "train quickstart --policies piat,piat": "--policies piat",
    "train quickstart --awp-gamma 1": "--policies awp",
    "train quickstart --beta 1 --method pgd_at": "beta",
    "train quickstart --resume": "no run",
    "train cifar10-resnet18 --no-download --data-root empty": "empty",
    "eval nowhere": "nowhere",
    "eval .": "config.json",
    "report .": "config.json",
    "fly": "train, compare",
    "data write nothing": "digits",
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_input_exits_with_2_and_says_what_was_expected(words, folder, capsys):
    try:
        code = main(
            [
                *words.split(),
                *(
                    ["--out", "run"]
                    if "resume" not in words and words.startswith("train q")
                    else []
                ),
            ]
        )
    except SystemExit as stop:
        code = stop.code
    output = capsys.readouterr()
    # The parser wraps its boxes at the width of the terminal.
    text = " ".join((output.err + output.out).replace("│", " ").split())
    assert code == 2 and WRONG[words] in text and "Traceback" not in text
    if "init-from" not in words:
        assert not Path("run").exists()


def test_train_eval_and_report_on_a_run(folder, capsys):
    assert main(["train", "quickstart", "--out", "run", *TINY]) == 0
    assert "report: run/report.html" in capsys.readouterr().out
    assert json.loads(Path("run/environment.json").read_text())["precision"] == "float32"
    # An attack that the record does not hold goes into it, with its own count.
    assert main(["eval", "run", "--attacks", "fgsm", "--limit", "10"]) == 0
    results = json.loads(Path("run/results.json").read_text())
    for model in ("trained", "start"):
        attacks = results["models"][model]["attacks"]
        assert list(attacks) == ["natural", "pgd2", "fgsm"]
        assert [attacks[name]["count"] for name in attacks] == [20, 20, 10]
    Path("run/report.html").unlink()
    assert main(["report", "run"]) == 0 and Path("run/report.html").exists()


def test_a_run_in_bfloat16_says_so_in_its_record_and_in_tables(folder):
    assert main(["train", "quickstart", "--out", "run", "--amp", "bf16", *TINY]) == 0
    assert json.loads(Path("run/environment.json").read_text())["precision"] == "bfloat16"
    assert main(["compare", "run", "--out", "tables"]) == 0
    assert "| eager | bfloat16 | " in Path("tables/comparison.md").read_text()


def test_a_run_folder_serves_as_recipe_and_resumes(folder, capsys):
    assert main(["train", "quickstart", "--out", "run", *TINY]) == 0
    assert main(["show", "run", "--epochs", "9"]) == 0
    assert "--epochs 9" in " ".join(capsys.readouterr().out.split())
    assert main(["train", "run", "--resume"]) == 0
    assert main(["train", "run"]) == 2
    assert main(["train", "run", "--resume", "--lr", "0.01"]) == 2
    assert "optim.lr" in capsys.readouterr().err


def test_runs_without_out_get_a_folder_of_their_own(folder):
    short = [*TINY, "--pretrain-epochs", "0", "--attacks", "natural"]
    assert main(["train", "quickstart", *short]) == 0
    assert main(["train", "quickstart", *short]) == 0
    assert {p.name for p in Path("runs").iterdir()} == {
        "digits-resnet-small-cure-s0",
        "digits-resnet-small-cure-s0-2",
    }


def test_policies_name_the_folder_that_resume_finds(folder, capsys):
    short = [*TINY, "--pretrain-epochs", "0", "--attacks", "natural"]
    words = ["train", "quickstart", "--method", "trades", "--policies", "piat,awp", *short]
    assert main(words) == 0
    assert main(["train", "quickstart", "--method", "piat_nmse", *short]) == 0
    names = {"trades+piat+awp-s0", "piat_nmse+piat-s0"}
    assert {p.name for p in Path("runs").iterdir()} == {f"digits-resnet-small-{n}" for n in names}
    assert main([*words, "--resume"]) == 0
    assert "resumed" in capsys.readouterr().out
    # The same method with another set is another run.
    assert main([*words, "--policies", "piat", "--resume"]) == 2
    assert "no run in runs/digits-resnet-small-trades+piat-s0" in capsys.readouterr().err


def test_eval_of_a_file_uses_what_the_file_says(folder, capsys):
    assert main(["train", "quickstart", "--out", "run", *TINY]) == 0
    words = ["eval", "run/model.safetensors", "--attacks", "natural", "--limit", "15"]
    assert main([*words, "--out", "evaluated"]) == 0
    results = json.loads(Path("evaluated/results.json").read_text())
    entry = results["models"]["model"]["attacks"]["natural"]
    assert entry["count"] == 15 and results["model"] == "resnet-small" and results["eps"] == 0.15


def test_ctrl_c_saves_exits_with_75_and_resumes(folder):
    words = ["train", "quickstart", "--out", "run", *TINY, "--epochs", "5000"]
    run = start(words, folder)
    run.wait_for("train epoch   2/")
    run.signal(signal.SIGINT)
    assert run.wait() == 75, run.output()
    errors = run.stderr()
    assert "--resume" in errors and "Traceback" not in errors
    step = max(int(p.name.split("-")[1]) for p in Path("run/checkpoints").glob("checkpoint-*"))
    assert step > 0


def test_a_closed_pipe_is_no_error(folder):
    result = subprocess.run(
        f"{sys.executable} -m cure_fast list | head -1",
        shell=True,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout.startswith("Recipes") and result.stderr == ""


def test_out_of_memory_exits_with_4_and_advice(folder, monkeypatch, capsys):
    import torch

    from cure_fast.training import job

    def exhausted(*arguments):
        raise torch.OutOfMemoryError("tried to allocate 80 GiB.")

    monkeypatch.setattr(job, "train_stage", exhausted)
    assert main(["train", "quickstart", "--out", "run", *TINY]) == 4
    assert "--batch-size" in capsys.readouterr().err


def test_divergence_exits_with_3(folder, capsys):
    words = [*TINY, "--epochs", "30", "--lr", "1000", "--schedule", "constant"]
    assert main(["train", "quickstart", "--out", "run", *words]) == 3
    assert "--lr" in capsys.readouterr().err


def test_training_works_without_torchvision(folder):
    words = ["train", "quickstart", "--out", "run", *TINY]
    code, output = finish(words, folder, prepare=partial(strange.block, "torchvision"))
    assert code == 0 and "Traceback" not in output, output


@pytest.mark.slow  # FFCV compiles; each loader's batches are compared in the loaders' tests
def test_data_write_makes_the_file_from_which_the_same_weights_are_trained(folder, capsys):
    pytest.importorskip("ffcv", reason="FFCV is not installed")
    words = "--train-images 60 --val-images 20 --cache kept".split()
    assert main(["data", "write", "digits", *words]) == 0
    (path,) = Path("kept/ffcv").glob("*.beton")
    assert str(path) in capsys.readouterr().out
    assert main(["train", "quickstart", "--out", "run", *TINY, "--loader", "ffcv", *words]) == 0
    assert list(Path("kept/ffcv").glob("*.beton")) == [path]
    assert main(["train", "quickstart", "--out", "resident", *TINY, *words]) == 0
    assert same_weights(Path("run"), Path("resident"))


def test_data_write_makes_the_file_that_training_asks_for(folder, monkeypatch, capsys):
    pytest.importorskip("ffcv", reason="FFCV is not installed")
    from cure_fast.errors import StoppedError
    from cure_fast.training import job

    def stopped(*arguments):
        raise StoppedError("stopped by a signal")

    words = "--train-images 60 --val-images 20 --cache kept".split()
    assert main(["data", "write", "digits", *words]) == 0
    (path,) = Path("kept/ffcv").glob("*.beton")
    assert str(path) in capsys.readouterr().out
    monkeypatch.setattr(job, "run_stages", stopped)
    assert main(["train", "quickstart", "--out", "run", *TINY, "--loader", "ffcv", *words]) == 75
    assert str(path) in capsys.readouterr().out
    assert list(Path("kept/ffcv").glob("*.beton")) == [path]


def test_a_closed_stop_names_the_command_that_continues(folder, monkeypatch, capsys):
    from cure_fast.errors import StoppedError
    from cure_fast.training import job

    def stopped(*arguments):
        raise StoppedError("stopped by a signal")

    monkeypatch.setattr(job, "train_stage", stopped)
    assert main(["train", "quickstart", "--out", "run", *TINY]) == 75
    assert "continue with: cure-fast train run --resume" in capsys.readouterr().err
