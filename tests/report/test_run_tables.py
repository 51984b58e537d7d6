"""Tables of finished runs, and which published rows they reproduce, from made-up results."""

from __future__ import annotations

import csv
import json
import re

import numpy as np
import pytest

from cure_fast.cli.compare import names_runs
from cure_fast.cli.main import main
from cure_fast.evaluation.attack_result import nrr
from made_up import made_up_run

RECIPE = "trades-cifar10-resnet18"
# TRADES on CIFAR-10 with ResNet-18 (CURE's Table 1): 82.41 / 52.76 / 50.43 / 48.37.
NEAR = {"natural": 8300, "pgd20": 5250, "cw20": 5043, "aa": 4837}
# AutoAttack's 47.27 and 49.43 lie 0.02 below on average; each alone lies more than a point away.
LOW, HIGH = {**NEAR, "aa": 4727}, {**NEAR, "natural": 8200, "aa": 4943}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def table(folder):
    return list(csv.DictReader((folder / "comparison.csv").read_text().splitlines()))


def test_runs_of_several_seeds_are_a_row_beside_papers_and_rivals(folder):
    last = {**LOW, "aa": 4527}
    made_up_run(folder / "t0", RECIPE, seed=0, right=LOW, last=last)
    made_up_run(folder / "t1", RECIPE, seed=1, right=HIGH)
    made_up_run(folder / "c", "cifar10-resnet18", right={**NEAR, "natural": 8600})
    assert main(["compare", "t0", "t1", "c", "--out", "out"]) == 0
    endings = {".md", ".csv", ".tex", ".svg", ".png", ".pdf"}
    assert {p.suffix for p in (folder / "out").iterdir()} == endings
    picture = (folder / "out/scatter.svg").read_text()
    assert all(name in picture for name in ("TRADES, resnet18, published", "DAJAT", "AutoAttack"))
    rows = table(folder / "out")
    trades, cure = (row for row in rows if row["kind"] == "run")
    assert (trades["name"], trades["source"]) == ("TRADES", "seeds 0, 1")
    assert float(trades["aa_mean"]) == pytest.approx((47.27 + 49.43) / 2)
    assert float(trades["aa_std"]) == pytest.approx(np.std([47.27, 49.43], ddof=1))
    ratios = [nrr(83.0, 50.43), nrr(82.0, 50.43)]
    assert float(trades["nrr_cw_mean"]) == pytest.approx(np.mean(ratios))
    assert float(trades["sum_mean"]) == pytest.approx((83 + 47.27 + 82 + 49.43) / 2)
    # Of one seed alone; negative, as the end is worse.
    assert float(trades["aa_last_minus_best"]) == pytest.approx(-2.0)
    assert cure["aa_std"] == cure["aa_last_minus_best"] == "" and cure["natural_mean"] == "86.0"
    papers = [row for row in rows if row["kind"] == "paper"]
    assert [row["name"] for row in papers] == ["TRADES", "CURE"]
    # CURE's Table 1 prints this ratio and Tables 7 and 8 sums.
    assert float(papers[1]["nrr_cw_mean"]) == pytest.approx(65.40, abs=0.005)
    rivals = [(r["name"], r["natural_mean"], r["aa_mean"]) for r in rows if r["kind"] == "rival"]
    assert ("DAJAT", "85.71", "52.48") in rivals and len(rivals) == 5
    text = (folder / "out/comparison.md").read_text()
    assert "48.35 \N{PLUS-MINUS SIGN} 1.53" in text and "C&W-20 10,000" in text
    tex = (folder / "out/comparison.tex").read_text()
    lines = [line for line in tex.splitlines() if line.endswith(r" \\")]
    assert len(lines) == 1 + len(rows)
    assert {len(re.findall(r"(?<!\\)&", line)) for line in lines} == {1 + 4 + 3}


def test_figures_of_other_images_have_neither_ratio_nor_sum(folder):
    right = {**NEAR, "aa": 480}
    made_up_run(folder / "t0", RECIPE, right=right, counts={"aa": 1000})
    assert main(["compare", "t0", "--out", "out"]) == 0
    (row, *_) = table(folder / "out")
    assert row["aa_mean"] == "48.0" and row["sum_mean"] == row["nrr_aa_mean"] == ""


def other_step(folder):
    words = ["--beta", "5", "--eval-step-size", "2/255"]
    made_up_run(folder / "b", RECIPE, words, right=NEAR)


def other_data(folder):
    made_up_run(folder / "b", "trades-cifar100-resnet18", right=NEAR)


