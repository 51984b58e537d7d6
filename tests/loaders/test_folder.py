from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cure_fast.errors import InputError
from cure_fast.loaders import ImageSet, folder, make_loader, read_dataset, read_training, stacking
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


@pytest.fixture
def tiny_imagenet(tmp_path) -> Path:
    """TinyImageNet's own layout; its test images have no labels."""
    for label, name in enumerate(("n01", "n02")):
        for i in range(3):
            save(tmp_path / "train" / name / "images" / f"{name}_{i}.JPEG", 100 * label)
        (tmp_path / "train" / name / f"{name}_boxes.txt").write_text("0\t0\t9\t9\n")
    for i in range(4):
        save(tmp_path / "val" / "images" / f"val_{i}.JPEG", 50 * i)
    rows = [f"val_{i}.JPEG\t{('n02', 'n01')[i % 2]}\t0\t0\t9\t9\n" for i in range(4)]
    (tmp_path / "val" / "val_annotations.txt").write_text("".join(rows))
    save(tmp_path / "test" / "images" / "test_0.JPEG", 0)
    return tmp_path


def test_tiny_imagenet_as_it_is_unpacked(tiny_imagenet) -> None:
    train, test = (read(tiny_imagenet, split) for split in ("train", "test"))
    assert train.classes == test.classes == ("n01", "n02")
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1] and test.labels.tolist() == [0, 0, 1, 1]
    assert np.abs(test.images[:, 5, 2, 0] - np.array([50.0, 150, 0, 100])).max() < 20


def test_annotations_that_do_not_fit(tiny_imagenet) -> None:
    (tiny_imagenet / "val" / "images" / "val_2.JPEG").unlink()
    with pytest.raises(InputError, match=r"val_2\.JPEG: expected this image"):
        read(tiny_imagenet, "test")
    for text in ("", "val_0.JPEG n01\n"):
        (tiny_imagenet / "val" / "val_annotations.txt").write_text(text)
        with pytest.raises(InputError, match="a line for each image"):
            read(tiny_imagenet, "test")


def test_val_is_the_test_split_where_there_is_no_test(tree) -> None:
    (tree / "test").rename(tree / "val")
    assert len(read(tree, "test")) == 4
    (tree / "val").rename(tree / "valid")
    with pytest.raises(InputError, match="test: expected a folder"):
        read(tree, "test")


@pytest.fixture
def large(tmp_path, monkeypatch) -> tuple[Path, dict]:
    """A tree of more images than are kept in memory, and how it is read."""
    rng = np.random.default_rng(0)
    for i in range(60):
        place = tmp_path / "train" / ("bee", "cat", "dog")[i % 3] / f"{i:02d}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(place)
    monkeypatch.setattr(stacking, "IN_MEMORY_BYTES", 20 * 8 * 8 * 3)
    options = {"train_images": None, "val_images": 6, "seed": 0}
    return tmp_path, options


def training(large, cache, **changes) -> tuple[ImageSet, ImageSet]:
    tree, options = large
    return read_training(f"folder:{tree}", Path("none"), cache=cache, **{**options, **changes})


def test_a_lot_of_images_is_mapped(large, tmp_path, monkeypatch) -> None:
    cache = tmp_path / "cache"
    train, val = training(large, cache)
    held = training(large, None)
    for part, other, mapped in zip((train, val), held, (True, False), strict=True):
        assert isinstance(part.images, np.memmap) is mapped
        assert not isinstance(other.images, np.memmap)
        assert part.checksum() == other.checksum()
    # Read once: then there is no more to look at than the first image, for its size.
    looked = []
    real = folder._read_image
    monkeypatch.setattr(folder, "_read_image", lambda file: looked.append(file) or real(file))
    assert training(large, cache)[0].checksum() == train.checksum()
    assert len(looked) == 1 + len(val)
    assert [path.suffix for path in (cache / "folders").iterdir()].count(".npy") == 1
    # Another image, another file.
    image = large[0] / "train" / "bee" / "00.png"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(image)
    assert training(large, cache)[0].checksum() != train.checksum()


def test_no_more_is_read_than_is_taken(large, tmp_path) -> None:
    (large[0] / "train" / "cat" / "01.png").write_bytes(b"no image")
    train, val = training(large, None, train_images=3, val_images=3, seed=1)
    assert (len(train), len(val)) == (3, 3)
    with pytest.raises(InputError, match=r"01\.png: the image cannot be read"):
        training(large, tmp_path / "cache")
    assert {path.suffix for path in (tmp_path / "cache" / "folders").iterdir()} == {".lock"}


@pytest.mark.parametrize("kind", ["ffcv", "torch", "resident"])
def test_every_loader_reads_mapped_images(large, tmp_path, request, kind) -> None:
    cache = request.getfixturevalue("cache") if kind == "ffcv" else tmp_path / "cache"
    options = {"device": torch.device("cpu"), "seed": 0, "crop_padding": 1, "flip": True}
    batches = []
    for images in (training(large, tmp_path / "cache")[0], training(large, None)[0]):
        loader = make_loader(kind, images, batch_size=16, workers=1, cache=cache, **options)
        with loader.epoch(0) as opened:
            batches.append([(b.x.numpy().tobytes(), b.y.tolist()) for b in opened])
    assert batches[0] == batches[1] and len(batches[0]) == 4
