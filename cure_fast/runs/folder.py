"""Run folders: their names, their files, and the configuration they hold."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch

from cure_fast import distributed
from cure_fast.config import Config
from cure_fast.config.checks import check
from cure_fast.config.values import from_dict, to_dict
from cure_fast.console import command, say, warn
from cure_fast.errors import InputError
from cure_fast.files import clear_unfinished, locked, user_path, write_json
from cure_fast.loaders import generated_hash
from cure_fast.methods import find_method
from cure_fast.plugins.lookup import short
from cure_fast.policies import find_policy
from cure_fast.runs.environment import environment, precision
from cure_fast.runs.former import upgraded

# What may differ when a run is resumed: where and how it executes, and what is measured at its end.
# Where generated images lie is free, as their checksum is not.
FREE_FIELDS = ("name", "data.loader", "data.workers", "data.download", "data.data_root", "data.aux")
# All of ``run`` and ``eval`` may too, but for these; the last two decide which epoch is the best.
BOUND_FIELDS = (
    *("run.seed", "run.amp", "run.deterministic"),
    *("eval.val_every", "eval.val_attack_steps"),
)
LOCK = "run.lock"
# What not even --override changes: the state in a checkpoint has the form that these give it, and
# what the method and each policy call fixed.
FIXED_FIELDS = (
    "method",
    "model.model",
    "model.width",
    "model.stem",
    "model.normalize",
    "optim.optimizer",
    "run.amp",
    "policies",
)
# What decides which images an epoch's batches hold: it may change between two epochs alone.
EPOCH_FIELDS = (
    "data.aux_hash",
    "data.aux_share",
    "data.data",
    "data.image_size",
    "data.split_seed",
    "data.train_images",
    "data.val_images",
    "optim.batch_size",
    "run.seed",
)
# What may change the last bits of a result where it differs from before.
BITS = {
    "cuda": ("cure_fast", "torch", "gpu", "precision", "processes"),
    "cpu": ("cure_fast", "torch", "threads", "processes"),
}


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
            "Give the folder of a run, such as runs/digits-resnet-small-cure-s0."
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
    rest = {"settings": {}, **upgraded(values)}
    settings = type(find_method(rest["method"]).settings)
    stored = rest.pop("policies")
    check(isinstance(stored, dict), "policies", stored, "a table with the settings of each policy")
    policies = {n: from_dict(type(find_policy(n).settings), v) for n, v in stored.items()}
    return replace(from_dict(Config, rest, settings=settings), policies=policies)


def run_folder(config: Config, *, resume: bool) -> Path:
    """Return the folder for a new run, or of the run to resume; nothing is made yet.

    A folder named with --out is never written over. Without --out the name says data, model,
    method, policies and seed, with a number where it is taken; resuming takes the newest of them
    that is of the same recipe, or else the newest.

    Raises:
        InputError: if the folder exists (new run) or holds no run (resume).
    """
    if config.run.out is not None:
        folder = user_path(config.run.out, "--out")
        if resume:
            load_config(folder)
        elif not is_free(folder):
            raise InputError(
                f"--out {folder}: expected a folder that is new or empty. "
                "Add --resume to continue the run in it, or name another."
            )
        return folder
    # A policy called as the method that brings it comes once.
    trained = "+".join(dict.fromkeys(map(short, (config.method, *config.policies))))
    data, model = short_name(config.data.data), short_name(config.model.model)
    base = Path("runs") / f"{data}-{model}-{trained}-s{config.run.seed}"
    if resume:
        return newest_run(base, config.name)
    names = (base.with_name(f"{base.name}-{n}") for n in count(2))
    return next(path for path in chain([base], names) if not path.exists())


def short_name(name: str) -> str:
    """Return what a folder's name has for a data set or model: of ``kind:path`` the path's end."""
    kind, colon, place = name.partition(":")
    end = Path(place).name if colon else name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", end)[:64].strip("-.") or kind


def is_free(folder: Path) -> bool:
    """Return whether a run may begin in ``folder``: it is absent, or holds nothing of anybody's.

    A run that was killed before it wrote its configuration leaves a lock file, and perhaps an
    unfinished file of :func:`replacing`; there is nothing in it to resume.
    """
    if not folder.is_dir():
        return not folder.exists()
    left = (path.name for path in folder.iterdir())
    return all(name == LOCK or (name.startswith(".") and ".tmp-" in name) for name in left)


def newest_run(base: Path, recipe: str) -> Path:
    """Return the run among ``base``, ``base-2``, ``base-3`` ... with the highest number.

    Those of ``recipe`` come before all others.

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
    newest_first = [numbers[number] for number in sorted(numbers, reverse=True)]
    same = (path for path in newest_first if load_config(path).name == recipe)
    return next(same, newest_first[0])


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
    with held(
        folder,
        busy="Wait for its end, or name another folder with --out.",
        denied="Change that, or copy the folder and resume the copy.",
    ):
        yield folder


