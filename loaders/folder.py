"""A class-per-folder image tree: PATH/train/<class>/<image> and PATH/test/<class>/<image>.

The files are listed first and read later, so that of a large tree those alone are read that a run
takes, and a split needs no copy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
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
# TinyImageNet has the classes of its validation images in it.
ANNOTATIONS = "val_annotations.txt"
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")


@dataclass(frozen=True, eq=False)
class Listing:
    """Image files with their labels, of which nothing has been read yet.

    Attributes:
        name: as ``--data`` takes it.
        folder: where they are.
        files: N of them.
        labels: int64 [N], in [0, len(classes)).
        classes: name of each class.
    """

    name: str
    folder: Path
    files: Sequence[Path]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)

    def subset(self, indices: NDArray[np.integer]) -> Listing:
        """Return the files at ``indices`` (integers [M]), in this order."""
        files = [self.files[place] for place in indices]
        return replace(self, files=files, labels=self.labels[indices])

    def read(self, *, image_size: int | None = None, cache: Path | None = None) -> ImageSet:
        """Return the images, as RGB (an alpha channel is dropped).

        Args:
            image_size: as for :func:`stack_images`.
            cache: folder below which the pixels of a lot of images are kept, as long as files have
                the same names, sizes and times; None keeps all in memory.

        Raises:
            InputError: naming the file: unreadable, or of another size than the first image.
        """
        kept = None
        if cache is not None:
            stats = [(str(file.absolute()), file.stat()) for file in self.files]
            told = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
            key = hashlib.sha256(repr((image_size, told)).encode()).hexdigest()[:16]
            kept = cache.expanduser() / "folders" / f"{key}.npy"
        images = stack_images(
            opened(self.files),
            count=len(self),
            image_size=image_size,
            title=f"reading {self.folder}",
            file=kept,
        )
        source = f"image folder {self.folder}"
        return ImageSet(self.name, images, self.labels, self.classes, source)


def list_folder(name: str, split: str) -> Listing:
    """Return the images below ``PATH/<split>``, classes and files in the order of their names.

    Files and folders whose name begins with a dot, and files with another suffix than
    :data:`SUFFIXES`, are passed over. Where there is no ``PATH/test`` with labels, ``PATH/val`` is
    the test split, as in ImageNet and TinyImageNet.

    Args:
        name: ``folder:PATH``; a relative path starts at the working directory.
        split: ``train`` or ``test``.

    Raises:
        InputError: naming the folder or class: absent, empty, or a test class that is no training
            class.
    """
    path = Path(name.removeprefix(FOLDER_PREFIX)).expanduser()
    place = path / "train"
    classes, files, labels = list_images(place)
    if split != "train":
        unlabelled = (path / "val" / ANNOTATIONS).exists() or not (path / "test").exists()
        place = path / ("val" if unlabelled and (path / "val").is_dir() else "test")
        theirs, files, labels = list_images(place)
        _check_same_classes(place, classes, theirs)
    return Listing(name, place, files, labels, classes)


def list_images(folder: Path) -> tuple[tuple[str, ...], list[Path], NDArray[np.int64]]:
    """Return classes, files and labels of ``folder/<class>/<image>``, in the order of their names.

    So too of TinyImageNet's two forms: ``folder/<class>/images/<image>``, and all images in
    ``folder/images`` with a file of text that has their classes.

    Raises:
        InputError: if there is no such folder, or a class is empty.
    """
    if folder.is_dir() and (folder / ANNOTATIONS).exists():
        return _annotated(folder)
    classes = _classes(folder)
    found = [(file, label) for label, c in enumerate(classes) for file in _files(folder / c)]
    return classes, [file for file, _ in found], np.array([label for _, label in found], np.int64)


def _annotated(folder: Path) -> tuple[tuple[str, ...], list[Path], NDArray[np.int64]]:
    """Return what :func:`list_images` does, of a folder with TinyImageNet's annotations."""
    lines = (folder / ANNOTATIONS).read_text(encoding="utf-8", errors="replace").splitlines()
    rows = sorted((line.split("\t") for line in lines), key=lambda row: (row[1:2], row[0]))
    if not rows or len(rows[0]) < 2:
        raise InputError(
            f"{folder / ANNOTATIONS}: expected a line for each image, of its file and its class "
            "with a tab between, got another; unpack the data set again."
        )
    classes = tuple(dict.fromkeys(row[1] for row in rows))
    files = [folder / "images" / row[0] for row in rows]
    if absent := next((file for file in files if not file.is_file()), None):
        raise InputError(f"{absent}: expected this image, as {ANNOTATIONS} has it; there is none.")
    return classes, files, np.array([classes.index(row[1]) for row in rows], np.int64)


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


def _check_same_classes(place: Path, train: tuple[str, ...], test: tuple[str, ...]) -> None:
    """Raise unless the test classes are the training classes."""
    missing, extra = sorted(set(train) - set(test)), sorted(set(test) - set(train))
    if missing or extra:
        found = [f"without {', '.join(missing)}"] if missing else []
        found += [f"with {', '.join(extra)} besides"] if extra else []
        raise InputError(
            f"{place}: expected the class folders of {place.with_name('train')}, got them "
            f"{' and '.join(found)}; make both alike."
        )


def _files(folder: Path) -> list[Path]:
    """Return the image files of one class."""
    inside = folder / "images"
    folder = inside if inside.is_dir() else folder
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