def fewer_images(folder):
    made_up_run(folder / "b", RECIPE, ["--beta", "5"], right=NEAR, counts={"pgd20": 9000})


def twice(folder):
    made_up_run(folder / "b", RECIPE, right=NEAR)


def other_weights(folder):
    made_up_run(folder / "b", RECIPE, seed=1, right=NEAR)
    (folder / "b/model.safetensors").write_bytes(b"trained on")


def unfinished(folder):
    made_up_run(folder / "b", RECIPE, seed=1, right=NEAR)
    (folder / "b/results.json").unlink()


@pytest.mark.parametrize(
    ("make", "words", "told"),
    [
        (other_step, "a b", "alike under pgd20"),
        (other_data, "a b", "another data"),
        (fewer_images, "a b", "alike under pgd20"),
        (twice, "a b", "another seed than a, got one of the same"),
        (other_weights, "a b", "results of its weights"),
        (unfinished, "a b", "expected a finished run"),
        (None, "a nowhere", "expected the configuration of a run"),
        (None, "a --outt x", "unknown flag|Unknown option"),
        (None, "a --out a", "expected a folder for tables, got the folder of a run"),
        (None, "a --reproducibility R.md --out x", "--out: expected none with"),
    ],
)
def test_what_cannot_stand_in_one_table_is_a_line(folder, capsys, make, words, told):
    made_up_run(folder / "a", RECIPE, right=NEAR)
    if make is not None:
        make(folder)
    before = sorted(folder.rglob("*"))
    assert main(["compare", *words.split()]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(told, error), error
    assert sorted(folder.rglob("*")) == before


def test_words_name_runs_or_what_to_train(folder):
    made_up_run(folder / "a", RECIPE, right=NEAR)
    assert names_runs(["a"]) and names_runs(["a", "b", "--out", "x"])
    assert not names_runs(["quickstart"]) and not names_runs(["--out", "a", "b"])
    assert not names_runs(["a", "--methods", "cure"])
    assert not names_runs(["a", "--methods=cure", "--seeds", "2"])


def line_of(folder, *runs):
    """The line of TRADES with ResNet-18 on CIFAR-10 in the page of these runs."""
    assert main(["compare", *runs, "--reproducibility", "deep/R.md"]) == 0
    text = (folder / "deep/R.md").read_text()
    assert "within 1.0 points of each figure, or within two standard" in text
    (line,) = (
        row for row in text.splitlines() if row.startswith("| TRADES, ResNet-18, CIFAR-10 (CURE")
    )
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_row_is_reproduced_within_a_point_or_two_deviations(folder):
    for name, seed, right in (("low", 0, LOW), ("high", 1, HIGH), ("near", 0, NEAR)):
        made_up_run(folder / name, RECIPE, seed=seed, right=right)
    line = line_of(folder, "near")
    weights = json.loads((folder / "near/results.json").read_text())["models"]["trained"]
    assert line[2] == "reproduced" and line[6] == weights["weights"][:12]
    assert line[4] == "+0.59 / \N{MINUS SIGN}0.26 / 0.00 / 0.00"
    assert line_of(folder, "low")[2] == line_of(folder, "high")[2] == "not reproduced"
    assert line_of(folder, "low", "high")[2] == "reproduced"
    (folder / "far").mkdir()
    far = {**LOW, "aa": 4500}, {**LOW, "aa": 4510}
    for seed, right in enumerate(far):
        made_up_run(folder / f"far/{seed}", RECIPE, seed=seed, right=right)
    assert line_of(folder, "far/0", "far/1")[2] == "not reproduced"


@pytest.mark.parametrize(
    ("words", "more", "why"),
    [
        (["--epochs", "30"], {}, "optim.epochs 30 instead of"),
        (["--beta", "5"], {}, "settings.beta 5 instead of 6"),
        (["--eval-eps", "4/255"], {}, "evaluated within eps 4/255"),
        ([], {"counts": {"aa": 5000}}, "AutoAttack on 5,000 images"),
        ([], {"reliable": False}, "natural unreliable"),
        ([], {"right": {k: v for k, v in NEAR.items() if k != "aa"}}, "AutoAttack not measured"),
    ],
)
def test_a_run_that_is_not_the_papers_leaves_the_row_open(folder, words, more, why):
    made_up_run(folder / "a", RECIPE, words, **{"right": NEAR, **more})
    line = line_of(folder, "a")
    assert line[2] == "not run" and why in line[7]
