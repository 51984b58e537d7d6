"""Data that cannot be trained on, as the command line and the job answer it.

What else can be wrong with images and files: tests/loaders.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cure_fast.cli.main import main
from cure_fast.runs.log import read_rows
from cure_fast.training.job import train
from tiny_job import tiny


def empty_class(photos: Path) -> None:
    for file in (photos / "train" / "bee").iterdir():
        file.unlink()


def empty_test_class(photos: Path) -> None:
    for file in (photos / "test" / "cat").iterdir():
        file.unlink()


def one_image(photos: Path) -> None:
    for name in ("bee", "cat"):
        for i in range(1, 4):
            (photos / "train" / name / f"{i}.png").unlink()


def one_class(photos: Path) -> None:
    for split in ("train", "test"):
        (photos / split / "cat").rename(photos / f"away-{split}")


def another_test_class(photos: Path) -> None:
    (photos / "test" / "cat").rename(photos / "test" / "cow")


def float_image(photos: Path) -> None:
    (photos / "train" / "bee" / "2.png").unlink()
    values = np.full((8, 8), 300.0, np.float32)
    Image.fromarray(values).save(photos / "train" / "bee" / "2.tiff")


def sixteen_bits(photos: Path) -> None:
    values = np.full((8, 8), 40_000, np.uint16)
    Image.fromarray(values).save(photos / "train" / "bee" / "2.png")


def other_size(photos: Path) -> None:
    Image.new("RGB", (8, 9)).save(photos / "train" / "cat" / "3.png")


def cut_file(photos: Path) -> None:
    file = photos / "test" / "cat" / "1.png"
    file.write_bytes(file.read_bytes()[:40])


FOLDERS: dict[Callable[[Path], None], str] = {
    empty_class: "bee: the class is empty; expected image files",
    empty_test_class: "test/cat: the class is empty; expected image files",
    one_image: "expected at least two training images of every class",
    one_class: "expected at least two class folders, got 1",
    another_test_class: "got them without cat and with cow besides",
    float_image: "2.tiff: expected 8 bits per channel, got an image of mode F",
    sixteen_bits: "2.png: expected 8 bits per channel, got an image of mode I;16",
    other_size: "train/bee/2.png, got 8x9; bring all images to one size",
    cut_file: "1.png: the image cannot be read",
}


@pytest.mark.parametrize("change", FOLDERS, ids=lambda change: change.__name__)
def test_bad_folders_are_refused_before_training(photos, tmp_path, capsys, monkeypatch, change):
    monkeypatch.chdir(tmp_path)
    change(photos)
    words = f"train quickstart --data folder:{photos} --val-images 2 --loader resident --out run"
    assert main(words.split()) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1 and FOLDERS[change] in told[0], told
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--batch-size 1", "--batch-size: expected at least 2, got 1: BatchNorm"),
        ("--train-images 1", "--train-images: expected 10 to"),
        ("--val-images 1", "--val-images: expected 10 to"),
    ],
)
@pytest.mark.parametrize("loader", ["resident", "torch"])
def test_numbers_that_leave_one_image_are_refused(
    tmp_path, capsys, monkeypatch, flags, expected, loader
):
    monkeypatch.chdir(tmp_path)
    assert main(f"train quickstart --loader {loader} --out run {flags}".split()) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1 and expected in told[0], told
    assert not (tmp_path / "run").exists()


def test_a_last_batch_of_one_image_is_passed_over(tmp_path, capsys):
    """ResNet-18 sees images of 8 pixels as one pixel in the end: BatchNorm raises for one image."""
    from cure_fast.models import build_model

    model = build_model("resnet18", num_classes=10, width=2)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model.train()(torch.zeros(1, 3, 8, 8))
    config = tiny(
        tmp_path, "natural", epochs=1, data={"train_images": 65}, pretrain={"pretrain_epochs": 0}
    )
    folder = train(config)
    assert "leave one over, which is passed over" in capsys.readouterr().out
    steps = [row for row in read_rows(folder / "metrics.jsonl") if row["event"] == "step"]
    assert len(steps) == 2  # of 32 images each


def test_labels_of_a_damaged_cifar_file_are_never_read(tmp_path, capsys, monkeypatch):
    """Its files are pickles: torchvision compares the MD5 before it reads one, and so do we."""
    import pickle

    class Payload:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]
    for name in names:
        (folder / name).write_bytes(pickle.dumps(Payload()))
    words = "train cifar10-resnet18 --data-root data --no-download --out run"
    assert main(words.split()) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1 and "is damaged (its MD5 is not the published)" in told[0]
    assert not (tmp_path / "executed").exists()
