"""Data sets from outside of the package: torchvision's by name, a user's own, a plug-in's."""

from __future__ import annotations

import difflib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from http.client import HTTPException
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cure_fast.errors import InputError
from cure_fast.plugins.lookup import first_line, load

from .image_set import ImageSet
from .stacking import stack_images, to_image

if TYPE_CHECKING:
    from PIL.Image import Image

TORCHVISION_PREFIX = "torchvision:"
# What torchvision's classes call the two splits.
SPLITS = {"train": ("train", "trainval"), "test": ("test", "val")}
OTHERWISE = "Write a function that returns the images: --data package.module:function."


def read_own(name: str, split: str, *, image_size: int | None = None) -> ImageSet:
    """Return the images of a split that a function of the user's own, or a plug-in's, returns.

    It is called as ``function("train")`` and ``function("test")`` and returns images, uint8
    [N, H, W, 3] or [N, H, W] or a sequence of what :func:`to_image` takes, and labels [N], perhaps
    with the names of the classes as a third; or a data set as torch has them: of known length, of
    pairs of an image and a label, perhaps with names in its attribute ``classes``. Without names
    the largest label of the training images says how many classes there are.

    Args:
        name: ``package.module:function``, or a plug-in.
        split: ``train`` or ``test``.
        image_size: as for :func:`stack_images`.

    Raises:
        InputError: if it cannot be imported or called, or returns something else.
    """
    function, problem = load("data", name)
    if problem:
        raise InputError(f"--data {name}: {problem}")

    def call(split: str) -> Any:
        try:
            return function(split)
        except InputError:
            raise
        except Exception as error:  # code of the user's own: whatever it throws is told in one line
            told = f"--data {name}: the call with {split!r} failed ({first_line(error)})."
            raise InputError(told) from error

    return _image_set(name, call, split, image_size)


def read_torchvision(
    name: str, root: Path, split: str, *, download: bool, image_size: int | None = None
) -> ImageSet:
    """Return the images of a split of one of torchvision's data sets.

    Args:
        name: ``torchvision:CLASS``, a data set of images with a class each, and two splits.
        root: folder that holds the data as torchvision lays it out, or receives it.
        split: ``train`` or ``test``.
        download: fetch it when it is not below ``root``.
        image_size: as for :func:`stack_images`.

    Raises:
        InputError: for another name or kind of data set, absent data, or a failed download.
    """
    from torchvision import datasets

    word = name.removeprefix(TORCHVISION_PREFIX)
    kind = getattr(datasets, word, None) if word in datasets.__all__ else None
    options = () if kind is None else inspect.signature(kind.__init__).parameters
    if kind is None or not {"train", "split"} & set(options):
        close = difflib.get_close_matches(word, datasets.__all__, n=1)
        hint = f" Perhaps you meant {close[0]}." if close and close[0] != word else ""
        raise InputError(
            f"--data {name}: expected a data set of torchvision with a training and a test split."
            f"{hint} {OTHERWISE}"
        )

    def open_split(split: str, **more: bool) -> Any:
        if "train" in options:
            return kind(str(root), train=split == "train", **more)
        usual, other = SPLITS[split]
        try:
            return kind(str(root), split=usual, **more)
        except ValueError:  # torchvision's answer to a split of another name
            return kind(str(root), split=other, **more)

    def call(split: str) -> Any:
        try:
            if "download" not in options:
                return open_split(split)
            try:
                return open_split(split, download=False)
            except RuntimeError:  # torchvision's answer to absent and to damaged files
                if not download:
                    raise
            root.mkdir(parents=True, exist_ok=True)
            with redirect_stdout(sys.stderr):
                return open_split(split, download=True)
        except (OSError, RuntimeError, ValueError, TypeError, ImportError, HTTPException) as error:
            raise InputError(
                f"--data {name}: {split} cannot be read in {root} ({first_line(error)}). Check the "
                "network, put the data there yourself, or name another folder with --data-root."
            ) from error

    return _image_set(name, call, split, image_size)


def _image_set(
    name: str, call: Callable[[str], Any], split: str, image_size: int | None
) -> ImageSet:
    """Return what ``call`` has for a split as a set of images."""
    found = call(split)
    if isinstance(found, tuple) and len(found) in (2, 3):
        images, labels, *told = found
        classes = told[0] if told else None
    elif hasattr(found, "__len__") and hasattr(found, "__getitem__"):
        images, labels = found, []
        classes = getattr(found, "classes", None)
    else:
        raise InputError(
            f"--data {name}: expected images and labels for {split!r}, or a data set of known "
            f"length, got {type(found).__name__}."
        )

    def each() -> Iterator[tuple[str, Image]]:
        for place in range(len(images)):
            where = f"{name}, {split} image {place}"
            image = images[place] if images is not found else _pair(where, found, place, labels)
            yield where, to_image(where, image)

    if isinstance(images, np.ndarray) and images.dtype == np.uint8 and image_size is None:
        gray = images.ndim == 3 or images.shape[3:] == (1,)
        pixels = images.reshape(*images.shape[:3], 1).repeat(3, axis=3) if gray else images
    else:
        title = f"reading {name}, {split}"
        pixels = stack_images(each(), count=len(images), image_size=image_size, title=title)
    numbers = np.asarray(labels)
    if np.issubdtype(numbers.dtype, np.integer):
        numbers = numbers.astype(np.int64)
    if classes is None:
        train = numbers if split == "train" else _labels(name, call("train"))
        classes = range(int(train.max(initial=0)) + 1)
    return ImageSet(
        name=name,
        images=np.ascontiguousarray(pixels),
        labels=numbers,
        classes=tuple(map(str, classes)),
        source=f"{name}, {split}",
    )


def _pair(where: str, dataset: Any, place: int, labels: list[int]) -> Any:
    """Return an image of a data set of pairs, and append its label."""
    try:
        image, label = dataset[place]
        labels.append(index(label))
    except Exception as error:  # code of the user's own, or what is no pair
        raise InputError(
            f"{where}: expected a pair of an image and a whole number, its class "
            f"({first_line(error)}). {OTHERWISE}"
        ) from error
    return image


def _labels(name: str, found: Any) -> NDArray[np.integer]:
    """Return the labels of a split by themselves."""
    if isinstance(found, tuple):
        return np.asarray(found[1])
    labels: list[int] = []
    for place in range(len(found)):
        _pair(f"{name}, image {place}", found, place, labels)
    return np.array(labels)
