"""``sweep``: a grid of flags is a comparison, whose runs are made as any other's."""

from __future__ import annotations

import csv
import shlex
from pathlib import Path

from cure_fast.cli.configure import read_config
from cure_fast.cli.main import main
from cure_fast.cli.sweep import read_grid, read_sweep
from cure_fast.training import compare

SWITCHES = {"grid": str, "seeds": int, "jobs": int, "list": bool}
BUDGET = (
    "--train-images 60 --val-images 20 --width 4 --pretrain-epochs 0 --epochs 1 --batch-size 30 "
    "--attack-steps 1 --step-size 0.15 --val-attack-steps 1 --attacks natural,pgd2 "
    "--eval-step-size 0.1 --limit 20 --loader resident --device cpu --no-tensorboard --cache cache"
).split()


def read(grid, *words):
    return read_sweep("quickstart", ["--grid", grid, *words], SWITCHES)[0]


def test_a_grid_is_an_entry_for_each_combination():
    sweep = read("lr=0.05,0.1;method=trades,pgd_at;seed=3,5", "--epochs", "3", "--jobs", "2")
    assert [e.name for e in sweep.entries] == [
        f"lr={lr} method={method}" for lr in ("0.05", "0.1") for method in ("trades", "pgd_at")
    ]
    configs = [sweep.config(*run) for run in sweep.runs()]
    assert {(c.optim.lr, c.method, c.run.seed) for c in configs} == {
        (lr, method, seed)
        for lr in (0.05, 0.1)
        for method in ("trades", "pgd_at")
        for seed in (3, 5)
    }
    assert {c.optim.epochs for c in configs} == {3} and sweep.jobs == 2
    assert configs[0].run.out == "runs/sweep-quickstart/lr-0.05-method-trades-s3"


def test_a_value_with_commas_is_in_quotes_and_switches_have_values():
    assert read_grid("milestones='0.3,0.6',0.5;flip=true,false") == {
        "milestones": ["0.3,0.6", "0.5"],
        "flip": ["true", "false"],
    }
    first, *_, last = (e.config for e in read("flip=true,false;lr-factors='0.5,0.1'").entries)
    assert (first.data.flip, last.data.flip) == (True, False)
    assert first.optim.lr_factors == (0.5, 0.1)
    # Seeds alone are one entry.
    assert [e.name for e in read("seed=0,1").entries] == ["quickstart"]


def test_the_commands_that_are_listed_are_those_of_the_sweep(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["--grid", "beta=5,6;seed=0,7", "--method", "trades", "--out", "my runs", *BUDGET]
    assert main(["sweep", "quickstart", *words, "--list"]) == 0
    listed = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    sweep, _ = read_sweep("quickstart", words, SWITCHES)
    for line, run in zip(listed, sweep.runs(), strict=True):
        assert line[:3] == ["cure-fast", "train", "quickstart"]
        config, _ = read_config("quickstart", line[3:], "cure-fast train", {})
        assert config == sweep.config(*run)
    assert not list(tmp_path.iterdir())


def test_a_sweep_goes_on_where_it_is_and_ends_with_one_table(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["sweep", "quickstart", "--method", "trades", "--out", "swept", *BUDGET]
    assert main([*words, "--grid", "beta=5"]) == 0
    trained, real = [], compare.train
    monkeypatch.setattr(
        compare, "train", lambda c, **o: trained.append(Path(c.run.out).name) or real(c, **o)
    )
    capsys.readouterr()
    assert main([*words, "--grid", "beta=5,6", "--list"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    # As a scheduler would, in a process of its own.
    assert main(shlex.split(line)[1:]) == 0 and not trained
    assert main([*words, "--grid", "beta=5,6"]) == 0 and not trained
    with Path("swept/comparison.csv").open() as file:
        assert [row["entry"] for row in csv.DictReader(file)] == ["beta=5", "beta=6"]
    assert "cure-fast sweep quickstart" in Path("swept/comparison.md").read_text()
