"""What all analyses share: opening, names, parts that are kept, files, the command, the page."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
import torch

import cure_fast
from cure_fast.analysis import ANALYSES
from cure_fast.analysis.kept import Kept
from cure_fast.analysis.shape import Subject, distinct
from cure_fast.cli.main import main
from cure_fast.errors import InputError, StoppedError
from cure_fast.figures import PAPER, colour_of, colours
from cure_fast.methods import METHODS
from cure_fast.report.analyses import as_image
from tiny_command import tiny_words

ROOT_ATTRIBUTES = {name.replace("-", "_") for name in ANALYSES}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished tiny run."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert main(tiny_words("--cache", str(folder.parent / "cache"), out=str(folder))) == 0
    return folder


def test_an_analysis_is_called_by_the_name_of_its_file():
    for name in ROOT_ATTRIBUTES:
        assert getattr(cure_fast.analysis, name) is ANALYSES[name.replace("_", "-")]


def test_an_analysis_of_a_run_writes_figure_numbers_and_a_section(run, capsys):
    words = ["analyze", "eps-sweep", str(run), "--limit", "20", "--radii", "4/255,0.9"]
    assert main(words) == 0
    place = run / "analysis"
    for ending in ("svg", "png", "pdf", "json", "csv"):
        assert (place / f"eps-sweep.{ending}").stat().st_size > 60
    first = json.loads((place / "eps-sweep.json").read_text())
    assert first["images"] == 20 and [row["eps"] for row in first["rows"]][:2] == [0, 4 / 255]
    page = (run / "report.html").read_text()
    assert 'id="analysis-eps-sweep"' in page and "CURE, Fig. 5b" in page
    # The same once more reads what is kept.
    parts = list((place / "parts").glob("eps-sweep-*.json"))
    stored = Kept(parts[0]).read()
    Kept(parts[0]).write(stored | {next(iter(stored)): 12.5})
    assert main(words) == 0
    assert json.loads((place / "eps-sweep.json").read_text())["rows"][0]["accuracy"] == 12.5
    # Other images are another file.
    assert main([*words, "--limit", "21"]) == 0
    assert len(list((place / "parts").glob("eps-sweep-*.json"))) == 2
    # Elsewhere nothing is read from here.
    assert main([*words, "--out", "elsewhere"]) == 0
    assert json.loads(Path("elsewhere/eps-sweep.json").read_text()) == first
    capsys.readouterr()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("", "expected the name of an analysis before all else, got nothing"),
        ("--limit 3", "expected the name of an analysis before all else, got '--limit' first"),
        ("eps-swep x", "NAME: expected one of"),
        ("eps-sweep", "expected at least 1 of run folders or files of weights, got 0"),
        ("eps-sweep nowhere", "nowhere: expected a run folder or a file of weights"),
        ("eps-sweep nowhere --limit 0", "--limit: expected a number at least 1"),
        ("eps-sweep nowhere --radius 1", "unknown flag '--radius'"),
        ("eps-sweep RUN --radii 0", "--radii: expected"),
        ("eps-sweep RUN --radii 2", "--radii: expected"),
        ("eps-sweep RUN --attack foo", "foo"),
        ("eps-sweep RUN --width 3", "--width: only for a file of weights"),
    ],
)
def test_wrong_words_are_a_line_and_write_nothing(words, told, run, capsys, folder):
    before = sorted(run.rglob("*"))
    code = main(["analyze", *words.replace("RUN", str(run)).split()])
    _, err = capsys.readouterr()
    assert code == 2 and told in err and err.count("\n") == 1
    assert sorted(run.rglob("*")) == before and not list(folder.iterdir())


def test_help_lists_all_analyses(capsys):
    assert main(["analyze", "--help"]) == 0
    told = capsys.readouterr().out
    assert all(name in told for name in ANALYSES)
    assert main(["analyze", "eps-sweep", "--help"]) == 0
    assert "--radii" in capsys.readouterr().out


def test_parts_are_heard_between_and_kept(tmp_path):
    asked = []
    kept = Kept(tmp_path / "deep/parts.json", stop=lambda: len(asked) == 2)

    def part(number):
        asked.append(number)
        return number

    parts = {str(n): lambda n=n: part(n) for n in range(4)}
    with pytest.raises(StoppedError):
        kept.each(parts)
    assert Kept(kept.path).each(parts) == {"0": 0, "1": 1, "2": 2, "3": 3}
    assert asked == [0, 1, 2, 3]
    # Neither a torn file nor one that somebody changed is taken for what was computed.
    for damaged in ("{", "[]", '{"digest": "0", "parts": {"0": 5}}'):
        kept.path.write_text(damaged)
        assert Kept(kept.path).each({"0": lambda: 7}) == {"0": 7}


def test_names_of_subjects_differ():
    same = [Subject("CURE", origin="a"), Subject("CURE", origin="b"), Subject("TRADES")]
    assert [s.name for s in distinct(same)] == ["CURE (a)", "CURE (b)", "TRADES"]
    assert [s.name for s in distinct([Subject("Net"), Subject("Net")])] == ["Net (1)", "Net (2)"]


def test_a_method_has_its_colour_its_runs_shades_of_it_and_others_free_ones():
    found = colours([{"method": m} for m in ("", "cure", "", "cure", "cure_official", "trades")])
    assert found[1] == colour_of("cure") and found[5] == colour_of("trades")
    assert len({*found}) == len(found)
    clash = next(m for m in METHODS if m[:4] != "cure" and colour_of(m) == colour_of("cure"))
    together = [{"method": "cure"}, {"method": clash}]
    own, other = colours(together)
    assert own == colour_of("cure") != other and colours(together[::-1]) == [other, own]


@pytest.mark.parametrize("name", ["a$b_{$", "_hidden"])
def test_names_are_shown_as_they_are(name, linear, images, labels, tmp_path):
    result = cure_fast.analysis.eps_sweep({name: linear}, images, labels, radii=[0.1])
    result.save(tmp_path)
    assert name in (tmp_path / "eps-sweep.svg").read_text()


def test_radii_of_l2_go_beyond_its_ball(linear, images, labels):
    result = cure_fast.analysis.eps_sweep(linear, images, labels, norm="l2", eps=0.5)
    assert max(row["eps"] for row in result.rows) > 0.5 and result.rows[-1]["accuracy"] == 0
    axes = result.figure().axes[0]
    assert "L2" in axes.get_xlabel() and axes.get_xlim()[1] > 0.5


def test_what_python_hands_over_is_checked(linear, images, labels):
    sweep = cure_fast.analysis.eps_sweep
    with pytest.raises(InputError, match="one per image"):
        sweep(linear, images, labels[:-1])
    with pytest.raises(InputError, match="images: expected"):
        sweep(linear, None, labels)
    with pytest.raises(InputError, match="batch-size"):
        sweep(linear, images, labels, batch_size=0)
    with pytest.raises(InputError, match="radius"):
        sweep(linear, images, labels, radius=1)
    state = {k: v.clone() for k, v in linear.state_dict().items()}
    result = sweep({"mine": linear}, images, labels, radii=[0.1], eps="8/255")
    assert result.numbers["subjects"] == [{"name": "mine", "method": "", "origin": ""}]
    assert all(torch.equal(state[k], v) for k, v in linear.state_dict().items())
    assert result.figure().get_size_inches()[0] == pytest.approx(3.4)


def test_saved_figures_are_the_same_bytes_each_time(linear, images, labels, tmp_path):
    result = cure_fast.analysis.eps_sweep(linear, images, labels, radii=[0.1])
    for name in ("a", "b"):
        result.save(tmp_path / name)
    for ending in ("svg", "json", "csv"):
        first, second = ((tmp_path / n / f"eps-sweep.{ending}").read_bytes() for n in "ab")
        assert first == second
    drawing = as_image((tmp_path / "a/eps-sweep.svg").read_text())
    text = base64.b64decode(drawing.partition(",")[2]).decode()
    # In the dark letters and what lies behind change, and hatches stay visible.
    assert "prefers-color-scheme:dark" in text and "var(--paper)" in text and PAPER not in text
