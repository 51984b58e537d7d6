"""Comparing two results: what is set beside what, what is flagged, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import compare
from bench.gpu import record

ROOT = Path(__file__).resolve().parents[2]


def part(path: Path, rows: dict[str, list[float] | None], **about: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    made = [{"key": {"engine": name, "batch": 4}, "seconds": s} for name, s in rows.items()]
    about = {"gpu": "NVIDIA H200", "torch": "2.11.0", **about}
    whole = {"format": record.FORMAT, "part": path.stem, "about": about, "rows": made}
    path.write_text(json.dumps(whole), encoding="utf-8")
    return path


def test_ratio_and_flag_of_each_row(tmp_path, capsys) -> None:
    a = part(tmp_path / "a" / "steps.json", {"fast": [0.9, 1.0, 1.1], "eager": [2.0, 3.0, 4.0]})
    b = part(tmp_path / "b" / "steps.json", {"fast": [1.2, 1.5, 1.6], "eager": [3.9, 4.5, 5.0]})
    assert compare.main([str(a), str(b)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["steps", "fast", "4", "1,000.000", "1,500.000", "1.500", "*"]
    assert lines[2].split() == ["steps", "eager", "4", "3,000.000", "4,500.000", "1.500"]
    assert "do not overlap" in lines[3] and len(lines) == 4


def test_rows_of_one_side_and_other_conditions_are_named(tmp_path, capsys) -> None:
    part(tmp_path / "a" / "steps.json", {"fast": [1, 1, 1], "eager": None, "authors": [2, 2, 2]})
    part(tmp_path / "b" / "steps.json", {"fast": None, "eager": [3, 3, 3]}, torch="2.12.0")
    assert compare.main([str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "steps: torch differs: 2.11.0 and 2.12.0",
        "only in A: steps fast 4",
        "only in A: steps authors 4",
        "only in B: steps eager 4",
        "no row was measured in both",
    ]


def test_folders_are_read_whole_and_other_json_in_them_is_passed_over(tmp_path) -> None:
    for name in ("steps", "feeds"):
        part(tmp_path / f"{name}.json", {"fast": [1, 2, 3]})
    (tmp_path / "tests.json").write_text("{}", encoding="utf-8")
    found = compare.read(tmp_path)
    assert found.rows == {"feeds fast 4": (1, 2, 3), "steps fast 4": (1, 2, 3)}
    assert set(found.about) == {"feeds", "steps"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "found nothing there"),
        ("{", "expected JSON, found none"),
        ("[1]", "found another file"),
        ('{"rows": []}', "found another file"),
        ({"fast": [3.0, 2.0, 1.0]}, "damaged file"),
        ({"fast": [1.0, 2.0]}, "damaged file"),
        ({"fast": [0.0, 0.0, 0.0]}, "damaged file"),
    ],
)
def test_missing_and_foreign_files_are_refused_in_one_line(tmp_path, capsys, content, said) -> None:
    path, good = tmp_path / "x.json", part(tmp_path / "good.json", {"fast": [1, 1, 1]})
    if isinstance(content, dict):
        part(path, content)
    elif content is not None:
        path.write_text(content, encoding="utf-8")
    assert compare.main([str(good), str(path)]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith(f"error: {path}: expected") and said in err
    assert err.count("\n") == 1


def test_a_folder_without_results_is_refused(tmp_path, capsys) -> None:
    assert compare.main([str(tmp_path), str(tmp_path)]) == 2
    assert "found a folder without one" in capsys.readouterr().err


positive = st.floats(1e-6, 1e3)


@given(st.lists(positive, min_size=3, max_size=3), st.lists(positive, min_size=3, max_size=3))
def test_ranges_overlap_where_they_share_a_point(a, b) -> None:
    a, b = sorted(a), sorted(b)
    share = max(a[0], b[0]) <= min(a[2], b[2])
    assert compare.differ(tuple(a), tuple(b)) is not share
    assert not compare.differ(tuple(a), tuple(a))


def test_it_runs_as_a_script_and_knows_the_format_that_is_written(tmp_path) -> None:
    assert compare.FORMAT == record.FORMAT
    path = part(tmp_path / "steps.json", {"fast": [1, 1, 1]})
    command = [sys.executable, str(ROOT / "bench" / "compare.py"), str(path), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0 and "1.000\n" in done.stdout, done.stderr
