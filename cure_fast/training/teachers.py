"""Teachers: networks that a method learns from, and that stay as they are.

A run keeps a copy of each in its folder, which says how to rebuild it: a resumed run needs no other
file, and no checkpoint holds them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cure_fast.config import Config
from cure_fast.console import warn
from cure_fast.errors import InputError
from cure_fast.files import file_hash, user_path
from cure_fast.methods import find_method, given_teachers
from cure_fast.models import ImageClassifier
from cure_fast.models.building import load_model
from cure_fast.models.weights import read_metadata, save_weights

# Keys of a copy's metadata: where the teacher came from, and the digest of that file.
SOURCE, DIGEST = "source", "source_sha256"
# What a run of a teacher's kind is trained with.
METHOD_OF = {"natural": "natural", "robust": "pgd_at"}


def remedy(name: str) -> str:
    """Return how to make the teacher ``name``."""
    return (
        f"Train one: cure-fast train RECIPE --method {METHOD_OF.get(name, 'pgd_at')}, and write "
        f"--teacher {name}:RUN with its run folder."
    )


def sources(config: Config) -> dict[str, str]:
    """Return where each of the method's teachers comes from, by name.

    Raises:
        InputError: if one is missing.
    """
    given = given_teachers(config)
    for name in find_method(config.method).teachers:
        if name not in given:
            raise InputError(
                f"--teacher: --method {config.method} learns from a {name} teacher, got none. "
                f"{remedy(name)}"
            )
    return given


def copy_name(name: str) -> str:
    """Return what the run's copy of the teacher ``name`` is called."""
    return f"teacher-{name}"


def copy_of(folder: Path, name: str) -> Path:
    """Return where the run in ``folder`` keeps the teacher ``name``."""
    return folder / f"{copy_name(name)}.safetensors"


def file_of(source: str) -> Path:
    """Return the file of weights that a teacher's run folder or file is."""
    path = user_path(source, "--teacher")
    return path / "model.safetensors" if path.is_dir() else path


def is_kept(folder: Path, name: str, source: str) -> bool:
    """Return whether the run has a copy of the teacher from ``source`` already.

    Raises:
        InputError: if another file lies there now than the one that was copied.
    """
    path = copy_of(folder, name)
    told = read_metadata(path) if path.exists() else {}
    if told.get(SOURCE) != source:
        return False
    given = file_of(source)
    if given.exists() and file_hash(given) != told.get(DIGEST):
        raise InputError(
            f"--teacher: {given} is not the {name} teacher that the run has learned from so far, "
            f"whose SHA-256 is {told.get(DIGEST)}. Put that back, or start a new run with --out."
        )
    return True


def check_sources(config: Config, folder: Path) -> None:
    """Refuse a teacher that is neither there nor kept, and a file that became another."""
    for name, source in sources(config).items():
        if not is_kept(folder, name, source) and not file_of(source).exists():
            raise InputError(f"teacher {name}: {file_of(source)} is not there. {remedy(name)}")


def read_teachers(config: Config, num_classes: int, folder: Path) -> dict[str, ImageClassifier]:
    """Return the method's teachers on the CPU, from the run's own copies where it has them.

    The run's folder need not be there.

    Raises:
        InputError: if one cannot be read or rebuilt, tells another number of classes apart, or is
            not the one that the run has learned from.
    """
    teachers = {}
    for name, source in sources(config).items():
        path = copy_of(folder, name) if is_kept(folder, name, source) else file_of(source)
        try:
            teacher = load_model(path, trusted=config.model.model)
        except InputError as error:
            raise InputError(f"teacher {name}: {error} {remedy(name)}") from error
        classes = int(teacher.description["num_classes"])
        if classes != num_classes:
            raise InputError(
                f"teacher {name}: {path} tells {classes} classes apart, and {config.data.data} has "
                f"{num_classes}. {remedy(name)}"
            )
        teachers[name] = teacher
        if (run := user_path(source, "--teacher")).is_dir() and not (run / "results.json").exists():
            warn(f"teacher {name}: {run} has no results yet; its training may not be finished")
    return teachers


def keep_teachers(config: Config, teachers: Mapping[str, ImageClassifier], folder: Path) -> None:
    """Copy the method's teachers into the run's folder, but for those that are there."""
    for name, source in sources(config).items():
        if not is_kept(folder, name, source):
            told = {SOURCE: source, DIGEST: file_hash(file_of(source))}
            save_weights(teachers[name], copy_of(folder, name), teachers[name].description | told)
