"""The tables and the picture of a comparison, from made-up results."""

from __future__ import annotations

import csv
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from cure_fast.cli.configure import read_config
from cure_fast.errors import InputError
from cure_fast.evaluation.attack_result import AttackResult
from cure_fast.figures import colour_of
from cure_fast.report.comparison import Entrant, write_comparison
from cure_fast.report.record import ModelScores, Record, Results
from cure_fast.report.scatter import Mark, draw
from cure_fast.runs.epochs import Epoch

ATTACKS = ("natural", "pgd20", "cw20", "aa")


def record(natural, robust, *, count=1000, step=0.003, reliable=True):
    """A run's record with these numbers of right images."""
    found = {
        name: AttackResult(
            attack=name,
            correct=natural if name == "natural" else robust,
            count=100 if name == "aa" else count,
            seconds=1.0,
            settings={} if name == "natural" else {"step_size": step, "seed": natural},
            warnings=() if reliable else ("masked gradients",),
            reliable=reliable,
        )
        for name in ATTACKS
    }
    scores = ModelScores("result", found, {})
    results = Results(["a", "b"], 10000, 8 / 255, None, {"trained": scores}, [])
    epochs = [Epoch("train", n, 0.1, {}, seconds=30.0, engine="eager") for n in (1, 2)]
    machine = {"device": "cuda", "cpu": "Xeon", "gpu": "H100", "precision": "bfloat16"}
    return Record(Path(), epochs, {}, machine, [], False, results, None)


def entrant(name, records, **failures):
    config = read_config("cifar10-small", ["--method", *name.split()], "x", {})[0]
    return Entrant(name, config, records, {int(k[1:]): v for k, v in failures.items()})


def written(folder, *entrants):
    write_comparison(folder, entrants, "cure-fast compare cifar10-small")
    read = (p for p in folder.iterdir() if p.suffix not in (".png", ".pdf"))
    return {p.suffix: p.read_text() for p in read}


def test_figures_are_means_and_deviations_over_seeds(tmp_path):
    right = {0: (438, 98), 1: (455, 91), 2: (421, 97)}
    cure = entrant("cure", {seed: record(*pair) for seed, pair in right.items()})
    files = written(tmp_path, cure, entrant("trades --beta 5", {0: record(372, 90)}))
    (row, other) = csv.DictReader(files[".csv"].splitlines())
    for attack, place in ("natural", 0), ("pgd20", 1):
        values = np.array([pair[place] for pair in right.values()]) / 10
        assert float(row[f"{attack}_mean"]) == pytest.approx(values.mean())
        assert float(row[f"{attack}_std"]) == pytest.approx(np.std(values, ddof=1))
        assert (
            f"{values.mean():.2f} \N{PLUS-MINUS SIGN} {np.std(values, ddof=1):.2f}" in files[".md"]
        )
    # A part of the images has its own count.
    assert (row["aa_s1"], row["aa_images"], row["pgd20_images"]) == ("91.0", "100", "1000")
    assert other["natural_s1"] == other["natural_std"] == "" and other["natural_mean"] == "37.2"
    given = "| cure | 0, 1, 2 | natural, 10 epochs | 8 | 0 | 60 | eager | bfloat16 | H100 |"
    assert given in files[".md"]


def test_a_small_network_stands_beside_what_is_published_of_resnet18(tmp_path):
    runs = {0: record(438, 98)}
    files = written(tmp_path, entrant("trades", runs), entrant("trades --policies ema", runs))
    (row, other) = csv.DictReader(files[".csv"].splitlines())
    assert row["paper_row"] == "TRADES, ResNet-18, CIFAR-10 (CURE's Table 1)"
    assert (row["paper_natural"], row["paper_aa"]) == ("82.41", "48.37")
    assert "82.41 / 52.76 / 50.43 / 48.37 | TRADES, ResNet-18, CIFAR-10" in files[".md"]
    # Nothing is published of this combination.
    assert other["paper_row"] == "" and "| - | - |" in files[".md"]


def test_one_seed_has_no_deviation_and_says_so(tmp_path):
    files = written(tmp_path, entrant("cure", {0: record(438, 98)}))
    assert "Of one seed each: there is no deviation" in files[".md"]
    assert "\N{PLUS-MINUS SIGN}" not in files[".md"] + files[".svg"] and r"\pm" not in files[".tex"]


def test_what_has_no_result_or_no_trust_is_named(tmp_path):
    runs = {0: record(438, 98, reliable=False)}
    files = written(tmp_path, entrant("cure", runs, s1="the loss is not finite"))
    assert "- cure, seed 1: no result, the loss is not finite" in files[".md"]
    assert "- cure, seed 0, pgd20: unreliable, masked gradients" in files[".md"]


@pytest.mark.parametrize("other", [{"count": 500}, {"step": 0.007}])
def test_runs_evaluated_differently_stand_in_no_table(tmp_path, other):
    entrants = entrant("cure", {0: record(43, 9)}), entrant("mart", {0: record(43, 9, **other)})
    with pytest.raises(InputError, match=r"alike under .*cure, seed 0 with .*mart, seed 0"):
        written(tmp_path, *entrants)
    assert not list(tmp_path.iterdir())


def test_latex_escapes_names_and_keeps_every_column(tmp_path):
    cure = entrant("cure_official", {0: record(438, 98), 1: record(430, 98)})
    text = written(tmp_path, replace(cure, name=r"cure_official --x a&b\%"))[".tex"]
    assert r"cure\_official -{}-x a\&b\textbackslash \%" in text and r"C\&W-20" in text
    rows = [line for line in text.splitlines() if line.endswith(r" \\")]
    assert [len(re.findall(r"(?<!\\)&", row)) for row in rows] == [8, 8]
    assert r"\begin{tabular}{lrrrrrrrr}" in text and r"$43.40 \pm 0.57$" in text


def test_the_picture_stands_alone(tmp_path):
    runs = {0: record(438, 98), 1: record(421, 90)}
    text = written(tmp_path, entrant("cure", runs), entrant("mart", {}, s0="diverged"))[".svg"]
    tree = ElementTree.fromstring(text)
    assert tree.tag == "{http://www.w3.org/2000/svg}svg"
    words = ["".join(node.itertext()) for node in tree.iter("{http://www.w3.org/2000/svg}text")]
    assert "natural accuracy in %" in words and "accuracy in % under PGD-20" in words
    assert "cure" in words and "mart" not in words
    # Both bars, each a line of its own, in the method's colour.
    drawn = draw([Mark("cure", "cure", {"natural": [1.0, 3.0], "pgd20": [2.0, 5.0]})], ATTACKS)
    (bars,) = drawn.axes[0].containers
    (across,), (up,) = (bar.get_segments() for bar in bars[2])
    assert across[:, 0].tolist() == pytest.approx([2 - 2**0.5, 2 + 2**0.5])
    assert up[:, 1].tolist() == pytest.approx([3.5 - 4.5**0.5, 3.5 + 4.5**0.5])
    assert bars[0].get_color() == colour_of("cure")
