"""A configuration from the words after ``train`` and ``show``: a recipe or a run, and flags."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from cure_fast.cli.flags import flags_of, pointing_to, read_flags, split_flags
from cure_fast.config import Config
from cure_fast.config.checks import listed
from cure_fast.config.values import sections, with_values
from cure_fast.errors import InputError
from cure_fast.methods import METHODS, check_config, publish, select_method
from cure_fast.policies import POLICIES, select_policies
from cure_fast.recipes import find_recipe, recipe_called
from cure_fast.runs.folder import load_config

# Flags that stand for no field of a section, and their types.
OWN: dict[str, Any] = {
    "name": str,
    "method": str,
    "policies": tuple[str, ...],
    "regime": Literal["recipe", "published"],
}
# Flags of earlier versions, and what to do without them.
GONE = {
    "joint_forward": "one pass for both images read more than it saved; leave it out",
    "lr_decay": "write the factor of each milestone, such as --lr-factors 0.1,0.01",
    "evaluate_revision": "write --networks revision",
}


def read_config(
    recipe: str, words: Sequence[str], prog: str, switches: Mapping[str, Any]
) -> tuple[Config, dict[str, Any]]:
    """Return the configuration that a recipe or run folder and the flags after it give.

    ``prog`` has the words before the flags, for messages; ``switches`` are flags of the command
    itself with their types, whose values are returned too where they are given.
    """
    config = base_config(recipe, words, prog)
    parts = sections(config)
    flags = {**OWN, **flags_of(*map(type, parts.values())), **switches}
    with pointing_to(prog, "each flag"):
        values = read_flags(words, flags, partial(of_others, config))
        config = replace(with_values(config, values), name=values.get("name", config.name))
        check_config(config)
    return config, {name: values[name] for name in switches if name in values}


def start_of(recipe: str) -> Config:
    """Return the configuration of a recipe or run folder; of no text, what a recipe starts from."""
    if not recipe:
        return select_method(Config(), Config.method)
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


def base_config(recipe: str, words: Sequence[str], prog: str) -> Config:
    """Return the recipe's or run's own with the flags of ``OWN``, which decide what others are."""
    config = start_of(recipe)
    with pointing_to(prog, "each flag"):
        given, _ = split_flags(words, {**OWN, "data": str, "model": str})
    if given.get("model", config.model.model) != config.model.model:
        # The width is that of the recipe's own model.
        config = replace(config, model=replace(config.model, width=None))
    if "method" in given:
        config = select_method(config, given["method"])
    if given.get("regime") == "published":
        # What is published depends on data and model, whose flags are read with the others later.
        for name in given.keys() & {"data", "model"}:
            part = replace(getattr(config, name), **{name: given[name]})
            config = replace(config, **{name: part})
        config = publish(config)
    if "policies" in given:
        config = select_policies(config, given["policies"])
    return config


def of_others(config: Config, name: str) -> str:
    """Return what is wrong with a flag of another method, a policy or the past, else nothing."""
    flag = f"--{name.replace('_', '-')}"
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
