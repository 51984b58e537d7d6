from __future__ import annotations

import hashlib
import importlib.util
import pickle
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest

from cure_fast.errors import InputError
from cure_fast.loaders import DATASETS, check_images, read_dataset
from cure_fast.loaders.datasets import DIGITS as DIGITS_FILE

# SHA-256 of shape, pixels and labels.
DIGITS = {
    "train": "907f780f4ec64291e3f591d9871e11afac63aa8fcb60299516fc59e551af5325",
    "test": "66afc15240fbb07715bb47785ab92196bda8786536b699d86d7d7e85d27d1c6c",
}
# SHA-256 of scikit-learn's load_digits(): its images, then its labels, as uint8.
SCIKIT_LEARN = "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826"


def test_the_digits_are_those_of_scikit_learn() -> None:
    with np.load(DIGITS_FILE) as stored:
        images, labels, test = stored["images"], stored["labels"], stored["test"]
    assert images.shape == (1797, 8, 8) and images.dtype == labels.dtype == np.uint8
    assert hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest() == SCIKIT_LEARN
    assert len(set(test.tolist())) == 360
    assert DIGITS_FILE.stat().st_size < 100_000


def test_digits_are_all_there_once() -> None:
    parts = [read_dataset("digits", Path("none"), split) for split in ("train", "test")]
    assert [len(part) for part in parts] == [1437, 360]
    with np.load(DIGITS_FILE) as stored:
        images, labels = stored["images"], stored["labels"]
    whole = np.concatenate([part.images[..., 0].reshape(-1, 64) for part in parts])
    expected = np.rint(images.reshape(-1, 64) * (255 / 16))
    assert sorted(map(tuple, whole.tolist())) == sorted(map(tuple, expected.tolist()))
    for part in parts:
        assert part.images.max() == 255 and part.images.min() == 0
        assert (part.images == part.images[..., :1]).all()
        shares = np.bincount(part.labels) / len(part)
        assert np.abs(shares - np.bincount(labels) / 1797).max() < 0.002


@pytest.mark.parametrize("split", ["train", "test"])
def test_digits_split_is_fixed(split) -> None:
    assert read_dataset("digits", Path("none"), split).checksum() == DIGITS[split]


def test_digits_statistics() -> None:
    pixels = read_dataset("digits", Path("none")).images / 255
    info = DATASETS["digits"]
    assert np.allclose(pixels.mean((0, 1, 2)), info.mean, atol=5e-5)
    assert np.allclose(pixels.std((0, 1, 2)), info.std, atol=5e-5)


def test_read_digits_equals_table() -> None:
    digits = read_dataset("digits", Path("none"))
    info = DATASETS["digits"]
    assert len(digits.classes) == info.num_classes
    assert digits.images.shape[1] == info.image_size


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cifar", "Did you mean cifar10"),
        ("CIFAR100", "Did you mean cifar100"),
        ("x", "folder:PATH"),
    ],
)
def test_unknown_names(name, expected) -> None:
    with pytest.raises(InputError, match=r"--data: .*cifar10, cifar100, svhn, digits") as caught:
        read_dataset(name, Path("none"))
    assert expected in str(caught.value)


def test_unknown_split() -> None:
    with pytest.raises(InputError, match="train or test, got 'val'"):
        read_dataset("digits", Path("none"), "val")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("cifar10", "cifar-10-batches-py"),
        ("cifar100", "cifar-100-python"),
        ("svhn", "train_32x32.mat"),
    ],
)
def test_absent_without_download(name, place, tmp_path) -> None:
    with pytest.raises(InputError, match="--no-download") as caught:
        read_dataset(name, tmp_path, download=False)
    assert str(tmp_path / place) in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_failed_download(tmp_path, monkeypatch) -> None:
    from torchvision.datasets import CIFAR10

    def offline(self):
        raise URLError("no route to host")

    monkeypatch.setattr(CIFAR10, "download", offline)
    with pytest.raises(InputError, match="no route to host") as caught:
        read_dataset("cifar10", tmp_path / "new")
    assert str(tmp_path / "new" / "cifar-10-batches-py") in str(caught.value)
    assert "--no-download" in str(caught.value)


