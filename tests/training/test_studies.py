"""Studies: their entries, what they collect and refuse, figures of numbers, runs side by side."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from types import SimpleNamespace

import pytest
import torch
from matplotlib.colors import to_hex

import cure_fast.analysis
from cure_fast.analysis.kept import Kept
from cure_fast.cli.main import main
from cure_fast.cli.study import read_study
from cure_fast.errors import DivergedError, InputError, StoppedError
from cure_fast.evaluation.attack_result import AttackResult
from cure_fast.figures import NATURAL, ROBUST, colour_of, new_figure
from cure_fast.loaders import read_dataset
from cure_fast.report.record import read_record
from cure_fast.training import job, side_by_side
from cure_fast.training.choices import starting_point
from cure_fast.training.compare import check_comparison
from cure_fast.training.studies import STUDIES, layerwise, shape
from cure_fast.training.studies.drawing import epoch_lines
from cure_fast.training.studies.shape import Found, collected, shown_attack
from cure_fast.training.studies.toy import (
    ToySettings,
    attacked,
    circles,
    draw_plane,
    largest_drop,
    network,
    summary,
    train,
)
from tiny_job import tiny

OF_RUNS = [name for name, study in STUDIES.items() if study.entries is not None]


def read(name, *words, recipe="quickstart"):
    return read_study(STUDIES[name], recipe, words)


@pytest.mark.parametrize("name", OF_RUNS)
def test_the_entries_of_a_study_can_be_trained_under_one_budget(name, tmp_path):
    comparison, base = read(name, "--epochs", "3", "--seeds", "2", "--out", str(tmp_path / "new"))
    check_comparison(comparison)
    assert {entry.config.optim.epochs for entry in comparison.entries} == {3}
    assert len(comparison.runs()) == 2 * len(comparison.entries) and base.optim.epochs == 3
    assert not (tmp_path / "new").exists()


def test_the_sets_of_the_layer_wise_study_are_the_papers_as_far_as_there_are_blocks(capsys):
    comparison, _ = read("layerwise")
    assert "without U-4, U-34, U-234, as resnet-small has 3 blocks" in capsys.readouterr().out
    names = [entry.name for entry in comparison.entries]
    assert names[1:7] == ["U-1", "U-2", "U-3", "U-12", "U-23", "U-123"]
    assert len(names) == 13
    by_name = {entry.name: entry.config for entry in comparison.entries}
    assert by_name["U-23"].policies["blocks"].blocks_train == (2, 3)
    assert by_name["U-23 drawn anew"].policies["blocks"].blocks_reinit
    assert not by_name["full AT"].policies
    whole, _ = read("layerwise", recipe="cifar10-resnet18")
    assert len(whole.entries) == 19


def test_the_settings_of_the_sensitivity_study_differ_one_at_a_time():
    comparison, base = read("sensitivity", "--alpha", "0.3")
    for entry in comparison.entries[1:]:
        own, usual = vars(entry.config.settings), vars(base.settings)
        assert [name for name in own if own[name] != usual[name]] == [entry.name.split()[0]]
    assert base.settings.alpha == 0.3
    assert [e.name for e in comparison.entries if "alpha" in e.name] == [
        f"alpha {value}" for value in (0.1, 0.2, 0.5, 0.9)
    ]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("", "expected the name of a study before all else, got nothing"),
        ("--seeds 3", "expected the name of a study before all else, got '--seeds' first"),
        ("layrwise", "NAME: expected one of"),
        ("ablation --method trades", "--method: expected none"),
        ("ablation --epoch 3", "unknown flag '--epoch'"),
        ("ablation --jobs 0", "--jobs: expected a number from 1 to 64"),
        ("ablation --seeds 0", "--seeds: expected a number from 1 to 1000"),
        ("ablation --pretrain-epochs 0", "--pretrain-epochs: expected at least one"),
        ("ablation --attacks natural", "--attacks: expected natural and an attack"),
        ("layerwise --model densenet121", "--model: expected a ResNet"),
        ("toy --epochs 3", "--epochs: expected a number at least 12"),
        ("toy quickstart", "expected flags, each with its value"),
    ],
)
def test_wrong_words_are_a_line_and_write_nothing(words, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["study", *words.split()]) == 2
    _, err = capsys.readouterr()
    assert told in err and err.count("\n") == 1 and not list(tmp_path.iterdir())


def test_help_lists_studies_and_explains_one(capsys):
    assert main(["study", "--help"]) == 0
    told = capsys.readouterr().out
    assert all(
        name in told and study.source in " ".join(told.split()) for name, study in STUDIES.items()
    )
    for words, flag in (["ablation", "--help"], "--attack-steps"), (["toy", "--help"], "--noise"):
        assert main(["study", *words]) == 0
        assert flag in capsys.readouterr().out


def test_a_figure_shows_the_longest_pgd():
    config = starting_point("quickstart")
    some = replace(
        config, eval=replace(config.eval, attacks=("natural", "pgd7", "pgd20-t", "pgd12"))
    )
    assert shown_attack(some) == "pgd12"


def record_of(shift):
    """A run of three epochs with results, as far as studies read it."""

    def results(add):
        scores = {"natural": 80 + shift + add, "pgd20": 40 + shift + add}
        attacks = {a: AttackResult(a, int(n), 100, 0.0, "float32", {}) for a, n in scores.items()}
        return SimpleNamespace(attacks=attacks)

    epochs = [
        SimpleNamespace(epoch=e, robust=30.0 + e + shift, numbers={"mask energy": 0.1 * e})
        for e in (1, 2, 3)
    ]
    models = {"trained": results(0), "start": results(5)}
    return SimpleNamespace(results=SimpleNamespace(models=models), stage=lambda name: epochs)


@pytest.mark.parametrize("name", OF_RUNS)
def test_a_figure_is_drawn_of_what_runs_recorded(name, tmp_path, monkeypatch):
    layers = {"conv1": 0.9, "linear": None}
    monkeypatch.setattr(
        layerwise, "similarity", lambda found: dict.fromkeys(("ST", *found.records), layers)
    )
    comparison, base = read(name, "--attacks", "natural,pgd20", recipe="cifar10-resnet18")
    records = {entry.name: [record_of(0), record_of(3)] for entry in comparison.entries}
    result = STUDIES[name].run(Found(records=records, config=base, seeds=2))
    row = result.rows[-1]
    assert row["natural"] == mean((80, 83)) and row["pgd20_std"] == pytest.approx(stdev((40, 43)))
    assert result.save(tmp_path)[0].exists()
    if name == "layerwise":
        assert result.rows[0]["entry"] == "ST" and result.rows[0]["natural"] == 86.5
        assert result.numbers["robust"]["U-23"] == {
            "epochs": [1, 2, 3],
            "values": [32.5, 33.5, 34.5],
        }


def test_the_layer_wise_studys_similarity_is_that_of_the_analysis(tmp_path):
    folders = []
    for seed in range(2):
        config = tiny(tmp_path, "pgd_at", out=f"run{seed}", run={"seed": seed})
        folders.append(job.train(config))
    records = {layerwise.WHOLE: [read_record(folder) for folder in folders]}
    kept = Kept(tmp_path / "kept.json")
    own = layerwise.similarity(Found(records=records, config=config, seeds=2, kept=kept))
    assert [*own] == ["ST", "full AT"] and kept.computed == 4
    test = read_dataset("digits", tmp_path, "test")
    count = min(256, len(test))
    for name, file in ("ST", "start.safetensors"), ("full AT", "model.safetensors"):
        values = []
        for seed, folder in enumerate(folders):
            rows = cure_fast.analysis.cka(
                folder / file, test.images[:count], test.labels[:count], seed=seed, step_size=0.1
            ).rows
            values.append(
                {r["natural"]: r["cka"] for r in rows if r["natural"] == r["adversarial"]}
            )
        for layer, value in own[name].items():
            assert value == pytest.approx(mean(each[layer] for each in values), abs=1e-9)
    assert own["ST"] != own["full AT"]


def test_the_bar_of_a_study_opens_after_those_of_its_runs(tmp_path, monkeypatch):
    order = []

    @contextmanager
    def bar():
        order.append("bar")
        yield None

    comparison, base = read("ablation", "--out", str(tmp_path / "none"))
    for name, act in {"compare": None, "collected": {}, "finished": None}.items():
        monkeypatch.setattr(shape, name, lambda *_, n=name, a=act: (order.append(n), a)[1])
    monkeypatch.setattr(shape, "Progress", bar)
    shape.run_study(STUDIES["ablation"], comparison, base)
    assert order == ["compare", "collected", "bar", "finished"]


def test_runs_that_are_missing_are_refused(tmp_path):
    comparison, _ = read("ablation", "--out", str(tmp_path / "none"))
    with pytest.raises(
        InputError, match="expected the finished run of 'neither' with seed 0, got none"
    ):
        collected(comparison)


# Processes that stand for runs, by what they do; the first word is the folder of the run.
ACTS = {
    "good": "print('fine')",
    "diverges": "print('cure-fast: the loss is not finite'); sys.exit(3)",
    "breaks": "print('cure-fast: bad data'); sys.exit(2)",
    "waits": "import signal, time; signal.signal(15, lambda *_: sys.exit(75)); time.sleep(60)",
}


@pytest.fixture
def acting(monkeypatch, tmp_path):
    """Runs side by side whose processes act as the name of their folder says."""
    script = tmp_path / "act.py"
    cases = "".join(f"if act == {act!r}:\n    {code}\n" for act, code in ACTS.items())
    script.write_text(
        "import json, os, pathlib, sys\n"
        "own = json.load(open(sys.argv[4]))['run']['out']\n"
        "act = pathlib.Path(own).name.partition('-')[0]\n"
        "pathlib.Path(own + '.seen').write_text(os.environ.get('CUDA_VISIBLE_DEVICES', ''))\n"
        + cases
    )
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {script} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(side_by_side.sys, "executable", str(python))
    monkeypatch.setattr(side_by_side, "FORWARD_S", 0.0)
    config = starting_point("quickstart")

    def go(names, jobs=2, stop=lambda: False):
        runs = {n: replace(config, run=replace(config.run, out=str(tmp_path / n))) for n in names}
        return side_by_side.train_side_by_side(runs, jobs, stop)

    return go


def test_each_run_has_a_process_and_a_gpu_of_its_own_and_divergence_is_told(
    acting, tmp_path, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    ended = acting(["good-1", "diverges-1"])
    assert {n: str(e) for n, e in ended.items()} == {"diverges-1": "the loss is not finite"}
    assert isinstance(ended["diverges-1"], DivergedError)
    assert [(tmp_path / f"{n}.seen").read_text() for n in ("good-1", "diverges-1")] == ["5", "7"]


def test_what_is_no_result_of_a_run_stops_the_others(acting, tmp_path):
    with pytest.raises(InputError, match="breaks-1: the process ended with code 2: bad data"):
        acting(["waits-1", "breaks-1", "good-1"])
    assert not (tmp_path / "good-1.seen").exists()


def test_a_signal_is_sent_on_and_ends_with_75(acting, tmp_path):
    with pytest.raises(StoppedError) as error:
        acting(["waits-1", "waits-2"], stop=lambda: (tmp_path / "waits-2.seen").exists())
    assert error.value.code == 75


@pytest.mark.parametrize("there", [True, False])
def test_the_process_of_a_run_ends_by_a_signal_once_its_parent_is_gone(there, tmp_path):
    parent, code = (os.getpid(), 7) if there else (0, -signal.SIGTERM)
    place = tmp_path / "cure_fast"
    place.mkdir()
    (place / "__init__.py").touch()
    seconds = 0.2 if there else 30
    (place / "__main__.py").write_text(
        f"import time\ndef main():\n    time.sleep({seconds})\n    return 7\n"
    )
    words = [sys.executable, "-c", side_by_side.WATCHING.format(parent=parent)]
    assert subprocess.run(words, cwd=tmp_path, timeout=50).returncode == code


@pytest.mark.parametrize("name", ["ablation", "toy"])
def test_a_folder_with_another_studys_numbers_is_refused(name, tmp_path, capsys):
    (tmp_path / "sensitivity.json").touch()
    assert main(["study", name, "--out", str(tmp_path)]) == 2
    assert "got one that holds sensitivity.json. Name another." in capsys.readouterr().err
    assert len([*tmp_path.iterdir()]) == 1


def test_lines_over_one_epoch_have_a_whole_tick_and_no_colour_of_bars():
    figure, (axes,) = new_figure()
    epoch_lines(axes, {str(n): {"epochs": [1], "values": [n]} for n in range(9)}, "")
    figure.draw_without_rendering()
    low, high = axes.get_xlim()
    assert [tick for tick in axes.get_xticks() if low <= tick <= high] == [1]
    assert not {line.get_color() for line in axes.lines} & {NATURAL, ROBUST}


# The toy.

SMALL = ToySettings(epochs=12, points=40)


def test_the_toys_attack_is_pgd_on_the_cross_entropy():
    draw = torch.Generator().manual_seed(0)
    model = network(draw)
    x, y = circles(SMALL, draw)
    found = attacked(
        model, x, y, eps=0.3, step=0.1, steps=5, generator=torch.Generator().manual_seed(1)
    )
    delta = 0.6 * torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) - 0.3
    for _ in range(5):
        delta.requires_grad_(True)
        loss = torch.nn.functional.cross_entropy(model(x + delta), y, reduction="sum")
        (grad,) = torch.autograd.grad(loss, delta)
        delta = (delta.detach() + 0.1 * grad.sign()).clamp(-0.3, 0.3)
    torch.testing.assert_close(found, x + delta, atol=1e-6, rtol=0)


def test_the_toys_circles_and_summary_are_what_they_say():
    x, y = circles(ToySettings(noise=0.0), torch.Generator().manual_seed(0))
    torch.testing.assert_close(x[:, :2].norm(dim=1), (1 + y).float())
    assert not x[:, 2].any() and y.bincount().tolist() == [500, 500]
    robust = [0.0] * 9 + [0.8, 0.9, 0.6, 0.7]
    told = summary(robust, [1.0] * 13)
    assert told["oscillation"] == pytest.approx(0.5 / 3) and told["drop"] == pytest.approx(0.3)
    assert told["robust"] == pytest.approx(3.0 / 10) and largest_drop(robust) == 11


def test_piat_oscillates_less_than_pgd_at():
    settings, told = ToySettings(epochs=30), {}
    for method in ("PGD-AT", "PIAT"):
        runs = [train(method, seed, settings) for seed in range(2)]
        told[method] = mean(summary(r["robust"], r["clean"])["oscillation"] for r in runs)
    # Over 50 epochs and four seeds it is about a third.
    assert told["PIAT"] < 0.7 * told["PGD-AT"]


def test_a_toy_that_diverges_is_an_error(tmp_path, capsys):
    words = "study toy --epochs 12 --points 40 --seeds 1 --lr 1e30 --out".split()
    assert main([*words, str(tmp_path / "toy")]) == 3
    assert "toy, PGD-AT, seed 0, epoch 1: the l" in capsys.readouterr().err
    assert not (tmp_path / "toy/toy.json").exists()


def test_a_toy_panel_says_rise_where_nothing_fell_and_has_its_methods_colour():
    plane = [[x - 30.0 for x in range(61)]] * 61
    rising, falling = [0.1, 0.2], [0.2, 0.1]
    numbers = {
        "drop": {"PGD-AT": 1, "PIAT": 1},
        "robust": {"PGD-AT": rising, "PIAT": falling},
        "planes": {"PGD-AT": [plane, plane], "PIAT": [plane, plane]},
    }
    _, panels = new_figure(1, 2)
    for axes, method, change in zip(
        panels, ("PGD-AT", "PIAT"), ("smallest rise", "largest drop"), strict=True
    ):
        draw_plane(axes, numbers, method)
        assert change in axes.get_title("left")
        drawn = {to_hex(c.get_edgecolor()[0]) for c in axes.collections}
        assert drawn == {colour_of("pgd_at" if method == "PGD-AT" else "piat")}


def test_the_toy_is_kept_and_drawn(tmp_path, capsys):
    words = ["study", "toy", "--epochs", "12", "--points", "40", "--seeds", "1"]
    words += ["--out", str(tmp_path / "toy")]
    assert main(words) == 0
    numbers = json.loads((tmp_path / "toy/toy.json").read_text())
    assert len(numbers["robust"]["PIAT"]) == 12 and len(numbers["planes"]["PGD-AT"]) == 2
    (parts,) = (tmp_path / "toy/parts").iterdir()
    stored = Kept(parts).read()
    stored["ALP, seed 0"]["robust"] = [0.25] * 12
    Kept(parts).write(stored)
    assert main(words) == 0
    numbers = json.loads(Path(tmp_path / "toy/toy.json").read_text())
    assert numbers["rows"][1] | {"clean": 0} == {
        "method": "ALP",
        "robust": 0.25,
        "clean": 0,
        "oscillation": 0,
        "drop": 0,
    }
    capsys.readouterr()