@contextmanager
def held(folder: Path, *, busy: str, denied: str) -> Iterator[None]:
    """Hold an existing run folder for the block: no other process trains or writes results in it.

    Raises:
        InputError: if another process holds it, with the advice ``busy``, or it cannot be written
            to, with the advice ``denied``.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(folder / LOCK))
            evaluated = folder / "evaluation"
            clear_unfinished(folder, evaluated, *(p for p in evaluated.rglob("*") if p.is_dir()))
        except BlockingIOError as error:
            raise InputError(f"{folder}: another process is running in it. {busy}") from error
        except OSError as error:
            raise InputError(
                f"{folder}: a run must be able to write in its folder: {error.strerror}. {denied}"
            ) from error
        yield


def start_record(
    folder: Path, config: Config, loader: str, *, device: torch.device, changes: list[str]
) -> None:
    """Write ``config.json`` and ``environment.json``.

    A resumed run keeps the environment it began in, and lists the later ones under ``resumed``,
    with the ``changes`` that :func:`check_same_run` found.

    Raises:
        InputError: if the environment that the run began in cannot be read.
    """
    path = folder / "environment.json"
    here = {**environment(), "device": device.type, "loader": loader}
    here["precision"] = precision(config.run.amp, device)
    here["processes"] = distributed.processes()
    if path.exists():
        first, *later = read_environments(path)
        warn_of_other_bits([first, *later][-1], here)
        here |= {"changes": changes} if changes else {}
        here = {**first, "resumed": [*later, here]}
    write_json(folder / "config.json", to_dict(config))
    write_json(path, here)


def read_environments(path: Path) -> list[dict[str, Any]]:
    """Return what a run recorded of the machines it ran on, one for each start.

    Raises:
        InputError: if it is not what a run writes.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        starts = [values, *values.get("resumed", [])]
    except (AttributeError, TypeError, ValueError, RecursionError):
        starts: list[Any] = [None]
    if not all(isinstance(start, dict) for start in starts):
        raise InputError(
            f"{path}: expected the record that the run wrote, and it is damaged. "
            "Delete the file to go on without it."
        )
    return starts


def warn_of_other_bits(before: dict[str, Any], here: dict[str, Any]) -> None:
    """Print a warning where a run goes on with other versions, threads, or kind of GPU."""
    told = [
        f"{name} {before[name]} then and {here[name]} now"
        for name in BITS[here["device"]]
        if before.get(name) is not None and before[name] != here[name]
    ]
    if told:
        warn(
            f"the run goes on with {', '.join(told)}: its results may differ in their last bits "
            "from those of a run that was never stopped"
        )


def recorded_threads(folder: Path) -> int | None:
    """Return how many threads a run computed with when it last began, where this machine has them.

    Raises:
        InputError: if its record is damaged.
    """
    path = folder / "environment.json"
    number = read_environments(path)[-1].get("threads") if path.exists() else None
    fits = type(number) is int and 0 < number <= (os.cpu_count() or 1)
    return number if fits else None


