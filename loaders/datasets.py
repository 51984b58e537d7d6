"""The data sets by name: read from disk, downloaded where allowed, checked, as uint8 arrays."""

from __future__ import annotations

import difflib
import importlib.util
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cure_fast.errors import InputError
from cure_fast.plugins.lookup import installed, is_outside, is_reference

from .folder import FOLDER_PREFIX, list_folder
from .image_set import ImageSet, check_images
from .own import TORCHVISION_PREFIX, read_own, read_torchvision
from .split import split_train
from .stacking import resized

Split = Literal["train", "test"]
# Ships with the package; digits.md beside it says what it holds, where it is from and its licence.
DIGITS = Path(__file__).with_name("digits.npz")


@dataclass(frozen=True)
class DatasetInfo:
    """What is known of a data set before it is read.

    Attributes:
        title: name for tables and plots.
        num_classes: number of classes.
        image_size: height and width in pixels.
        mean: mean of each channel over the training images, in [0, 1].
        std: standard deviation of each channel, in [0, 1].
    """

    title: str
    num_classes: int
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


DATASETS: dict[str, DatasetInfo] = {
    "cifar10": DatasetInfo("CIFAR-10", 10, 32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": DatasetInfo(
        "CIFAR-100", 100, 32, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
    ),
    "svhn": DatasetInfo("SVHN", 10, 32, (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    "digits": DatasetInfo("Digits", 10, 8, (0.3054, 0.3054, 0.3054), (0.3760, 0.3760, 0.3760)),
}


def read_dataset(
    name: str,
    root: Path,
    split: Split = "train",
    *,
    download: bool = True,
    image_size: int | None = None,
    cache: Path | None = None,
) -> ImageSet:
    """Return all images of one split of a data set, checked.

    Args:
        name: a key of :data:`DATASETS`, ``folder:PATH`` (see :mod:`.folder`), or
            ``torchvision:CLASS``, ``package.module:function`` or a plug-in (see :mod:`.own`).
        root: folder that holds the sets of torchvision as it lays them out, or receives them.
        split: the training or the test images.
        download: fetch a set of torchvision when it is not below ``root``.
        image_size: pixels that images are resized and centre-cropped to; None takes them as they
            are.
        cache: as for :meth:`.Listing.read`, of a folder of images.

    Raises:
        InputError: for an unknown name, absent data, a failed download, a damaged file or images
            that do not pass :func:`check_images`; the message says what to do.
    """
    if split not in ("train", "test"):
        raise InputError(f"split: expected train or test, got {split!r}.")
    if name.startswith(FOLDER_PREFIX):
        image_set = list_folder(name, split).read(image_size=image_size, cache=cache)
    elif name.startswith(TORCHVISION_PREFIX):
        root, options = Path(root), {"download": download, "image_size": image_size}
        image_set = read_torchvision(name, root, split, **options)
    elif name in DATASETS:
        if name == "digits":
            image_set = _read_digits(split)
        else:
            image_set = _read_known(name, Path(root), split, download)
        if image_size is not None:
            image_set = resized(image_set, image_size)
    elif is_outside("data", name):
        image_set = read_own(name, split, image_size=image_size)
    else:
        raise InputError(_unknown(name))
    check_images(image_set, training=split == "train")
    return image_set


def read_training(
    name: str,
    root: Path,
    *,
    train_images: int | None,
    val_images: int,
    seed: int,
    download: bool = True,
    image_size: int | None = None,
    cache: Path | None = None,
) -> tuple[ImageSet, ImageSet]:
    """Return (training, validation) images; of a folder no more than these are read.

    Args:
        name: see :func:`read_dataset`, as for ``root``, ``download``, ``image_size`` and ``cache``.
        root: see there.
        train_images: see :func:`split_train`, as for ``val_images`` and ``seed``.
        val_images: see there.
        seed: see there.
        download: see above.
        image_size: see above.
        cache: see above.

    Raises:
        InputError: as these two.
    """
    split: dict[str, Any] = {"train_images": train_images, "val_images": val_images, "seed": seed}
    if name.startswith(FOLDER_PREFIX):
        train, val = split_train(list_folder(name, "train"), **split)
        options: dict[str, Any] = {"image_size": image_size, "cache": cache}
        return train.read(**options), val.read(**options)
    whole = read_dataset(name, root, "train", download=download, image_size=image_size)
    return split_train(whole, **split)


def names_code(name: str) -> bool:
    """Return whether a data set is what a function makes that the name itself names."""
    return is_reference(name) and not name.startswith((FOLDER_PREFIX, TORCHVISION_PREFIX))


def _unknown(name: str) -> str:
    """Return the message for a name that is no data set."""
    places = (f"{FOLDER_PREFIX}PATH", f"{TORCHVISION_PREFIX}NAME", "package.module:function")
    valid = [*DATASETS, *installed("data"), *places]
    close = difflib.get_close_matches(name.lower(), DATASETS, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    return f"--data: expected one of {', '.join(valid)}, got {name!r}.{hint}"


def _read_digits(split: Split) -> ImageSet:
    """Return the 1,797 handwritten digits of digits.npz: 1,437 to train on, 360 to test on."""
    with np.load(DIGITS) as stored:
        chosen = np.zeros(len(stored["labels"]), bool)
        chosen[stored["test"]] = True
        if split == "train":
            chosen = ~chosen
        # The values are counts of dark pixels in 4 x 4 blocks, 0 to 16.
        counts = stored["images"][chosen].astype(np.float64)
        gray = np.rint(counts * (255 / 16)).astype(np.uint8)
        labels = stored["labels"][chosen].astype(np.int64)
    return ImageSet(
        name="digits",
        images=np.repeat(gray[..., None], 3, axis=3),
        labels=labels,
        classes=tuple(str(digit) for digit in range(10)),
        source=f"UCI handwritten digits, {split}",
    )


def _read_known(name: str, root: Path, split: Split, download: bool) -> ImageSet:
    """Read CIFAR or SVHN below ``root``, downloading it when it is absent and allowed."""
    if name == "svhn" and importlib.util.find_spec("scipy") is None:
        raise InputError(
            "--data: svhn's files are read by scipy, which is not installed. Run: python -m pip "
            "install scipy"
        )
    try:
        data = _open_torchvision(name, root, split, download=False)
    except RuntimeError as error:  # torchvision's answer to absent and to damaged files
        present = _check_files(name, root, split)
        if present:
            raise InputError(f"{root}: {name} does not read ({error}).") from error
        if not download:
            raise InputError(
                f"--data-root: expected {name} in {_place(name, root, split)}, which does not "
                f"exist; put it there, name another folder, or leave out --no-download."
            ) from error
        data = _download(name, root, split)
    if name == "svhn":
        images, classes = data.data.transpose(0, 2, 3, 1), [str(digit) for digit in range(10)]
        labels = data.labels
    else:
        images, labels, classes = data.data, data.targets, data.classes
    return ImageSet(
        name=name,
        images=np.ascontiguousarray(images),
        labels=np.asarray(labels, dtype=np.int64),
        classes=tuple(classes),
        source=f"torchvision {DATASETS[name].title}, {split}",
    )


def _download(name: str, root: Path, split: Split) -> Any:
    """Download the data set into ``root`` and open it."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with redirect_stdout(sys.stderr):
            return _open_torchvision(name, root, split, download=True)
    except (OSError, RuntimeError, HTTPException) as error:
        raise InputError(
            f"{name}: the download into {root} failed ({error}); check the network, or put the "
            f"data into {_place(name, root, split)} yourself and give --no-download. "
            f"--data digits needs no network."
        ) from error


def _open_torchvision(name: str, root: Path, split: Split, *, download: bool) -> Any:
    from torchvision.datasets import SVHN

    if name == "svhn":
        return SVHN(str(root), split=split, download=download)
    return _cifar(name)(str(root), train=split == "train", download=download)


def _cifar(name: str) -> Any:
    from torchvision.datasets import CIFAR10, CIFAR100

    return {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]


def _place(name: str, root: Path, split: Split) -> Path:
    """Return the file or folder below ``root`` where torchvision looks for the data set."""
    if name == "svhn":
        return next(iter(_files(name, root, split)))
    return root / _cifar(name).base_folder


def _files(name: str, root: Path, split: Split) -> dict[Path, str]:
    """Return the files that torchvision reads, with the MD5 it expects."""
    from torchvision.datasets import SVHN

    if name == "svhn":
        _, file, md5 = SVHN.split_list[split]
        return {root / file: md5}
    cifar = _cifar(name)
    listed = [*cifar.train_list, *cifar.test_list, (cifar.meta["filename"], cifar.meta["md5"])]
    return {root / cifar.base_folder / file: md5 for file, md5 in listed}


def _check_files(name: str, root: Path, split: Split) -> bool:
    """Return whether the files of a data set are there; raise for a part or a damaged one."""
    from torchvision.datasets.utils import check_md5

    files = _files(name, root, split)
    if not any(path.exists() for path in files):
        return False
    for path, md5 in files.items():
        problem = "is missing" if not path.exists() else "is damaged (its MD5 is not the published)"
        if not path.is_file() or not check_md5(path, md5):
            place = _place(name, root, split)
            raise InputError(
                f"{path} {problem}; delete {place} and run again to download it, or put a whole "
                f"copy of {DATASETS[name].title} there."
            )
    return True
