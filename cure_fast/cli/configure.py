"""A configuration from the words after ``train`` and ``show``: a recipe or a run, and flags."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from cure_fast.cli.flags import flags_of, pointing_to, read_flags, split_flags
from cure_fast.config import Config
from cure_fast.config.values import sections, with_values
from cure_fast.methods import check_config
from cure_fast.training.choices import CHOICES, choose, of_others, starting_point


def read_config(
    recipe: str, words: Sequence[str], prog: str, switches: Mapping[str, Any]
) -> tuple[Config, dict[str, Any]]:
    """Return the configuration that a recipe or run folder and the flags after it give.

    ``prog`` has the words before the flags, for messages; ``switches`` are flags of the command
    itself with their types, whose values are returned too where they are given.
    """
    config = base_config(recipe, words, prog)
    parts = sections(config)
    flags = {**CHOICES, **flags_of(*map(type, parts.values())), **switches}
    with pointing_to(prog, "each flag"):
        values = read_flags(words, flags, partial(of_others, config))
        config = replace(with_values(config, values), name=values.get("name", config.name))
        check_config(config)
    return config, {name: values[name] for name in switches if name in values}


def base_config(recipe: str, words: Sequence[str], prog: str) -> Config:
    """Return the recipe's or run's own with the flags that decide what others are."""
    config = starting_point(recipe)
    with pointing_to(prog, "each flag"):
        given, _ = split_flags(words, {**CHOICES, "data": str, "model": str})
    return choose(config, given)
