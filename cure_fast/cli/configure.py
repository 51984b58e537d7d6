"""A configuration from the words after ``train`` and ``show``: a recipe or a run, and flags."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from cure_fast.cli.flags import flags_of, pointing_to, read_flags, split_flags
from cure_fast.config import Config
from cure_fast.config.values import sections
from cure_fast.training.choices import CHOICES, choose, configure, of_others, starting_point


def read_config(
    recipe: str, words: Sequence[str], prog: str, switches: Mapping[str, Any]
) -> tuple[Config, dict[str, Any]]:
    """Return the configuration that a recipe or run folder and the flags after it give.

    ``prog`` has the words before the flags, for messages; ``switches`` are flags of the command
    itself with their types, whose values are returned too where they are given.
    """
    start = starting_point(recipe)
    config = chosen(start, words, prog)
    parts = sections(config)
    flags = {**CHOICES, **flags_of(*map(type, parts.values())), **switches}
    with pointing_to(prog, "each flag"):
        values = read_flags(words, flags, partial(of_others, config))
        own = {name: values.pop(name) for name in switches if name in values}
        return configure(start, values), own


def base_config(recipe: str, words: Sequence[str], prog: str) -> Config:
    """Return the recipe's or run's own with the flags that decide what others are."""
    return chosen(starting_point(recipe), words, prog)


def chosen(config: Config, words: Sequence[str], prog: str) -> Config:
    """Return a configuration with those of the flags that decide what others are."""
    with pointing_to(prog, "each flag"):
        given, _ = split_flags(words, {**CHOICES, "data": str, "model": str})
    return choose(config, given)