def test_damaged_and_partial_files(tmp_path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(b"cut")
    with pytest.raises(InputError, match="data_batch_1 is damaged"):
        read_dataset("cifar10", tmp_path, download=True)
    (folder / "data_batch_1").unlink()
    (folder / "data_batch_2").write_bytes(b"")
    with pytest.raises(InputError, match="data_batch_1 is missing"):
        read_dataset("cifar10", tmp_path, download=True)


def test_cifar100_layout(tmp_path, monkeypatch) -> None:
    """Files as torchvision expects them, with the MD5 of our pixels in place of the published."""
    from torchvision.datasets import CIFAR100

    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (200, 3 * 32 * 32), dtype=np.uint8)
    labels = rng.permutation(200) % 100
    folder = tmp_path / CIFAR100.base_folder
    folder.mkdir()
    md5 = {}
    for file, content in {
        "train": {"data": pixels, "fine_labels": labels.tolist()},
        "test": {"data": pixels[:7], "fine_labels": labels[:7].tolist()},
        "meta": {"fine_label_names": [f"class {i}" for i in range(100)]},
    }.items():
        data = pickle.dumps(content)
        (folder / file).write_bytes(data)
        md5[file] = hashlib.md5(data).hexdigest()
    monkeypatch.setattr(CIFAR100, "train_list", [["train", md5["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", md5["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": md5["meta"]})
    train = read_dataset("cifar100", tmp_path, download=False)
    assert train.images.dtype == np.uint8 and train.images.flags.c_contiguous
    assert (train.images == pixels.reshape(200, 3, 32, 32).transpose(0, 2, 3, 1)).all()
    assert train.labels.dtype == np.int64 and (train.labels == labels).all()
    assert train.classes[99] == "class 99"
    assert len(read_dataset("cifar100", tmp_path, "test", download=False)) == 7


def test_svhn_layout(tmp_path, monkeypatch) -> None:
    from scipy.io import savemat
    from torchvision.datasets import SVHN

    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (32, 32, 3, 20), dtype=np.uint8)
    labels = np.arange(20, dtype=np.uint8) % 10
    file = tmp_path / "train_32x32.mat"
    savemat(file, {"X": pixels, "y": np.where(labels == 0, 10, labels)[:, None]})
    md5 = hashlib.md5(file.read_bytes()).hexdigest()
    monkeypatch.setattr(SVHN, "split_list", {"train": ["", file.name, md5]})
    svhn = read_dataset("svhn", tmp_path, download=False)
    assert (svhn.images == pixels.transpose(3, 0, 1, 2)).all()
    assert (svhn.labels == labels).all()  # the file says 10 for the digit 0
    assert svhn.classes == tuple("0123456789")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"train_32x32\.mat is damaged"):
        read_dataset("svhn", tmp_path, download=True)


def test_svhn_without_scipy_names_the_command(tmp_path, monkeypatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "scipy" else found(name)
    )
    with pytest.raises(InputError, match="Run: python -m pip install scipy"):
        read_dataset("svhn", tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.real_data
def test_real_cifar10(cifar10_root) -> None:
    info = DATASETS["cifar10"]
    train = read_dataset("cifar10", cifar10_root, download=False)
    test = read_dataset("cifar10", cifar10_root, "test", download=False)
    assert train.images.shape == (50_000, 32, 32, 3) and test.images.shape == (10_000, 32, 32, 3)
    assert np.bincount(train.labels).tolist() == [5000] * 10
    assert np.bincount(test.labels).tolist() == [1000] * 10
    assert train.classes[0] == "airplane" and test.classes == train.classes
    for channel in range(3):
        shares = np.bincount(train.images[..., channel].ravel(), minlength=256) / (50_000 * 32**2)
        values = np.arange(256) / 255
        mean = shares @ values
        assert mean == pytest.approx(info.mean[channel], abs=1e-4)
        assert (shares @ (values - mean) ** 2) ** 0.5 == pytest.approx(info.std[channel], abs=1e-4)


def test_subset_and_checksum(make_images) -> None:
    images = make_images(10, 4)
    part = images.subset(np.array([7, 2]))
    assert len(part) == 2
    assert (part.images == images.images[[7, 2]]).all()
    assert (part.labels == images.labels[[7, 2]]).all()
    checksums = {images.checksum(), part.checksum(), images.subset(np.array([2, 7])).checksum()}
    one_pixel, one_label = images.images.copy(), images.labels.copy()
    one_pixel[9, 3, 3, 2] ^= 1
    one_label[0] += 1
    for changed in ({"images": one_pixel}, {"labels": one_label}):
        checksums.add(replace(images, **changed).checksum())
    checksums.add(replace(images, images=images.images.reshape(10, 2, 8, 3)).checksum())
    assert len(checksums) == 6
    assert replace(images, images=images.images.copy()).checksum() == images.checksum()


def test_good_images_pass(make_images) -> None:
    images = make_images()
    check_images(images, training=True)
    one_class = images.subset(np.flatnonzero(images.labels == 1))
    check_images(one_class)  # a test set may lack a class
    with pytest.raises(InputError, match="every class, got none of ape, cat"):
        check_images(one_class, training=True)


@pytest.mark.parametrize("label", [-1, 3])
def test_labels_out_of_range(make_images, label) -> None:
    images = make_images()
    labels = images.labels.copy()
    labels[[41, 50]] = label
    with pytest.raises(InputError, match=f"from 0 to 2, got {label} for image 41 .2 images"):
        check_images(replace(images, labels=labels))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(make_images, value) -> None:
    images = make_images()
    pixels = images.images.astype(np.float32)
    pixels[13, 2, 0, 1] = value
    with pytest.raises(InputError, match="image 13 holds a value that is not finite"):
        check_images(replace(images, images=pixels))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda a: a.astype(np.float32), "uint8 .*, got float32"),
        (lambda a: a.astype(np.int16), "uint8 .*, got int16"),
        (lambda a: a[..., 0], r"\[N, size, size, 3\], got \[67, 8, 8\]"),
        (lambda a: a[..., :1], r"got \[67, 8, 8, 1\]"),
        (lambda a: a[:, :7], r"got \[67, 7, 8, 3\]"),
        (lambda a: a[:, :0, :0], "at least one image"),
    ],
)
def test_images_of_another_kind(make_images, change, expected) -> None:
    images = make_images()
    with pytest.raises(InputError, match=expected):
        check_images(replace(images, images=change(images.images)))


@pytest.mark.parametrize("change", [lambda a: a[:-1], lambda a: a.astype(np.int32)])
def test_labels_of_another_kind(make_images, change) -> None:
    images = make_images()
    with pytest.raises(InputError, match="67 labels of type int64"):
        check_images(replace(images, labels=change(images.labels)))


def test_empty_set(make_images) -> None:
    with pytest.raises(InputError, match="at least one image"):
        check_images(make_images().subset(np.array([], np.int64)))
