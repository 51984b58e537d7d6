"""Comparisons: each run made once, gone on with, and taken over; tables of what was measured."""

from __future__ import annotations

import csv
import json
import shutil
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from cure_fast.cli.main import main
from cure_fast.training import compare, job
from moments import signal_at
from processes import finish, start

# Two steps an epoch of 60 images; the natural start is shared by all with the same seed.
BUDGET = (
    "--train-images 60 --val-images 20 --width 4 --pretrain-epochs 1 --epochs 2 --batch-size 30 "
    "--attack-steps 1 --step-size 0.15 --val-attack-steps 1 --attacks natural,pgd2 "
    "--eval-step-size 0.1 --limit 20 --loader resident "
    "--device cpu --no-tensorboard --cache cache --out compared"
).split()
ENTRIES = ("trades --beta 5", "pgd_at+ema")
METHODS = ",".join(ENTRIES)
SLUGS = ("trades-beta-5", "pgd_at+ema")
TABLES = ("comparison.md", "comparison.csv", "comparison.tex", "scatter.svg")


def words(methods=METHODS, seeds=2, *more):
    return ["compare", "quickstart", "--methods", methods, "--seeds", str(seeds), *BUDGET, *more]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A finished comparison of two entries with two seeds, and the folder it was made in."""
    folder = tmp_path_factory.mktemp("compare")
    code, output = finish(words(), folder)
    assert code == 0, output
    return folder


@pytest.fixture
def folder(compared, tmp_path, monkeypatch):
    """A copy of it to work in."""
    shutil.copytree(compared, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def trained(monkeypatch):
    """The runs that are trained or evaluated from here on, by the name of their folder."""
    names = []

    def train(config, **options):
        names.append(Path(config.run.out).name)
        return job.train(config, **options)

    monkeypatch.setattr(compare, "train", train)
    return names


def rows(folder):
    with (folder / "compared" / "comparison.csv").open() as file:
        return list(csv.DictReader(file))


def accuracies(folder, slug, attack, seeds=2):
    """What the runs' own records say."""
    found = []
    for seed in range(seeds):
        path = folder / "compared" / f"{slug}-s{seed}" / "results.json"
        found.append(
            json.loads(path.read_text())["models"]["trained"]["attacks"][attack]["accuracy"]
        )
    return found


def test_tables_have_mean_and_deviation_of_the_runs(compared):
    page = (compared / "compared" / "comparison.md").read_text()
    tex = (compared / "compared" / "comparison.tex").read_text()
    for row, name, slug in zip(rows(compared), ENTRIES, SLUGS, strict=True):
        assert row["entry"] == name and row["seeds"] == "2" and row["failed"] == "0"
        for attack in ("natural", "pgd2"):
            values = np.array(accuracies(compared, slug, attack))
            assert [float(row[f"{attack}_s{seed}"]) for seed in (0, 1)] == values.tolist()
            assert float(row[f"{attack}_mean"]) == pytest.approx(values.mean())
            assert float(row[f"{attack}_std"]) == pytest.approx(values.std(ddof=1))
            told = f"{values.mean():.2f}", f"{values.std(ddof=1):.2f}"
            assert " \N{PLUS-MINUS SIGN} ".join(told) in page and r" \pm ".join(told) in tex
            assert row[f"{attack}_images"] == "20"
    deviations = [float(row["natural_std"]) for row in rows(compared)]
    assert any(deviations), "the seeds differ"


def test_tables_say_what_each_entry_was_given_and_what_is_published(compared):
    trades, averaged = rows(compared)
    assert trades["start"] == "natural, 1 epoch" and trades["epochs"] == "2"
    assert trades["engine"] == "eager" and trades["device"] != "-"
    logged = [
        json.loads(line)
        for seed in (0, 1)
        for line in (compared / f"compared/trades-beta-5-s{seed}/metrics.jsonl").open()
    ]
    spent = [r["seconds"] for r in logged if (r["event"], r["stage"]) == ("epoch", "train")]
    assert len(spent) == 4 and float(trades["train_seconds"]) == pytest.approx(sum(spent) / 2)
    assert averaged["policies"] == "ema"
    # Nothing is published of these images, and figures of others say nothing of them.
    assert trades["paper_row"] == trades["paper_aa"] == averaged["paper_row"] == ""
    page = (compared / "compared" / "comparison.md").read_text()
    assert "ublished" not in page
    assert "paper" not in (compared / "compared" / "comparison.tex").read_text()
    assert "`cure-fast compare quickstart --methods 'trades --beta 5,pgd_at+ema'" in page
    assert "(n - 1) over seeds" in page and "Natural 20, PGD-2 20" in page
    picture = (compared / "compared" / "scatter.svg").read_text()
    assert "trades --beta 5" in picture and "pgd_at+ema" in picture
    assert "accuracy in % under PGD-2" in picture


def test_finished_runs_are_taken_over(folder, trained):
    former = {name: (folder / "compared" / name).read_bytes() for name in TABLES}
    path = folder / "compared" / "trades-beta-5-s0" / "config.json"
    config = json.loads(path.read_text())
    # Where a run was made is no part of what it is.
    config["run"] |= {"out": "/elsewhere/run", "cache": "/elsewhere/cache"}
    config["data"] |= {"data_root": "/elsewhere/data"}
    path.write_text(json.dumps(config))
    assert main(words()) == 0
    assert trained == []
    assert {name: (folder / "compared" / name).read_bytes() for name in TABLES} == former