def check_device(folder: Path, device: torch.device) -> None:
    """Refuse to continue a run on another type of device than its newest checkpoint is of.

    The random generators of a GPU and of a CPU have states of different forms.

    Raises:
        InputError: if the run recorded another type, or its record is damaged.
    """
    path = folder / "environment.json"
    trained_on = read_environments(path)[-1].get("device") if path.exists() else None
    # Earlier versions did not record it.
    if trained_on not in (None, device.type):
        raise InputError(
            f"--device: this run was trained on {trained_on}, and a checkpoint cannot follow to "
            f"{device.type}. Continue it there, or start anew with another --out."
        )


def check_position(changed: Iterable[str], *, batch: int) -> None:
    """Refuse to go on at the 0-based ``batch`` of an epoch where its batches have changed."""
    found = [name for name in changed if name in EPOCH_FIELDS]
    if batch and found:
        raise InputError(
            f"--override: {', '.join(found)} can change only between two epochs, and the newest "
            f"checkpoint is after batch {batch} of one. Leave that as it was, or start anew with "
            "another --out."
        )


def check_same_run(folder: Path, config: Config, *, override: bool = False) -> dict[str, str]:
    """Return how the configuration differs from the run's in what is trained; refuse it by default.

    With ``override`` differences are printed and accepted, but for what a checkpoint cannot follow.

    Returns:
        One line for each field that differs, by its name.

    Raises:
        InputError: with the fields that differ.
    """
    changes = changes_to(folder, config)
    never = {*FIXED_FIELDS, *(f"settings.{name}" for name in find_method(config.method).fixed)}
    never |= {
        f"policies.{name}" for policy in config.policies for name in find_policy(policy).fixed
    }
    fixed = [line for name, line in changes.items() if name in never]
    if override and fixed:
        raise InputError(
            f"--override: a checkpoint cannot follow {'; '.join(fixed)}. "
            "Leave that as it was, or start anew with another --out."
        )
    if changes and not override:
        raise InputError(
            f"--resume {folder}: the configuration differs: {'; '.join(changes.values())}. "
            f"`{command('train', folder, '--resume')}` takes the run's own; "
            "add --override to go on with the changed one."
        )
    for line in changes.values():
        say(f"--override: {line}")
    return changes


def changes_to(folder: Path, config: Config) -> dict[str, str]:
    """Return a line for each field that decides what is trained and differs from the run's."""
    stored, wanted = bound_fields(load_config(folder)), bound_fields(identified(config))
    return {
        name: f"{name}: {stored.get(name)!r} in the run, {wanted.get(name)!r} asked for"
        for name in sorted(stored.keys() | wanted.keys())
        if stored.get(name) != wanted.get(name)
    }


def identified(config: Config) -> Config:
    """Return the configuration with the checksum of the generated images that it names."""
    data = config.data
    if data.aux is None or data.aux_hash is not None:
        return config
    return replace(config, data=replace(data, aux_hash=generated_hash(data.aux)))


def bound_fields(config: Config) -> dict[str, Any]:
    """Return the fields that decide what is trained, by ``section.field``."""
    values = to_dict(config)
    # What steps are, whichever way that was said.
    values["attack"] |= {"step_size": config.attack.step_length, "step_share": None}
    policies = values.pop("policies")
    flat = {"policies": list(policies)}
    flat |= {f"policies.{k}": v for own in policies.values() for k, v in own.items()}
    for section, own in values.items():
        flat |= (
            {f"{section}.{k}": v for k, v in own.items()}
            if isinstance(own, dict)
            else {section: own}
        )
    free = {k for k in flat if k.startswith(("run.", "eval.")) and k not in BOUND_FIELDS}
    return {k: v for k, v in flat.items() if k not in free.union(FREE_FIELDS)}
