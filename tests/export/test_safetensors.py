"""The exported weights rebuild the network by what they say of themselves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cure_fast.cli.main import main
from cure_fast.export import command
from cure_fast.export.source import describe
from cure_fast.models.building import load_model
from cure_fast.models.weights import read_metadata


@pytest.fixture
def exported(run: Path, tmp_path: Path, capsys) -> Path:
    out = tmp_path / "deep" / "ünïcode" / "net.safetensors"
    assert main(["export", str(run), "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "equal predictions on 360 test images of digits and 640 random ones" in text
    assert "by at most 0\n" in text
    return out


def test_the_file_says_all_that_the_network_needs(exported: Path) -> None:
    told = read_metadata(exported)
    expected = {
        "model": "resnet-small",
        "width": "4",
        "stem": "cifar",
        "num_classes": "10",
        "data": "digits",
        "eps": "0.15",
        "mean": "0.305400014,0.305400014,0.305400014",
        "std": "0.375999987,0.375999987,0.375999987",
        "input": "images [N, 3, H, W], float32 in [0, 1], RGB",
    }
    assert {key: told[key] for key in expected} == expected
    assert json.loads(told["classes"]) == [str(digit) for digit in range(10)]
    assert np.float32(told["mean"].split(",")[0]) == np.float32(0.3054)


def test_a_published_width_is_written_out(make_source) -> None:
    source = make_source("resnet-small", told={"width": ""})
    assert describe(source)["width"] == "16" and describe(source)["normalization"] == "none"


def test_it_loads_to_the_same_network(run: Path, exported: Path) -> None:
    images = torch.rand(5, 3, 8, 8)
    first = load_model(run / "model.safetensors", read_metadata(run / "model.safetensors"))
    second = load_model(exported, read_metadata(exported))
    assert torch.equal(first.eval()(images), second.eval()(images))
    assert main(["eval", str(exported), "--attacks", "natural", "--limit", "8"]) == 0


def test_a_file_is_exported_like_a_run(exported: Path, capsys) -> None:
    assert main(["export", str(exported)]) == 0
    again = exported.parent / "export" / "net.safetensors"
    assert f"exported: {again}" in capsys.readouterr().out.replace("\\xfc", "ü")
    first, second = read_metadata(exported), read_metadata(again)
    # What the run knew of its classes is kept.
    assert {k: v for k, v in first.items() if k != "source_sha256"} == {
        k: v for k, v in second.items() if k != "source_sha256"
    }


def test_a_wrong_file_is_not_kept_and_the_old_one_stays(
    run: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    def damaged(model, path, metadata):
        changed = load_model(run / "model.safetensors", read_metadata(run / "model.safetensors"))
        changed.linear.weight.data.neg_()
        save(changed, path, metadata)

    save = command.save_weights
    monkeypatch.setattr(command, "save_weights", damaged)
    out = tmp_path / "net.safetensors"
    assert main(["export", str(run), "--out", str(out)]) == 2
    assert "predictions differ" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    out.write_text("old")
    assert main(["export", str(run), "--out", str(out), "--force"]) == 2
    assert out.read_text() == "old" and list(tmp_path.iterdir()) == [out]
