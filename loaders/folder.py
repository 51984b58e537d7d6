"""A class-per-folder image tree: PATH/train/<class>/<image> and PATH/test/<class>/<image>."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cure_fast.errors import InputError

from .image_set import ImageSet
from .stacking import stack_images, to_rgb

if TYPE_CHECKING:
    from PIL.Image import Image

FOLDER_PREFIX = "folder:"
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")


def read_folder(name: str, split: str, *, image_size: int | None = None) -> ImageSet:
    """Return the images below ``PATH/<split>``, classes and files in the order of their names.

    Images become RGB (an alpha channel is dropped). Files and folders whose name begins with a
    dot, and files with another suffix than :data:`SUFFIXES`, are passed over.

    Args:
        name: ``folder:PATH``; a relative path starts at the working directory.
        split: ``train`` or ``test``.
        image_size: as for :func:`stack_images`.

    Raises:
        InputError: naming the folder, class or file: absent, empty, unreadable, of another size
            than the first image, or a test class that is no training class.
    """
    path = Path(name.removeprefix(FOLDER_PREFIX)).expanduser()
    classes = _classes(path / "train")
    if split != "train":
        _check_same_classes(path, classes, _classes(path / split))
    _, files, labels = list_images(path / split)
    title, images = f"reading {path / split}", opened(files)
    stacked = stack_images(images, count=len(files), image_size=image_size, title=title)
    source = f"image folder {path / split}"
    return ImageSet(name=name, images=stacked, labels=labels, classes=classes, source=source)


def list_images(folder: Path) -> tuple[tuple[str, ...], list[Path], NDArray[np.int64]]:
    """Return classes, files and labels of ``folder/<class>/<image>``, in the order of their names.

    Raises:
        InputError: if there is no such folder, or a class is empty.
    """
    classes = _classes(folder)
    found = [(file, label) for label, c in enumerate(classes) for file in _files(folder / c)]
    return classes, [file for file, _ in found], np.array([label for _, label in found], np.int64)


def opened(files: Iterable[Path]) -> Iterator[tuple[str, Image]]:
    """Yield images as RGB, one at a time, each with its name; a damaged one is refused."""
    return ((str(file), _read_image(file)) for file in files)


def _visible(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if not p.name.startswith("."))


def _classes(folder: Path) -> tuple[str, ...]:
    """Return the names of the class folders in ``folder``."""
    if not folder.is_dir():
        raise InputError(
            f"{folder}: expected a folder with one folder of images per class; there is none. "
            "Name another."
        )
    classes = tuple(p.name for p in _visible(folder) if p.is_dir())
    if len(classes) < 2:
        raise InputError(
            f"{folder}: expected at least two class folders, got {len(classes)}; "
            f"the images of a class belong into {folder}/<class>/."
        )
    return classes


def _check_same_classes(path: Path, train: tuple[str, ...], test: tuple[str, ...]) -> None:
    """Raise unless the test classes are the training classes."""
    missing, extra = sorted(set(train) - set(test)), sorted(set(test) - set(train))
    if missing or extra:
        found = [f"without {', '.join(missing)}"] if missing else []
        found += [f"with {', '.join(extra)} besides"] if extra else []
        raise InputError(
            f"{path / 'test'}: expected the class folders of {path / 'train'}, got them "
            f"{' and '.join(found)}; make both alike."
        )


def _files(folder: Path) -> list[Path]:
    """Return the image files of one class."""
    files = [p for p in _visible(folder) if p.suffix.lower() in SUFFIXES]
    if not files:
        raise InputError(
            f"{folder}: the class is empty; expected image files ({', '.join(SUFFIXES)}). "
            f"Add some, or remove the folder."
        )
    return files


def _read_image(file: Path) -> Image:
    """Return an image as RGB."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            return to_rgb(str(file), image)
    # Pillow raises all of these for files that are cut, mislabelled or hostile.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{file}: the image cannot be read ({error}); replace or delete it."
        ) from error
