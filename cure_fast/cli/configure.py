"""A configuration from the words after ``train`` and ``show``: a recipe or a run, and flags."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cure_fast.cli.words import UnknownFlagError, flags_of, read_words
from cure_fast.config import Config
from cure_fast.config.checks import shown
from cure_fast.errors import InputError
from cure_fast.methods import METHODS, find_method, select_method
from cure_fast.recipes import RECIPES, find_recipe, with_out
from cure_fast.runs.folder import load_config


def resolve_config(recipe: str, flags: Sequence[str], prog: str) -> Config:
    """Return the recipe's configuration, or a run folder's, changed by the flags."""
    return read_config(recipe, flags, prog, {})[0]


def read_config(
    recipe: str, words: Sequence[str], prog: str, switches: Mapping[str, Any]
) -> tuple[Config, dict[str, Any]]:
    """Return the recipe's configuration, or a run folder's, changed by the words after it.

    ``--method`` is looked up first, because it decides which settings are flags.

    Args:
        recipe: name of a recipe, or a run folder.
        words: the flags with their values.
        prog: the words before the flags, for messages.
        switches: flags of the command itself, with their types.

    Returns:
        The configuration, and the values of the switches that were given.

    Raises:
        InputError: for an unknown recipe, method or flag, or a wrong value.
    """
    config = base_config(recipe, words)
    parts = sections(config)
    own = {"name": str, "method": str}
    flags = {**own, **flags_of(*map(type, parts.values())), **switches}
    try:
        free, values = read_words(words, flags)
        if free:
            raise InputError(
                f"expected flags after {recipe}, each with its value; got {shown(free[0])}."
            )
        changes: dict[str, Any] = {name: values[name] for name in own if name in values}
        for name, part in parts.items():
            taken = {field: values[field] for field in vars(part) if field in values}
            changes |= {name: dataclasses.replace(part, **taken)} if taken else {}
        config = dataclasses.replace(config, **changes)
        find_method(config.method).check(config)
    except InputError as error:
        what = other_methods(error, config.method) or str(error)
        raise InputError(f"{what} `{prog} --help` explains each flag.") from error
    return config, {name: values[name] for name in switches if name in values}


def sections(config: Config) -> dict[str, Any]:
    """Return the parts of a configuration that hold its flags, by name."""
    return {name: part for name, part in vars(config).items() if dataclasses.is_dataclass(part)}


def base_config(recipe: str, words: Sequence[str]) -> Config:
    """Return what the flags change: the recipe or the run's own, with the method they name."""
    folder = Path(recipe) if recipe.strip() else None
    # The functions of os.path take any text, those of Path raise for one that is no path.
    if folder and os.path.lexists(folder / "config.json"):
        config = with_out(load_config(folder), recipe)
    elif folder and recipe not in RECIPES and os.path.isdir(folder):
        if os.access(folder, os.R_OK | os.X_OK, effective_ids=True):
            raise InputError(
                f"{recipe}: expected a run folder, which holds config.json, got a folder without. "
                "Name a folder that `cure-fast train` made, or a recipe (`cure-fast list`)."
            )
        raise InputError(
            f"{recipe}: expected a run folder, got one that may not be opened; change its "
            "permissions, or name another."
        )
    elif recipe not in RECIPES and os.path.lexists(recipe):
        raise InputError(
            f"{recipe}: expected a recipe or a run folder, got a file. Name the folder of a run, "
            "or start from weights with --init-from."
        )
    else:
        config = find_recipe(recipe)
    method = flag_value(words, "--method")
    return config if method is None else select_method(config, method)


def other_methods(error: InputError, method: str) -> str:
    """Return what is wrong where a flag is unknown only because of the method, else nothing."""
    if not isinstance(error, UnknownFlagError):
        return ""
    having = [other for other in METHODS.values() if error.name in vars(other.settings)]
    if not having:
        return ""
    flag, names = error.name.replace("_", "-"), ", ".join(other.name for other in having)
    return f"--{flag}: expected with --method {names}, got it with {method}; leave it out."


def flag_value(words: Sequence[str], name: str) -> str | None:
    """Return the last value given to a flag, written ``--flag value`` or ``--flag=value``."""
    found = None
    for position, word in enumerate(words):
        if word == name and position + 1 < len(words) and not words[position + 1].startswith("--"):
            found = words[position + 1]
        elif word.startswith(name + "="):
            found = word.split("=", 1)[1]
    return found
