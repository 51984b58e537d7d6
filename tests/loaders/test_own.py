"""Data sets from outside, and images that are brought to one size."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, Resize, ToTensor

from cure_fast.cli.main import main
from cure_fast.errors import InputError
from cure_fast.loaders import read_dataset
from cure_fast.loaders.stacking import to_image
from tiny_command import tiny_words

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (6, 9, 9, 3), np.uint8)
LABELS = np.array([0, 1, 2, 0, 1, 2])


class Pairs(torch.utils.data.Dataset):
    """Images in one of the forms that data sets of torch have."""

    def __init__(self, form, labels=LABELS):
        self.form, self.labels = form, labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, place):
        return self.form(PIXELS[place]), self.labels[place]


@pytest.fixture
def own(monkeypatch):
    """A function that makes what a call returns a data set by name."""
    module = ModuleType("own_data")
    monkeypatch.setitem(sys.modules, "own_data", module)

    def name(function):
        module.found = function
        return "own_data:found"

    return name


def read(name, split="train", root="none", **options):
    return read_dataset(name, Path(root), split, **options)


FORMS = {
    "pillow": Image.fromarray,
    "array": lambda pixels: pixels,
    "floats": lambda pixels: ToTensor()(pixels),
    "bytes": lambda pixels: torch.from_numpy(pixels).permute(2, 0, 1),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_images_are_read_alike(own, form):
    for returned in (
        Pairs(FORMS[form]),
        ([FORMS[form](pixels) for pixels in PIXELS], torch.from_numpy(LABELS)),
    ):
        found = read(own(lambda split, returned=returned: returned))
        assert (found.images == PIXELS).all() and (found.labels == LABELS).all()
        assert found.classes == ("0", "1", "2")


def test_arrays_and_gray_images_and_names(own):
    found = read(own(lambda split: (PIXELS[..., 0], LABELS, ["a", "b", "c", "d"][:3])))
    assert (found.images == PIXELS[..., :1]).all() and found.classes == ("a", "b", "c")
    whole = read(own(lambda split: (PIXELS, LABELS.astype(np.uint8))))
    assert (whole.images == PIXELS).all() and whole.labels.dtype == np.int64


@pytest.mark.parametrize("pairs", [True, False])
def test_the_training_images_say_how_many_classes_there_are(own, pairs):
    def found(split):
        labels = LABELS if split == "train" else np.zeros(6, np.int64)
        return Pairs(Image.fromarray, labels) if pairs else (PIXELS, labels)

    assert read(own(found), "test").classes == ("0", "1", "2")


def raises(split):
    raise RuntimeError("no such\nfile")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (raises, r"the call with 'train' failed \(RuntimeError: no such\)"),
        (lambda split: None, "expected images and labels for 'train'.* got NoneType"),
        (lambda split: (PIXELS, LABELS[:2]), "expected 6 labels"),
        (lambda split: (PIXELS, LABELS / 2), "labels of type int64.* got float64"),
        (lambda split: (PIXELS / 255, LABELS), r"image 0: .* got ndarray of float64 \[9, 9, 3\]"),
        (lambda split: Pairs(lambda pixels: "x"), "image 0: expected a Pillow image.* got str"),
        (lambda split: Pairs(lambda p: ToTensor()(p) * 2 - 1), r"in \[0, 1\], got -.*normalises"),
        (
            lambda split: Pairs(Image.fromarray, ["a"] * 6),
            "expected a pair of an image and a whole",
        ),
        (lambda split: Pairs(Image.fromarray, LABELS / 1), "expected a pair of an image and a wh"),
        (lambda split: [1, 2], "image 0: expected a pair"),
        (lambda split: (PIXELS[:, :7], LABELS), r"\[N, size, size, 3\], got \[6, 7, 9, 3\]"),
    ],
)
def test_what_is_no_data_set_is_refused(own, function, message):
    with pytest.raises(InputError, match=message) as caught:
        read(own(function))
    assert "\n" not in str(caught.value)


def test_more_than_eight_bits_are_refused(own):
    deep = Image.fromarray(np.full((9, 9), 40_000, np.uint16))
    with pytest.raises(InputError, match="image 0: expected 8 bits per channel"):
        read(own(lambda split: ([deep], [0])))
    with pytest.raises(InputError, match="got ndarray of int64"):
        to_image("x", PIXELS[0].astype(int))


def test_images_are_resized_and_cropped_as_torchvision_does(own):
    sizes = [(20, 31), (9, 9), (50, 7), (16, 12)]
    images = [Image.fromarray(RNG.integers(0, 256, (h, w, 3), np.uint8)) for w, h in sizes]
    name = own(lambda split: (images, [0, 1, 0, 1]))
    found = read(name, image_size=12).images
    usual = Compose([Resize(12), CenterCrop(12)])
    assert all(
        (image == np.asarray(usual(given))).all()
        for image, given in zip(found, images, strict=True)
    )
    with pytest.raises(InputError, match=r"expected a square image, got 20x31.*--image-size N"):
        read(name)
    images.reverse()
    with pytest.raises(InputError, match=r"got 16x12"):
        read(name)


def test_sets_of_the_package_are_resized_too():
    whole, small = read("digits"), read("digits", image_size=4)
    assert small.images.shape == (1437, 4, 4, 3) and (small.labels == whole.labels).all()
    assert (read("digits", image_size=8).images == whole.images).all()


def idx(path, array):
    """Write an array as MNIST's files are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes())


