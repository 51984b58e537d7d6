"""The configuration that a recipe or a run, and values of single fields, give."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from cure_fast.config import Config
from cure_fast.config.checks import field_types, flag_of, listed, nearest, shown
from cure_fast.config.values import convert, sections, with_values
from cure_fast.errors import InputError
from cure_fast.methods import METHODS, check_config, publish, select_method
from cure_fast.policies import POLICIES, select_policies
from cure_fast.recipes import find_recipe, recipe_called
from cure_fast.runs.folder import load_config
from cure_fast.training.config_file import check_tables, is_file, read_file

# What stands for no field of a section, and decides what the others are.
CHOICES: dict[str, Any] = {
    "name": str,
    "method": str,
    "policies": tuple[str, ...],
    "regime": Literal["recipe", "published"],
}
# Fields of earlier versions, and what to do without them.
GONE = {
    "joint_forward": "one pass for both images read more than it saved; leave it out",
    "lr_decay": "write the factor of each milestone, such as --lr-factors 0.1,0.01",
    "evaluate_revision": "write --networks revision",
}


def configure(start: str | os.PathLike[str] | Config, given: Mapping[str, Any]) -> Config:
    """Return a configuration with other values of fields and of :data:`CHOICES`, checked.

    Args:
        start: name of a recipe, a run folder, or a configuration.
        given: values by field; lists are taken for tuples, and paths for text.

    Raises:
        InputError: for an unknown recipe or field, or a wrong value.
    """
    if not isinstance(start, str | os.PathLike | Config):
        raise InputError(
            f"expected a recipe, a run folder or a configuration to start from, got {shown(start)}."
        )
    given = {k: os.fspath(v) if isinstance(v, os.PathLike) else v for k, v in given.items()}
    config = start if isinstance(start, Config) else starting_point(os.fspath(start))
    first = {**CHOICES, "data": str, "model": str}
    config = choose(config, {k: convert(k, first[k], v) for k, v in given.items() if k in first})
    types: dict[str, Any] = {}
    for part in sections(config).values():
        types |= field_types(type(part))
    for name in (name for name in given if name not in types | CHOICES):
        flag, flags = flag_of(name), map(flag_of, types | CHOICES)
        why = of_others(config, name) or f"unknown flag {shown(flag)}.{nearest(flag, flags)}"
        raise InputError(why)
    values = {k: convert(k, types[k], v) for k, v in given.items() if k not in CHOICES}
    config = replace(with_values(config, values), name=given.get("name", config.name))
    check_config(config)
    return config


def starting_point(recipe: str) -> Config:
    """Return the configuration of a recipe, a file, or a run folder, which it names as its own.

    Of no text it is what recipes start from.

    Raises:
        InputError: for what is neither.
    """
    if not recipe:
        return select_method(Config(), Config.method)
    if is_file(recipe):
        return from_file(recipe)
    folder = Path(recipe) if recipe.strip() else None
    # The functions of os.path take any text, those of Path raise for one that is no path.
    if folder and os.path.lexists(folder / "config.json"):
        config = load_config(folder)
        return replace(config, run=replace(config.run, out=recipe))
    if folder and not recipe_called(recipe) and os.path.isdir(folder):
        if os.access(folder, os.R_OK | os.X_OK, effective_ids=True):
            raise InputError(
                f"{recipe}: expected a run folder, which holds config.json, got a folder without. "
                "Name a folder that `cure-fast train` made, or a recipe (`cure-fast list`)."
            )
        raise InputError(
            f"{recipe}: expected a run folder, got one that may not be opened; change its "
            "permissions, or name another."
        )
    if not recipe_called(recipe) and os.path.lexists(recipe):
        raise InputError(
            f"{recipe}: expected a recipe, a run folder or a configuration (.toml, .json), got "
            "another file. To start from weights, name them with --init-from."
        )
    return find_recipe(recipe)


def from_file(path: str) -> Config:
    """Return the configuration of a file, which counts as a recipe.

    Raises:
        InputError: for a file that is wrong, with its name.
    """
    recipe, values, tables = read_file(path)
    try:
        config = configure(recipe, values)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    check_tables(path, config, tables)
    return config


def choose(config: Config, given: Mapping[str, Any]) -> Config:
    """Return ``config`` with what decides which fields there are, and what comes with it.

    Of ``given`` those of :data:`CHOICES` count, and ``data`` and ``model`` as far as others depend
    on them.
    """
    if given.get("model", config.model.model) != config.model.model:
        # The width is that of the recipe's own model.
        config = replace(config, model=replace(config.model, width=None))
    if "method" in given:
        config = select_method(config, given["method"])
    if given.get("regime") == "published":
        # What is published depends on data and model, whose values are taken with the others later.
        for name in given.keys() & {"data", "model"}:
            part = replace(getattr(config, name), **{name: given[name]})
            config = replace(config, **{name: part})
        config = publish(config)
    if "policies" in given:
        names = given["policies"]
        config = select_policies(config, [] if names == ("none",) else names)
    return config


def of_others(config: Config, name: str) -> str:
    """Return what is wrong with a field of another method, a policy or the past, else nothing."""
    flag = flag_of(name)
    if name in GONE:
        return f"{flag} is no more: {GONE[name]}."
    policies = [policy for policy, info in POLICIES.items() if name in vars(info.settings)]
    if policies:
        names = ",".join((*config.policies, *policies))
        return f"{flag}: expected --policies {names} with it, got it without; add that."
    methods = listed(m for m, other in METHODS.items() if name in vars(other.settings))
    if methods:
        return (
            f"{flag}: expected with --method {methods}, got it with {config.method}; leave it out."
        )
    return ""
