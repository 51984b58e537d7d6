"""The record of metrics: rows, resumption, cut and damaged lines, the line of an epoch."""

from __future__ import annotations

import csv
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cure_fast.errors import InputError
from cure_fast.runs.log import RunLog, drop_rows_from, epoch_line, read_rows


def row(epoch, step):
    return {
        "epoch": epoch,
        "step": step,
        "lr": 0.1,
        "terms": {"total": 1.5},
        "images": 10,
        "seconds": 1.0,
        "images_per_s": 10.0,
        "validation": {"natural": 90.0, "robust": 50.0, "attack": "pgd10", "count": 10},
    }


def open_log(folder):
    return RunLog(folder, "train", epochs=3, tensorboard=False, upto_step=0, upto_epoch=0)


def test_rows_come_back_and_the_epoch_prints_a_line(tmp_path, capsys):
    log = open_log(tmp_path)
    log.step(0, 0.0, 0.1, {"total": torch.tensor(2.0)})
    log.epoch(row(1, 5))
    log.close()
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [r["event"] for r in rows] == ["step", "epoch"]
    assert rows[0]["terms"] == {"total": 2.0} and rows[1]["validation"]["robust"] == 50.0
    assert capsys.readouterr().out.startswith("train epoch   1/3  loss 1.500  val natural 90.0 %")


def test_epochs_are_a_table_that_a_resumed_run_writes_alike(tmp_path):
    def table(folder, *stops):
        folder.mkdir()
        for first, last in pairwise((0, *stops)):
            log = RunLog(
                folder, "train", epochs=9, tensorboard=False, upto_step=5 * first, upto_epoch=first
            )
            for epoch in range(first + 1, last + 1):
                found = row(epoch, 5 * epoch)
                log.epoch(found | ({"validation": None} if epoch == 1 else {}))
            log.close()
        return (folder / "metrics.csv").read_text()

    whole = table(tmp_path / "whole", 3)
    assert table(tmp_path / "broken", 1, 3) == whole
    # Killed after epoch 2, whose checkpoint was not written.
    again = tmp_path / "again"
    table(again, 2)
    again_log = RunLog(again, "train", epochs=9, tensorboard=False, upto_step=5, upto_epoch=1)
    for epoch in (2, 3):
        again_log.epoch(row(epoch, 5 * epoch))
    assert (again / "metrics.csv").read_text() == whole
    lines = list(csv.DictReader(whole.splitlines()))
    assert [(line["stage"], line["epoch"], line["step"]) for line in lines] == [
        ("train", str(epoch), str(5 * epoch)) for epoch in (1, 2, 3)
    ]
    assert [line["validation/robust"] for line in lines] == ["", "50.0", "50.0"]


def test_resuming_drops_what_is_written_again(tmp_path):
    log = open_log(tmp_path)
    for epoch in (1, 2):
        log.step(5 * epoch - 5, epoch - 1.0, 0.1, {"total": torch.tensor(2.0)})
        log.epoch(row(epoch, 5 * epoch))
    log.close()
    drop_rows_from(tmp_path / "metrics.jsonl", "train", 5, 1)
    kept = [(r["event"], r["step"]) for r in read_rows(tmp_path / "metrics.jsonl")]
    assert kept == [("step", 0), ("epoch", 5)]
    drop_rows_from(tmp_path / "metrics.jsonl", "pretrain", 0, 0)
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 2


def test_a_last_line_that_was_cut_off_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "step", "stage": "train", "step": 1}\n{"event": "st')
    assert len(read_rows(path)) == 1
    assert read_rows(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize(
    "damaged",
    [
        b"{",
        b"\xff\xfe",
        b"[]",
        b"null",
        b"3",
        b"[" * 100_000,
        b'{"event": "step", "step": 1}',
        b'{"event": "step", "stage": "train", "step": "1"}',
        b'{"event": "epoch", "stage": "train", "step": 1}',
        b'{"event": "fire", "stage": "train", "step": 1}',
    ],
    ids=range(10),
)
def test_a_damaged_line_in_the_middle_is_named(tmp_path, damaged):
    path = tmp_path / "metrics.jsonl"
    good = b'{"event": "step", "stage": "train", "step": 1}\n'
    path.write_bytes(good + damaged + b"\n" + good)
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 2: expected a JSON object") as info:
        read_rows(path)
    assert "\n" not in str(info.value) and len(str(info.value)) < 400
    with pytest.raises(InputError, match="line 2"):
        open_log(tmp_path)
    assert path.read_bytes() == good + damaged + b"\n" + good


@given(st.binary(max_size=60))
def test_any_bytes_are_rows_or_refused(folder, noise):
    path = folder / "metrics.jsonl"
    path.write_bytes(b'{"event": "step", "stage": "train", "step": 1}\n' + noise + b"\n")
    try:
        rows = read_rows(path)
    except InputError as error:
        assert ", line " in str(error)
    else:
        assert len(rows) == 1 and not noise.strip(b"\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("rows")


def test_dropping_nothing_leaves_the_file_alone_and_a_cut_line_goes(tmp_path):
    path = tmp_path / "metrics.jsonl"
    drop_rows_from(path, "train", 0, 0)
    assert not path.exists()
    path.write_text('{"event": "step", "stage": "train", "step": 1}\n')
    before = path.stat()
    drop_rows_from(path, "train", 2, 1)
    assert path.stat().st_ino == before.st_ino
    with path.open("a") as file:
        file.write('{"event": "st')
    drop_rows_from(path, "train", 2, 1)
    assert path.read_text() == '{"event": "step", "stage": "train", "step": 1}\n'


def test_steps_left_out_are_told(tmp_path, capsys):
    log = open_log(tmp_path)
    log.step(0, 0.0, 0.1, {"total": torch.tensor(2.0)}, skipped=2)
    log.step(1, 0.0, 0.1, {"total": torch.tensor(2.0)})
    log.epoch(row(1, 5) | {"skipped": 3})
    log.epoch(row(2, 10) | {"skipped": 0})
    log.close()
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [r.get("skipped") for r in rows] == [2, None, 3, 0]
    first, second = capsys.readouterr().out.splitlines()
    assert "loss 1.500  skipped 3  val" in first and "skipped" not in second


def test_the_line_of_natural_training_has_no_robust_accuracy():
    plain = row(1, 5)
    plain["validation"] = {"natural": 90.0, "robust": None, "attack": None, "count": 10}
    assert "val natural 90.0 %  lr" in epoch_line("pretrain", 3, plain)
