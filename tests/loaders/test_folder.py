from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cure_fast.errors import InputError
from cure_fast.loaders import ImageSet, read_dataset
from cure_fast.loaders.datasets import Split


def save(path: Path, value: int, size: tuple[int, int] = (6, 6)) -> np.ndarray:
    pixels = np.full((size[1], size[0], 3), value, np.uint8)
    pixels[0, 1] = (255, 0, 7)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


@pytest.fixture
def tree(tmp_path) -> Path:
    for split, count in (("train", 3), ("test", 2)):
        for label, name in enumerate(("bee", "cat")):
            for i in range(count):
                save(tmp_path / split / name / f"{i}.png", 100 * label + 10 * i)
    return tmp_path


def read(tree: Path, split: Split = "train") -> ImageSet:
    return read_dataset(f"folder:{tree}", Path("none"), split)


def test_reads_in_the_order_of_names(tree) -> None:
    (tree / "train" / ".hidden").mkdir()
    (tree / "train" / "bee" / ".hidden.png").write_bytes(b"no image")
    (tree / "train" / "bee" / "notes.txt").write_text("no image")
    train = read(tree)
    assert train.classes == ("bee", "cat")
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert train.images.shape == (6, 6, 6, 3)
    assert train.images[:, 5, 5, 0].tolist() == [0, 10, 20, 100, 110, 120]
    assert train.images[4, 0, 1].tolist() == [255, 0, 7]
    assert len(read(tree, "test")) == 4


@pytest.mark.parametrize(("mode", "suffix"), [("L", "png"), ("P", "png"), ("RGBA", "webp")])
def test_other_modes_become_rgb(tree, mode, suffix) -> None:
    image = Image.fromarray(np.full((6, 6, 3), 77, np.uint8))
    image = image.convert(mode, palette=Image.Palette.ADAPTIVE)
    image.save(tree / "train" / "bee" / f"9.{suffix}", lossless=True)
    assert (read(tree).images[3] == 77).all()


def test_sixteen_bits_are_refused(tree) -> None:
    file = tree / "train" / "bee" / "9.png"
    Image.fromarray(np.full((6, 6), 40_000, np.uint16)).save(file)
    with pytest.raises(InputError, match="8 bits per channel") as caught:
        read(tree)
    assert str(file) in str(caught.value)


def test_wrong_size_names_file_and_sizes(tree) -> None:
    save(tree / "train" / "cat" / "1.png", 0, size=(7, 6))
    with pytest.raises(InputError, match=r"cat/1\.png: expected 6x6 .*, got 7x6"):
        read(tree)


def test_first_image_must_be_square(tree) -> None:
    save(tree / "train" / "bee" / "0.png", 0, size=(7, 6))
    with pytest.raises(InputError, match=r"bee/0\.png: expected a square image, got 7x6"):
        read(tree)


@pytest.mark.parametrize("content", [b"", b"no image", "cut"])
def test_unreadable_file(tree, content) -> None:
    file = tree / "train" / "cat" / "1.png"
    file.write_bytes(file.read_bytes()[:60] if content == "cut" else content)
    with pytest.raises(InputError, match="cannot be read") as caught:
        read(tree)
    assert str(file) in str(caught.value)


def test_empty_class(tree) -> None:
    for file in (tree / "train" / "cat").iterdir():
        file.rename(file.with_suffix(".txt"))
    with pytest.raises(InputError, match=r"train/cat: the class is empty; expected .*\.png"):
        read(tree)


def test_one_class_or_none(tree) -> None:
    shutil.rmtree(tree / "train" / "cat")
    with pytest.raises(InputError, match="at least two class folders, got 1"):
        read(tree)
    shutil.rmtree(tree / "train")
    with pytest.raises(InputError, match="train: expected a folder with one"):
        read(tree)


def test_test_classes_must_be_the_training_classes(tree) -> None:
    (tree / "test" / "cat").rename(tree / "test" / "dog")
    with pytest.raises(InputError, match="without cat and with dog besides"):
        read(tree, "test")
    assert len(read(tree)) == 6
