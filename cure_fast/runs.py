"""Run folders: their names, their files, and the configuration they hold."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain, count
from pathlib import Path
from typing import Any

from cure_fast.config import Config
from cure_fast.config_json import from_dict, to_dict
from cure_fast.environment import environment
from cure_fast.errors import InputError
from cure_fast.files import locked, user_path, write_json
from cure_fast.methods import find_method

# What may differ when a run is resumed: where and how it executes, and what is measured at its end.
FREE_SECTIONS = ("name", "eval", "run")
BOUND_RUN_FIELDS = ("seed", "amp")
FREE_DATA_FIELDS = ("loader", "workers", "download", "data_root")
LOCK = "run.lock"
# What not even --override changes: the state in a checkpoint has the form that these give it.
FIXED_FIELDS = ("model.model", "model.width", "model.stem", "optim.optimizer")


def load_config(folder: Path) -> Config:
    """Return the configuration of the run in ``folder``.

    Raises:
        InputError: if there is none, or it does not fit this version.
    """
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{path}: expected the configuration of a run: {error.strerror}. "
            "Give the folder of a run, such as runs/quickstart-cure-s0."
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: not valid JSON: {error}. Copy the run's folder again, or start anew."
        ) from error
    try:
        return config_from_dict(values)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def config_from_dict(values: Any) -> Config:
    """Return the configuration that :func:`to_dict` turned into ``values``.

    Raises:
        InputError: for unknown or wrong entries.
    """
    if not isinstance(values, dict) or not isinstance(values.get("method"), str):
        raise InputError("configuration: expected a table with the name of a method.")
    settings = type(find_method(values["method"]).settings)
    return from_dict(Config, values, settings=settings)


def run_folder(config: Config, *, resume: bool) -> Path:
    """Return the folder for a new run, or of the run to resume; nothing is made yet.

    A folder named with --out is never written over. Without --out the name is made from recipe,
    method and seed, with a number where it is taken; resuming takes the newest of them.

    Raises:
        InputError: if the folder exists (new run) or holds no run (resume).
    """
    if config.run.out is not None:
        folder = user_path(config.run.out, "--out")
        if resume:
            load_config(folder)
            return folder
        if not is_free(folder):
            raise InputError(
                f"--out {folder}: expected a folder that is new or empty. "
                "Add --resume to continue the run in it, or name another."
            )
    else:
        base = Path("runs") / f"{config.name}-{config.method}-s{config.run.seed}"
        if resume:
            return newest_run(base)
        names = (base.with_name(f"{base.name}-{n}") for n in count(2))
        folder = next(path for path in chain([base], names) if not path.exists())
    return folder


def is_free(folder: Path) -> bool:
    """Return whether a run may begin in ``folder``: it is absent, or holds nothing of anybody's.

    A run that was killed before it wrote its configuration leaves a lock file, and perhaps an
    unfinished file of :func:`replacing`; there is nothing in it to resume.
    """
    if not folder.is_dir():
        return not folder.exists()
    left = (path.name for path in folder.iterdir())
    return all(name == LOCK or (name.startswith(".") and ".tmp-" in name) for name in left)


def newest_run(base: Path) -> Path:
    """Return the run among ``base``, ``base-2``, ``base-3`` ... with the highest number.

    Raises:
        InputError: if there is none.
    """
    numbers = {1: base} if (base / "config.json").exists() else {}
    for path in base.parent.iterdir() if base.parent.is_dir() else ():
        number = path.name.removeprefix(f"{base.name}-")
        if path.name != number and number.isdecimal() and (path / "config.json").exists():
            numbers[int(number)] = path
    if not numbers:
        raise InputError(f"--resume: there is no run in {base}; name its folder with --out.")
    return numbers[max(numbers)]


@contextmanager
def own_folder(config: Config, *, resume: bool) -> Iterator[Path]:
    """Make or find the run's folder and hold it for the block; no other process can run in it.

    Raises:
        InputError: if it cannot be made, or is in use.
    """
    folder = run_folder(config, resume=resume)
    try:
        while not resume and config.run.out is None:
            try:
                folder.mkdir(parents=True)
                break
            except FileExistsError:
                # Another run has just taken this name.
                folder = run_folder(config, resume=False)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {folder}: cannot make the folder: {error.strerror}.") from error
    with ExitStack() as held:
        try:
            held.enter_context(locked(folder / LOCK))
        except BlockingIOError as error:
            raise InputError(
                f"{folder}: another process is running in it. "
                "Wait for its end, or name another folder with --out."
            ) from error
        except OSError as error:
            raise InputError(
                f"{folder}: a run must be able to write in its folder: {error.strerror}. "
                "Change that, or copy the folder and resume the copy."
            ) from error
        yield folder


def start_record(folder: Path, config: Config, loader: str, *, changes: list[str]) -> None:
    """Write ``config.json`` and ``environment.json``.

    A resumed run keeps the environment it began in, and lists the later ones under ``resumed``.

    Args:
        folder: the run's folder.
        config: what runs.
        loader: one line on how images are fed.
        changes: what :func:`check_same_run` returned; recorded under ``changes``.

    Raises:
        InputError: if the environment that the run began in cannot be read.
    """
    path, here = folder / "environment.json", {**environment(), "loader": loader}
    if path.exists():
        first = read_environment(path)
        here |= {"changes": changes} if changes else {}
        here = {**first, "resumed": [*first.get("resumed", []), here]}
    write_json(folder / "config.json", to_dict(config))
    write_json(path, here)


def read_environment(path: Path) -> dict[str, Any]:
    """Return what a run recorded of the machines it ran on.

    Raises:
        InputError: if it is not what a run writes.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict) or not isinstance(values.get("resumed", []), list):
        raise InputError(
            f"{path}: expected the record that the run wrote, and it is damaged. "
            "Delete the file to go on without it."
        )
    return values


