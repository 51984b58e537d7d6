"""Files of generated images, .npz: mapped, not read.

The format is that of the sets of 1 to 50 million images of Wang et al., "Better Diffusion Models
Further Improve Adversarial Training" (ICML 2023, arXiv 2302.04638): arrays ``image``, uint8
[M, H, W, 3], and ``label``, whole numbers [M]. What :func:`.packing.pack_folder` writes also has
``classes``, the name of each class, which are then compared with the data set's.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from cure_fast.console import say
from cure_fast.errors import InputError

from .cached import written_once
from .image_set import ImageSet, check_images

GENERATED_PREFIX = "npz:"
IMAGES, LABELS, CLASSES = "image.npy", "label.npy", "classes.npy"
# Of an entry of a zip file: its own header, whose last two numbers are the lengths of what follows.
ENTRY_BYTES = 30


def generated_hash(name: str) -> str:
    """Return 16 hexadecimal digits that identify the images and labels of ``npz:PATH``.

    They are of the sizes and checksums (CRC-32) that the file itself has of its arrays, so that
    gigabytes need not be read. They tell files apart; they are no proof that the disk is sound.

    Raises:
        InputError: for a file that cannot be read, or has other arrays.
    """
    path = npz_path(name)
    with opened(path) as archive:
        infos = [entry(path, archive, array) for array in (IMAGES, LABELS)]
        found = [(info.filename, info.file_size, info.CRC) for info in infos]
    return hashlib.sha256(repr(found).encode()).hexdigest()[:16]


def read_generated(name: str, training: ImageSet, *, checksum: str | None, cache: Path) -> ImageSet:
    """Return the images of ``npz:PATH``, which stay on the disk until they are asked for.

    Those of a compressed file are unpacked into ``cache`` first, once.

    Args:
        name: ``npz:PATH``.
        training: the training images, with whose classes and size the generated ones have to agree.
        checksum: what :func:`generated_hash` has to return; None for anything.
        cache: folder below which unpacked images are kept.

    Raises:
        InputError: for a file that is absent, damaged, another one, or of other images.
    """
    path, found = npz_path(name), generated_hash(name)
    if checksum not in (None, found):
        raise InputError(
            f"--aux {name}: expected images with --aux-hash {checksum}, got {found}: the file has "
            "become another. Give the one that the run began with, or start a new run."
        )
    with opened(path) as archive:
        packed = entry(path, archive, IMAGES)
        images = (
            mapped_entry(path, packed)
            if packed.compress_type == zipfile.ZIP_STORED
            else unpacked(archive, packed, cache.expanduser() / "generated" / f"{found}.npy")
        )
        labels = read_entry(path, archive, LABELS)
        classes = training.classes
        if CLASSES in archive.namelist():
            classes = tuple(map(str, read_entry(path, archive, CLASSES)))
    if classes != training.classes:
        raise InputError(
            f"--aux {name}: expected the classes {', '.join(training.classes)} in this order, got "
            f"{', '.join(classes)}; name and order its classes as those of {training.name}."
        )
    if np.issubdtype(labels.dtype, np.integer):
        labels = labels.astype(np.int64, copy=False)
    image_set = ImageSet(f"--aux {name}", images, labels, classes, f"generated images {path}")
    check_images(image_set)
    if images.shape[1:] != training.images.shape[1:]:
        raise InputError(
            f"--aux {name}: expected images of {training.image_size} pixels like those of "
            f"{training.name}, got {image_set.image_size}; make them anew with "
            f"`cure-fast data pack --image-size {training.image_size}`, or take another file."
        )
    return image_set


def npz_path(name: str) -> Path:
    """Return the path of ``npz:PATH``, whose ``~`` is the home folder where there is one."""
    return Path(os.path.expanduser(name.removeprefix(GENERATED_PREFIX)))


def opened(path: Path) -> zipfile.ZipFile:
    """Return an .npz as the zip file that it is."""
    try:
        return zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise refusal(path, getattr(error, "strerror", None) or error) from error


def refusal(path: Path, why: object) -> InputError:
    """Return the error for a file that is not what it should be."""
    return InputError(
        f"--aux {GENERATED_PREFIX}{path}: expected an .npz with the arrays image (uint8 "
        f"[M, H, W, 3]) and label ([M]): {why}. Name another file, or make one: `cure-fast data "
        "pack`."
    )


def entry(path: Path, archive: zipfile.ZipFile, array: str) -> zipfile.ZipInfo:
    """Return what the file says of one of its arrays."""
    try:
        return archive.getinfo(array)
    except KeyError as error:
        names = ", ".join(name.removesuffix(".npy") for name in archive.namelist()) or "nothing"
        raise refusal(path, f"it has no {array.removesuffix('.npy')}, but {names}") from error


def read_entry(path: Path, archive: zipfile.ZipFile, array: str) -> NDArray[Any]:
    """Return an array of the file in memory."""
    with archive.open(entry(path, archive, array)) as file:
        try:
            return np.lib.format.read_array(file, allow_pickle=False)
        except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise refusal(path, error) from error


def mapped_entry(path: Path, packed: zipfile.ZipInfo) -> NDArray[Any]:
    """Return an array that lies in the file as it is, mapped: no byte of it is read yet."""
    with path.open("rb") as file:
        file.seek(packed.header_offset)
        header = file.read(ENTRY_BYTES)
        lengths = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
        file.seek(packed.header_offset + ENTRY_BYTES + sum(lengths))
        try:
            shape, fortran, dtype = read_header(file)
            # Which also finds a file that is cut.
            order = "F" if fortran else "C"
            return np.memmap(path, dtype, "r", file.tell(), shape, order)
        except (ValueError, OSError) as error:
            raise refusal(path, error) from error


def read_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Return shape, whether columns come first, and type of an .npy; ValueError for a wrong one."""
    version = np.lib.format.read_magic(file)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in read:
        raise ValueError(f"version {version} of NumPy's format")
    shape, fortran, dtype = read[version](file)
    if dtype.hasobject:
        raise ValueError("Python objects in place of pixels")
    return shape, fortran, dtype


def unpacked(archive: zipfile.ZipFile, packed: zipfile.ZipInfo, path: Path) -> NDArray[Any]:
    """Return an array of a compressed file, mapped where it has been unpacked, once."""
    source = Path(str(archive.filename))

    def write(target: BinaryIO) -> None:
        gigabytes = packed.file_size / 1e9
        say(f"--aux: the images are compressed: unpacking {gigabytes:.1f} GB, once, to {path}")
        try:
            with archive.open(packed) as file:
                shutil.copyfileobj(file, target, 1 << 20)
        except (EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise refusal(source, error) from error

    written_once(path, write)
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise refusal(source, error) from error
