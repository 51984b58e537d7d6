"""The ONNX file in ONNX Runtime: the same predictions, normalisation inside, any batch size."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from cure_fast.cli.main import main
from cure_fast.loaders import read_dataset
from cure_fast.models.building import load_model
from cure_fast.models.weights import read_metadata


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    out = tmp_path_factory.mktemp("onnx") / "net.onnx"
    assert main(["export", str(run), "--format", "onnx", "--out", str(out)]) == 0
    return out


def test_the_runtime_predicts_as_the_network_does(run: Path, exported: Path) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(exported), providers=["CPUExecutionProvider"])
    assert [put.name for put in session.get_inputs()] == ["images"]
    assert session.get_inputs()[0].shape == ["batch", 3, 8, 8]
    test = read_dataset("digits", Path("data"), "test")
    images = test.images.transpose(0, 3, 1, 2).astype(np.float32) / 255
    model = load_model(run / "model.safetensors", read_metadata(run / "model.safetensors")).eval()
    with torch.inference_mode():
        expected = model(torch.from_numpy(images)).numpy()
    for size in (1, 3, len(images)):
        (logits,) = session.run(["logits"], {"images": images[:size]})
        np.testing.assert_allclose(logits, expected[:size], atol=1e-5)
        assert (logits.argmax(1) == expected[:size].argmax(1)).all()


def test_it_is_one_file_that_describes_itself_and_not_this_machine(exported: Path) -> None:
    import onnx

    assert list(exported.parent.iterdir()) == [exported]
    model = onnx.load(str(exported))
    told = {prop.key: prop.value for prop in model.metadata_props}
    assert told["normalization"] == "first layer of the network" and told["eps"] == "0.15"
    content = exported.read_bytes()
    for trace in (__file__, "cure_fast/", "site-packages"):
        assert trace.encode() not in content


def test_convolutions_keep_their_strides(exported: Path) -> None:
    import onnx

    nodes = onnx.load(str(exported)).graph.node
    settings = [setting for node in nodes for setting in node.attribute if node.op_type == "Conv"]
    strides = [tuple(setting.ints) for setting in settings if setting.name == "strides"]
    assert strides.count((2, 2)) == 4
    assert not [node for node in nodes if node.op_type == "Slice"]


@pytest.mark.parametrize("absent", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_package_is_named_with_the_command(
    run: Path, tmp_path: Path, monkeypatch, capsys, absent: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: name != absent and find(name, *more)
    )
    out = tmp_path / "net.onnx"
    assert main(["export", str(run), "--format", "onnx", "--out", str(out)]) == 2
    text = capsys.readouterr().err
    assert "pip install onnx onnxruntime onnxscript" in text and text.count("\n") == 1
    assert not out.exists()