def test_another_entry_or_seed_trains_what_is_new_alone(folder, trained, capsys):
    assert main(words(f"{ENTRIES[0]},natural", 1)) == 0
    assert trained == ["natural-s0"]
    assert main(words(ENTRIES[0], 3)) == 0
    assert trained == ["natural-s0", "trades-beta-5-s2"]
    assert "seed 1: finished earlier, in compared/trades-beta-5-s1" in capsys.readouterr().out
    values = accuracies(folder, "trades-beta-5", "natural", 3)
    assert float(rows(folder)[0]["natural_std"]) == pytest.approx(np.std(values, ddof=1))


def test_what_a_finished_run_lacks_is_evaluated(folder, trained):
    assert main(words(ENTRIES[0], 1, "--attacks", "natural,pgd2,cw2")) == 0
    assert trained == ["trades-beta-5-s0"]
    (row,) = rows(folder)
    assert row["cw2_images"] == "20" and row["natural_std"] == ""
    assert "there is no deviation" in (folder / "compared" / "comparison.md").read_text()


def test_a_run_whose_weights_are_not_those_measured_is_not_finished(folder, trained):
    weights = folder / "compared" / "trades-beta-5-s0" / "model.safetensors"
    shutil.copy(folder / "compared" / "trades-beta-5-s1" / "model.safetensors", weights)
    assert main(words(ENTRIES[0], 1)) == 0
    assert trained == ["trades-beta-5-s0"]


def test_ctrl_c_exits_with_75_and_the_same_command_goes_on(tmp_path, compared):
    # Of seed 0 the start, and both entries, take 2 + 4 + 4 steps; this one is of the second's.
    stopping = partial(signal_at, "cure_fast.engine.eager:train_step", 8, signal.SIGINT)
    stopped = start(words(), tmp_path, prepare=stopping)
    assert stopped.wait() == 75, stopped.output()
    told = "stopped at pgd_at+ema, seed 0; the same command goes on from there."
    assert told in stopped.stderr() and "Traceback" not in stopped.output()
    found = {path.name for path in (tmp_path / "compared").iterdir() if path.is_dir()}
    assert found == {"trades-beta-5-s0", "pgd_at+ema-s0"}
    code, output = finish(words(), tmp_path)
    assert code == 0 and "train: resumed after step 2" in output, output
    timed = ("pretrain_seconds", "train_seconds")
    stable = [
        [{k: v for k, v in row.items() if k not in timed} for row in rows(where)]
        for where in (compared, tmp_path)
    ]
    assert stable[0] == stable[1]


def test_a_run_that_diverges_is_told_and_the_others_go_on(folder, trained, capsys):
    wild = "trades --lr 1000 --schedule constant --epochs 30"
    assert main(words(f"{wild},{ENTRIES[0]}", 1)) == 3
    assert trained == ["trades-lr-1000-schedule-constant-epochs-30-s0"]
    assert f"1 of 2 runs ended without a result: {wild} with seed 0." in capsys.readouterr().err
    failed, done = rows(folder)
    assert failed["failed"] == "1" and failed["natural_mean"] == "" and done["natural_mean"]
    page = (folder / "compared" / "comparison.md").read_text()
    assert f"- {wild}, seed 0: no result, " in page and f"| {wild} | - | - |" in page


def test_a_folder_with_another_configuration_is_refused_before_anything_is_trained(
    folder, trained, capsys
):
    assert main(words(f"natural,{ENTRIES[0]}", 1, "--lr", "0.05")) == 2
    errors = capsys.readouterr().err
    assert "compared/trades-beta-5-s0: expected a run of this configuration" in errors
    assert "optim.lr: 0.1 in the run, 0.05 asked for" in errors
    assert not (folder / "compared" / "natural-s0").exists() and trained == []


def test_a_finished_run_without_its_weights_is_refused(folder, trained, capsys):
    (folder / "compared" / "trades-beta-5-s0" / "model.safetensors").unlink()
    assert main(words(f"natural,{ENTRIES[0]}", 1)) == 2
    told = "compared/trades-beta-5-s0: expected model.safetensors of a run that is trained to its"
    assert told in capsys.readouterr().err and trained == []


def test_a_study_in_the_folder_of_a_comparison_is_refused(folder, trained, capsys):
    former = {name: (folder / "compared" / name).read_bytes() for name in TABLES}
    assert main(["study", "ablation", "--out", "compared"]) == 2
    told = "--out compared: expected no tables but those of cure-fast study ablation, got those of"
    assert f"{told} cure-fast compare." in capsys.readouterr().err
    assert former == {name: (folder / "compared" / name).read_bytes() for name in TABLES}


def test_results_on_more_images_than_asked_for_are_refused(folder, trained, capsys):
    assert main(words(ENTRIES[0], 1, "--limit", "10")) == 2
    told = "expected natural on 10 test images as for all, got results on 20"
    assert told in capsys.readouterr().err and trained == []


def test_a_run_in_another_process_stops_the_comparison(folder, trained, capsys):
    from cure_fast.files import locked

    with locked(folder / "compared" / "run.lock"):
        assert main(words()) == 2
    assert "another process is running in it" in capsys.readouterr().err


def test_data_that_is_not_there_leaves_no_folder(folder, capsys):
    found = ["compare", "quickstart", "--methods", "cure", "--data", "folder:nowhere"]
    assert main([*found, "--out", "new"]) == 2
    assert "nowhere/train: expected a folder" in capsys.readouterr().err
    assert not (folder / "new").exists()
    (folder / "old").mkdir()
    assert main([*found, "--out", "old"]) == 2 and (folder / "old").is_dir()