def check_same_run(folder: Path, config: Config, *, override: bool = False) -> list[str]:
    """Return how the configuration differs from the run's in what is trained; refuse it by default.

    Args:
        folder: the run's folder.
        config: what is asked for.
        override: print the differences and accept them, but for what a checkpoint cannot follow.

    Returns:
        One line for each field that differs.

    Raises:
        InputError: with the fields that differ.
    """
    stored, wanted = bound_fields(load_config(folder)), bound_fields(config)
    changes = {
        name: f"{name}: {stored.get(name)!r} in the run, {wanted.get(name)!r} asked for"
        for name in sorted(stored.keys() | wanted.keys())
        if stored.get(name) != wanted.get(name)
    }
    fixed = [line for name, line in changes.items() if name in FIXED_FIELDS]
    if override and fixed:
        raise InputError(
            f"--override: a checkpoint cannot follow {'; '.join(fixed)}. "
            "Leave that as it was, or start anew with another --out."
        )
    if changes and not override:
        raise InputError(
            f"--resume {folder}: the configuration differs: {'; '.join(changes.values())}. "
            f"`cure-fast train {folder} --resume` takes the run's own; "
            "add --override to go on with the changed one."
        )
    for line in changes.values():
        print(f"--override: {line}")
    return list(changes.values())


def bound_fields(config: Config) -> dict[str, Any]:
    """Return the fields that decide what is trained, by ``section.field``."""
    flat: dict[str, Any] = {}
    for section, values in to_dict(config).items():
        if section == "run":
            flat |= {f"run.{name}": values[name] for name in BOUND_RUN_FIELDS}
        elif section not in FREE_SECTIONS and isinstance(values, dict):
            flat |= {f"{section}.{name}": value for name, value in values.items()}
        elif section not in FREE_SECTIONS:
            flat[section] = values
    return {k: v for k, v in flat.items() if k.removeprefix("data.") not in FREE_DATA_FIELDS}
