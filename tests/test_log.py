"""The record of metrics: rows, resumption, a cut last line, a failing TensorBoard."""

from __future__ import annotations

import pytest
import torch

from cure_fast.log import RunLog, drop_rows_from, duration, epoch_line, read_rows


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


def open_log(folder, upto_step=None, tensorboard=False):
    return RunLog(folder, "train", epochs=3, tensorboard=tensorboard, upto_step=upto_step)


def test_rows_come_back_and_the_epoch_prints_a_line(tmp_path, capsys):
    log = open_log(tmp_path)
    log.step(0, 0.0, 0.1, {"total": torch.tensor(2.0)})
    log.epoch(row(1, 5))
    log.close()
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [r["event"] for r in rows] == ["step", "epoch"]
    assert rows[0]["terms"] == {"total": 2.0} and rows[1]["validation"]["robust"] == 50.0
    assert capsys.readouterr().out.startswith("train epoch   1/3  loss 1.500  val natural 90.0 %")


def test_resuming_drops_what_is_written_again(tmp_path):
    log = open_log(tmp_path)
    for epoch in (1, 2):
        log.step(5 * epoch - 5, epoch - 1.0, 0.1, {"total": torch.tensor(2.0)})
        log.epoch(row(epoch, 5 * epoch))
    log.close()
    drop_rows_from(tmp_path / "metrics.jsonl", "train", 5)
    kept = [(r["event"], r["step"]) for r in read_rows(tmp_path / "metrics.jsonl")]
    assert kept == [("step", 0), ("epoch", 5)]
    drop_rows_from(tmp_path / "metrics.jsonl", "pretrain", 0)
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 2


def test_a_last_line_that_was_cut_off_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "step", "stage": "train", "step": 1}\n{"event": "st')
    assert len(read_rows(path)) == 1
    assert read_rows(tmp_path / "none.jsonl") == []


def test_tensorboard_events_are_written_and_its_failure_costs_one_warning(tmp_path, capsys):
    log = open_log(tmp_path, tensorboard=True)
    log.epoch(row(1, 5))
    assert list((tmp_path / "tensorboard").rglob("events*"))

    class Broken:
        def add_scalar(self, *arguments):
            raise RuntimeError("no disk")

    log.tensorboard = Broken()
    log.epoch(row(2, 10))
    log.epoch(row(3, 15))
    log.close()
    assert capsys.readouterr().err.count("warning") == 1
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 3


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.4, "4 s"), (89, "89 s"), (700, "12 min"), (12_600, "3.5 h")]
)
def test_times_read_well(seconds, text):
    assert duration(seconds) == text


def test_the_line_says_how_long_the_stage_still_takes():
    assert epoch_line("train", 3, row(1, 5)).endswith("2 s left")
    assert "left" not in epoch_line("train", 3, row(3, 15))


def test_the_line_of_natural_training_has_no_robust_accuracy():
    plain = row(1, 5)
    plain["validation"] = {"natural": 90.0, "robust": None, "attack": None, "count": 10}
    assert "val natural 90.0 %  lr" in epoch_line("pretrain", 3, plain)
