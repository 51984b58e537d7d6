"""Teachers: networks that a method learns from, and that stay as they are.

A run keeps a copy of each in its folder, which says how to rebuild it: a resumed run needs no other
file, and no checkpoint holds them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cure_fast.config import Config
from cure_fast.errors import InputError
from cure_fast.files import user_path
from cure_fast.methods import find_method
from cure_fast.models import ImageClassifier
from cure_fast.models.building import load_model
from cure_fast.models.weights import read_metadata, save_weights

# Key of a copy's metadata: where the teacher came from.
SOURCE = "source"
REMEDY = "Train one, as with `cure-fast train RECIPE --method natural`, and name its run folder."


def copy_name(name: str) -> str:
    """Return what the run's copy of the teacher ``name`` is called."""
    return f"teacher-{name}"


def copy_of(folder: Path, name: str) -> Path:
    """Return where the run in ``folder`` keeps the teacher ``name``."""
    return folder / f"{copy_name(name)}.safetensors"


def is_kept(folder: Path, name: str, source: str) -> bool:
    """Return whether the run has a copy of the teacher from ``source`` already."""
    path = copy_of(folder, name)
    return path.exists() and read_metadata(path).get(SOURCE) == source


def read_teachers(config: Config, num_classes: int, folder: Path) -> dict[str, ImageClassifier]:
    """Return the method's teachers on the CPU, from the run's own copies where it has them.

    The run's folder need not be there.

    Raises:
        InputError: if one cannot be read or rebuilt, or tells another number of classes apart.
    """
    teachers = {}
    for name, source in find_method(config.method).teachers(config).items():
        kept = is_kept(folder, name, source)
        try:
            path = copy_of(folder, name) if kept else user_path(source, "file")
            teacher = load_model(path)
        except InputError as error:
            raise InputError(f"teacher {name}: {error} {REMEDY}") from error
        classes = int(teacher.description["num_classes"])
        if classes != num_classes:
            raise InputError(
                f"teacher {name}: {path} tells {classes} classes apart, and {config.data.data} has "
                f"{num_classes}. {REMEDY}"
            )
        teachers[name] = teacher
    return teachers


def keep_teachers(config: Config, teachers: Mapping[str, ImageClassifier], folder: Path) -> None:
    """Copy the method's teachers into the run's folder, but for those that are there."""
    for name, source in find_method(config.method).teachers(config).items():
        if not is_kept(folder, name, source):
            metadata = teachers[name].description | {SOURCE: source}
            save_weights(teachers[name], copy_of(folder, name), metadata)
