"""Run folders: their names, their files, and the configuration they hold."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cure_fast.config import Config
from cure_fast.config_json import from_dict, to_dict
from cure_fast.environment import environment
from cure_fast.errors import InputError
from cure_fast.files import locked, write_json
from cure_fast.methods import find_method

# What may differ when a run is resumed: where and how it executes, and what is measured at its end.
FREE_SECTIONS = ("name", "eval", "run")
BOUND_RUN_FIELDS = ("seed", "amp")
FREE_DATA_FIELDS = ("loader", "workers", "download", "data_root")


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
            f"{path}: expected the configuration of a run: {error.strerror}."
        ) from error
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {error}.") from error
    return config_from_dict(values)


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
        folder = Path(config.run.out).expanduser()
        if resume:
            load_config(folder)
            return folder
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(
                f"--out {folder}: expected a folder that is new or empty. "
                "Add --resume to continue the run in it, or name another."
            )
    else:
        base = Path("runs") / f"{config.name}-{config.method}-s{config.run.seed}"
        names = [base, *(base.with_name(f"{base.name}-{n}") for n in range(2, 10_000))]
        taken = [path for path in names if (path / "config.json").exists()]
        if resume:
            if not taken:
                raise InputError(
                    f"--resume: there is no run in {base}; name its folder with --out."
                )
            return taken[-1]
        folder = next(path for path in names if not path.exists())
    return folder


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
    try:
        with locked(folder / "run.lock"):
            yield folder
    except BlockingIOError as error:
        raise InputError(f"{folder}: another process is running in it.") from error


def start_record(folder: Path, config: Config, loader: str) -> None:
    """Write ``config.json`` and ``environment.json``.

    A resumed run keeps the environment it began in, and lists the later ones under ``resumed``.

    Args:
        folder: the run's folder.
        config: what runs.
        loader: one line on how images are fed.
    """
    write_json(folder / "config.json", to_dict(config))
    path, here = folder / "environment.json", {**environment(), "loader": loader}
    if path.exists():
        first = json.loads(path.read_text(encoding="utf-8"))
        here = {**first, "resumed": [*first.get("resumed", []), here]}
    write_json(path, here)


def check_same_run(folder: Path, config: Config) -> None:
    """Refuse to resume with a configuration that changes what is trained.

    Raises:
        InputError: with the fields that differ.
    """
    stored, wanted = bound_fields(load_config(folder)), bound_fields(config)
    changes = [
        f"{name}: {stored.get(name)!r} in the run, {wanted.get(name)!r} asked for"
        for name in sorted(stored.keys() | wanted.keys())
        if stored.get(name) != wanted.get(name)
    ]
    if changes:
        raise InputError(
            f"--resume {folder}: the configuration differs: {'; '.join(changes)}. "
            f"`cure-fast train {folder} --resume` takes the run's own."
        )


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