def test_a_set_of_torchvision_with_a_switch(tmp_path):
    for split, count in (("train", 6), ("t10k", 4)):
        raw = tmp_path / "FashionMNIST" / "raw"
        idx(raw / f"{split}-images-idx3-ubyte", PIXELS[:count, ..., 0])
        idx(raw / f"{split}-labels-idx1-ubyte", LABELS[:count])
    name = "torchvision:FashionMNIST"
    with pytest.raises(InputError, match="every class, got none of"):
        read(name, root=tmp_path)
    test = read(name, "test", tmp_path, download=False)
    assert (test.images == PIXELS[:4, ..., :1]).all() and (test.labels == LABELS[:4]).all()
    assert len(test.classes) == 10 and test.classes[9] == "Ankle boot"
    assert read(name, "test", tmp_path, image_size=5).images.shape == (4, 5, 5, 3)


def test_a_set_of_torchvision_with_splits_of_other_names(tmp_path, monkeypatch):
    """Of the pets, whose training split is called `trainval`, and whose images differ in size."""
    from torchvision.datasets import OxfordIIITPet

    base = tmp_path / "oxford-iiit-pet"
    (base / "annotations").mkdir(parents=True)
    (base / "images").mkdir()
    for split, names in (("trainval", ("b_1", "a_1")), ("test", ("a_2",))):
        rows = [f"{name} {1 + 'ab'.index(name[0])} 1 1\n" for name in names]
        (base / "annotations" / f"{split}.txt").write_text("".join(rows))
        for name in names:
            size = (12, 9) if name[0] == "a" else (8, 8)
            Image.new("RGB", size, (255, 0, 0)).save(base / "images" / f"{name}.jpg")
    name = "torchvision:OxfordIIITPet"
    train = read(name, root=tmp_path, download=False, image_size=8)
    assert train.labels.tolist() == [1, 0] and train.classes == ("A", "B")
    assert len(read(name, "test", tmp_path, download=False, image_size=8)) == 1
    with pytest.raises(InputError, match=r"train image 1: expected 8x8 .*--image-size"):
        read(name, root=tmp_path, download=False)
    monkeypatch.setattr(OxfordIIITPet, "_check_exists", lambda self: False)
    with pytest.raises(InputError, match=r"cannot be read in .*RuntimeError.*--data-root"):
        read(name, root=tmp_path, download=False)


@pytest.mark.usefixtures("one_thread")
def test_a_run_and_its_file_are_measured_at_the_size_it_was_trained_with(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    for split, count in (("train", 14), ("test", 6)):
        for label, value in (("dark", 40), ("light", 200)):
            folder = Path("photos") / split / label
            folder.mkdir(parents=True)
            for k in range(count):
                size = (14 + k, 10 + 2 * k)
                Image.new("RGB", size, (value + k, value, value - k)).save(folder / f"{k}.png")
    words = tiny_words("--data", "folder:photos")
    place = words.index("--train-images")
    words[place : place + 4] = ["--val-images", "8"]
    assert main(words) == 2
    assert "--image-size N" in capsys.readouterr().err and not Path("run").exists()
    assert main([*words, "--image-size", "8", "--no-flip"]) == 0
    capsys.readouterr()
    assert json.loads(Path("run/config.json").read_text())["data"]["image_size"] == 8
    told = []
    for target in ("run", "run/model.safetensors"):
        more = ["--out", "aside"] if target != "run" else []
        assert main(["eval", target, "--attacks", "pgd2", "--step-size", "0.1", *more]) == 0
    run, file = (json.loads(Path(p, "results.json").read_text()) for p in ("run", "aside"))
    told = [run["models"]["trained"], file["models"]["model"]]
    assert told[0]["attacks"]["pgd2"]["correct"] == told[1]["attacks"]["pgd2"]["correct"]
    assert main(["eval", "run", "--image-size", "9"]) == 2
    assert "--image-size: only for a file" in capsys.readouterr().err
    assert main(["export", "run"]) == 0
    assert "12 test images" in capsys.readouterr().out
