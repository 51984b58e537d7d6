"""What `cure-fast export` refuses, each in one line with exit code 2, and what it leaves alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cure_fast.cli.main import main
from cure_fast.errors import InputError
from cure_fast.export.verify import check_equal, trial_images


@pytest.fixture
def here(tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to be in, with a link to the run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").symlink_to(run)
    save_file({"linear.weight": torch.zeros(2, 2)}, tmp_path / "foreign.safetensors")
    (tmp_path / "empty").mkdir()
    (tmp_path / "taken.safetensors").write_text("old")
    return tmp_path


WRONG = {
    "export": "export",
    "export nowhere": "nowhere",
    "export empty": "config.json",
    "export foreign.safetensors": "does not say its model, num_classes, data",
    "export taken.safetensors": "taken.safetensors",
    "export run --format keras": "safetensors",
    "export run --layout sub_block1": "only for --format robustbench",
    "export run --layout other": "sub_block1",
    "export run --format onnx --out net.safetensors": "ending in .onnx",
    "export run --format robustbench --out net.onnx": "ending in .pt",
    "export run --out net": "ending in .safetensors",
    "export run --out taken.safetensors": "--force",
    "export run --out run/model.safetensors --force": "the file to export",
    "export run --out empty/": "ending in .safetensors",
    "export run --out taken.safetensors/net.safetensors": "cannot make the folder",
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_input_exits_with_2_and_says_what_to_do(words: str, here: Path, capsys) -> None:
    before = {path: path.stat().st_mtime_ns for path in here.rglob("*")}
    try:
        code = main(words.split())
    except SystemExit as stop:
        code = stop.code
    output = capsys.readouterr()
    assert code == 2 and WRONG[words] in output.err + output.out
    assert {path: path.stat().st_mtime_ns for path in here.rglob("*")} == before


def test_a_run_without_weights_is_refused(here: Path, run: Path, capsys) -> None:
    (here / "new").mkdir()
    (here / "new" / "config.json").write_bytes((run / "config.json").read_bytes())
    assert main(["export", "new"]) == 2
    assert "the run has no model.safetensors yet" in capsys.readouterr().err


def test_results_that_are_no_json_are_refused(here: Path, run: Path, capsys) -> None:
    (here / "new").mkdir()
    for name in ("config.json", "model.safetensors"):
        (here / "new" / name).write_bytes((run / name).read_bytes())
    for text in ("{", "[]"):
        (here / "new" / "results.json").write_text(text)
        assert main(["export", "new"]) == 2
        assert "results.json" in capsys.readouterr().err
    (here / "new" / "results.json").unlink()
    assert main(["export", "new"]) == 0
    assert "the run has no results.json" in capsys.readouterr().out


def test_force_replaces_and_a_second_export_does_not(here: Path, capsys) -> None:
    words = ["export", "run", "--out", "taken.safetensors"]
    assert main([*words, "--force"]) == 0
    written = Path("taken.safetensors").read_bytes()
    assert len(written) > 1000
    assert main(words) == 2
    assert Path("taken.safetensors").read_bytes() == written


def constant(logits: list[list[float]]):
    return lambda images: torch.tensor(logits).expand(len(images), -1)


@pytest.mark.parametrize(
    ("exported", "message"),
    [
        ([[1.0, 2.0, 0.0]], "5 of 5 predictions differ"),
        ([[2.01, 1.0, 0.0]], "logits differ by up to 0.01"),
        ([[2.0, 1.0]], "shape"),
        ([[float("nan"), 1.0, 0.0]], "does not compute"),
        ([[2.0, 1.0, float("nan")]], "does not compute"),
    ],
)
def test_what_computes_something_else_is_seen(exported: list[list[float]], message: str) -> None:
    model, images = constant([[2.0, 1.0, 0.0]]), torch.zeros(5, 3, 8, 8)
    assert check_equal(model, constant([[2.0, 1.0, 1e-6]]), images) == pytest.approx(1e-6)
    with pytest.raises(InputError, match=message):
        check_equal(model, constant(exported), images)


def test_images_are_the_test_images_or_the_same_random_ones(make_source, tmp_path: Path) -> None:
    images, told = trial_images(
        make_source("resnet-small", told={"data": "digits"}), None, count=400
    )
    assert images.shape == (400, 3, 8, 8) and images.dtype == torch.float32
    assert told == "360 test images of digits and 40 random ones"
    assert 0 <= images.min() and images.max() == 1
    absent = make_source("resnet-small", told={"data": "cifar100"})
    first, second = (trial_images(absent, str(tmp_path), count=7) for _ in range(2))
    assert torch.equal(first[0], second[0]) and first[0].shape == (7, 3, 32, 32)
    assert first[1].startswith("7 random images of 32x32 pixels, as cifar100 is not in")
