from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cure_fast.errors import InputError
from cure_fast.report import write_report

Read = Callable[[Path], Any]
Make = Callable[..., Path]


def test_an_unfinished_run_says_how_far_it_is(page_of: Read, new_run: Make) -> None:
    page = page_of(new_run(train=4, environment=False))
    assert "Training is not finished: 4 of 15 epochs in 2 min 4 s" in page.text
    assert (
        "The best epoch so far, 4, reaches" in page.text and "on 500 validation images" in page.text
    )
    assert "results.json is not in this folder" in page.text
    assert "examples.npz is not in this folder" in page.text
    assert page.text.count("environment.json is not in this folder") == 2


def test_a_finished_run_without_results_asks_for_evaluation(page_of: Read, new_run: Make) -> None:
    text = page_of(new_run()).text
    assert "Training is finished (15 of 15 epochs in 7 min 45 s), but it is not evaluated" in text
    assert "cure-fast eval RUN" in text


def test_a_run_that_has_not_logged_yet(page_of: Read, new_run: Make) -> None:
    page = page_of(new_run(pretrain=0, train=0))
    assert "metrics.jsonl holds no step and no epoch yet" in page.text
    assert "no epoch has been validated." in page.text


def test_a_run_killed_in_its_first_epoch(page_of: Read, new_run: Make) -> None:
    folder = new_run(pretrain=0, train=1)
    rows = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("".join(f"{r}\n" for r in rows if '"step",' in r))
    page = page_of(folder)
    assert "No epoch with a validation has finished yet." in page.text
    assert "0 of 15 epochs" in page.text


def test_the_best_epoch_is_the_trainers(page_of: Read, new_run: Make) -> None:
    folder = new_run(pretrain=0, train=4)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    scores = iter([(60.0, 30.0), (61.0, 35.0), (62.0, 35.0), (62.0, 35.0)])
    for row in rows:
        if row["event"] == "epoch":
            row["validation"]["natural"], row["validation"]["robust"] = next(scores)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = page_of(folder)
    # Robust accuracy decides, natural breaks the tie, the earlier of two equals stays.
    assert "best: epoch 3" in page.text
    assert page.row("3 (best)")[1:3] == ["62.0", "35.0"]


def test_only_a_last_line_may_be_cut_off(page_of: Read, complete_run: Path) -> None:
    path = complete_run / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole[:-30])
    text = page_of(complete_run).text
    assert "The last line of metrics.jsonl was cut off and is left out." in text
    assert "14 of 15 epochs" in text
    lines = whole.splitlines()
    path.write_text("\n".join([*lines[:5], lines[5][:20], *lines[6:]]) + "\n")
    with pytest.raises(InputError, match="line 6"):
        write_report(complete_run)


def test_an_epoch_written_twice_counts_once(page_of: Read, complete_run: Path) -> None:
    path = complete_run / "metrics.jsonl"
    path.write_text(path.read_text() + path.read_text().splitlines()[-1] + "\n")
    assert "Training: 15 of 15 epochs" in page_of(complete_run).text


def test_other_events_are_ignored(complete_run: Path) -> None:
    before = write_report(complete_run).read_bytes()
    path = complete_run / "metrics.jsonl"
    note = {"event": "note", "stage": "train", "epoch": 1, "step": 1}
    path.write_text(json.dumps(note) + "\n" + path.read_text())
    size = re.compile(rb"[\d.]+ kB")
    assert size.sub(b"", write_report(complete_run).read_bytes()) == size.sub(b"", before)


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl"])
def test_a_missing_needed_file_is_an_input_error(complete_run: Path, name: str) -> None:
    (complete_run / name).unlink()
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        write_report(complete_run)
    assert not (complete_run / "report.html").exists()


@pytest.mark.parametrize(
    "name", ["config.json", "environment.json", "results.json", "examples.npz"]
)
@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b"PK\x03\x04 torn"])
def test_a_damaged_file_is_an_input_error(complete_run: Path, name: str, content: bytes) -> None:
    (complete_run / name).write_bytes(content)
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        write_report(complete_run)


def test_a_torn_examples_file_is_an_input_error(complete_run: Path) -> None:
    path = complete_run / "examples.npz"
    whole = bytearray(path.read_bytes())
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="reading failed"):
        write_report(complete_run)
    whole[len(whole) // 3] ^= 0xFF
    path.write_bytes(whole)
    with pytest.raises(InputError, match="reading failed"):
        write_report(complete_run)


def test_pickled_examples_are_refused(complete_run: Path) -> None:
    arrays = {"natural": np.array([object()], dtype=object), "labels": np.zeros(1, int)}
    np.savez(complete_run / "examples.npz", **arrays)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="allow_pickle"):
        write_report(complete_run)


def test_a_number_that_contradicts_its_count_is_refused(
    new_run: Make, results: dict[str, Any]
) -> None:
    results["models"]["trained"]["attacks"]["aa"]["accuracy"] = 51.2
    with pytest.raises(InputError, match="contradicts 80 of 256"):
        write_report(new_run(results=results))


@pytest.mark.parametrize("correct, count", [(257, 256), (-1, 256), (0, 0)])
def test_an_impossible_count_is_refused(
    new_run: Make, results: dict[str, Any], correct: int, count: int
) -> None:
    score = results["models"]["trained"]["attacks"]["aa"]
    score |= {"correct": correct, "count": count, "accuracy": 0.0}
    with pytest.raises(InputError, match="correct"):
        write_report(new_run(results=results))


def test_writing_is_atomic_and_repeatable(complete_run: Path) -> None:
    first = write_report(complete_run)
    assert first == complete_run / "report.html"
    content = first.read_bytes()
    assert write_report(complete_run).read_bytes() == content
    (complete_run / "results.json").write_text("{")
    with pytest.raises(InputError):
        write_report(complete_run)
    assert first.read_bytes() == content
    assert [p.name for p in complete_run.iterdir() if p.name.startswith(".")] == []


def test_a_long_run_takes_seconds(new_run: Make, results: dict[str, Any]) -> None:
    folder = new_run(pretrain=200, train=200, results=results)
    step = json.dumps(
        {
            "event": "step",
            "stage": "train",
            "epoch": 3.3,
            "step": 9,
            "lr": 0.1,
            "terms": {"total": 1.0},
        }
    )
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(f"{step}\n" * 20_000)
    started = time.process_time()
    path = write_report(folder)
    assert time.process_time() - started < 5
    assert path.stat().st_size < 2_000_000


def test_an_epoch_without_images_is_left_out_of_the_speed(
    page_of: Read, complete_run: Path
) -> None:
    path = complete_run / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[-1]["images_per_s"] = 0.0
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = page_of(complete_run)
    assert "epoch 14: " in page.text and page.row("15")[4] == "0"
