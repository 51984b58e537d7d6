"""A tree of images as one .npz of generated images, written image by image."""

from __future__ import annotations

import os
import zipfile
from itertools import chain
from pathlib import Path

import numpy as np

from cure_fast.errors import InputError

from .folder import list_images, opened
from .generated import CLASSES, IMAGES, LABELS
from .stacking import uniform, write_images


def pack_folder(folder: Path, path: Path, *, image_size: int | None = None) -> int:
    """Write ``folder/<class>/<image>`` as an .npz that ``--aux npz:PATH`` takes; return the count.

    Classes come in the order of their names, which are stored too. One image at a time is in
    memory.

    Args:
        folder: folder with one folder of images per class.
        path: file to write, ending in .npz; one that exists is not written over.
        image_size: as for :func:`.stacking.stack_images`.

    Raises:
        InputError: for images that training would refuse, or a path that is
            taken or cannot be written.
    """
    if path.suffix != ".npz" or path.exists():
        came = "a file that exists" if path.exists() else f"{path}"
        raise InputError(f"OUT: expected a new file ending in .npz, got {came}; name another.")
    classes, files, labels = list_images(folder)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(temporary, "w") as archive:
            each, title = opened(files), f"packing {folder}"
            images = uniform(each, count=len(files), image_size=image_size, title=title)
            first = next(images)
            with archive.open(IMAGES, "w", force_zip64=True) as target:
                write_images(target, chain([first], images), (len(files), *first.shape))
            for name, array in ((LABELS, labels), (CLASSES, np.array(classes))):
                with archive.open(name, "w") as target:
                    np.lib.format.write_array(target, array, allow_pickle=False)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return len(files)
