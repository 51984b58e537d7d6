"""Configuration files: a run's settings as TOML or JSON, plain or in tables for its sections."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cure_fast.config import Config
from cure_fast.config.checks import as_word, field_types, parse_fraction, shown
from cure_fast.config.values import sections
from cure_fast.errors import InputError

ENDINGS = (".toml", ".json")
# A table of what None and auto come to on the machine that wrote it; of no effect when read.
USED = "used"
SECTIONS = ("settings", "data", "model", "pretrain", "attack", "optim", "eval", "run")


def is_file(word: str) -> bool:
    """Return whether a word names a configuration file, which may be absent."""
    # A folder may have such a name.
    return word.endswith(ENDINGS) and not os.path.isdir(word)


def read_file(path: str) -> tuple[str, dict[str, Any], dict[str, str]]:
    """Return the recipe that a file starts from, its values by field, and the table of each.

    Raises:
        InputError: for a file that cannot be read, a table that there is not, or a value given
            twice or of another kind.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        found = tomllib.loads(text) if path.endswith(".toml") else json.loads(text)
    except OSError as error:
        raise InputError(
            f"{path}: expected a configuration file, got none that can be read "
            f"({error.strerror}). `cure-fast show RECIPE --toml` writes one."
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: not valid {path.rpartition('.')[2].upper()}: {error}. Mend it there."
        ) from error
    if not isinstance(found, Mapping):
        raise InputError(f"{path}: expected names and their values, got {shown(found)}.")
    recipe = found.get("recipe", "")
    if not isinstance(recipe, str) or recipe.endswith(ENDINGS):
        raise InputError(
            f"{path}: recipe: expected the name of a recipe, or a run folder, got {shown(recipe)}."
        )
    values: dict[str, Any] = {}
    tables: dict[str, str] = {}

    def take(entries: Mapping[str, Any], table: str) -> None:
        for name, value in entries.items():
            if name in values:
                raise InputError(f"{path}: {name}: expected once, got it twice. Leave one out.")
            parts = value if isinstance(value, list) else [value]
            if not all(isinstance(part, str | int | float | None) for part in parts):
                raise InputError(
                    f"{path}: {name}: expected a text, a number, true, false or a list of them, "
                    f"got {shown(value)}."
                )
            values[name], tables[name] = value, table

    if isinstance(nested := found.get("policies"), Mapping):
        # How files of runs hold them.
        found = {**found, "policies": [*nested], **nested}
    listed = found.get("policies")
    known = (*SECTIONS, *(listed if isinstance(listed, list) else ()))
    for name, value in found.items():
        if isinstance(value, Mapping):
            if name == USED:
                continue
            if name not in known:
                some = ", ".join(map(str, known))
                raise InputError(f"{path}: [{name}]: expected one of the tables {some}.")
            take(value, name)
        elif name != "recipe":
            take({name: value}, "")
    return recipe, values, tables


def check_tables(path: str, config: Config, tables: Mapping[str, str]) -> None:
    """Raise ``InputError`` for a value in the table of another section than its own."""
    home = {field: name for name, part in sections(config).items() for field in vars(part)}
    for field, table in tables.items():
        if table and home.get(field, table) != table:
            raise InputError(
                f"{path}: {field}: expected in the table [{home[field]}] or in none, got it in "
                f"[{table}]."
            )


def as_toml(config: Config, base: Config, recipe: str) -> str:
    """Return a configuration as a file that gives it again.

    Args:
        config: what it is to give.
        base: what ``recipe`` gives by itself.
        recipe: the recipe that it starts from; empty for none.
    """
    lines = [
        "# A configuration of cure-fast: `cure-fast train FILE.toml`, and further flags after it.",
        *([f"recipe = {json.dumps(recipe)}"] if recipe else []),
        f"name = {json.dumps(config.name)}",
        f"method = {json.dumps(config.method)}",
        f"policies = {json.dumps([*config.policies])}",
    ]
    before = sections(base)
    for name, part in sections(config).items():
        usual, hints = before.get(name), field_types(type(part))
        lines += ["", f"[{name}]"]
        for field, value in vars(part).items():
            # TOML has no word for None: left out, or the text that flags take.
            if value is not None:
                lines.append(f"{field} = {as_value(value, hints[field])}")
            elif getattr(usual, field, None) is not None:
                lines.append(f'{field} = "None"')
    return "\n".join(lines)


def as_value(value: Any, hint: Any) -> str:
    """Return a setting of a type as TOML writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(as_value(each, None) for each in value)}]"
    if isinstance(value, float) or (hint is float and isinstance(value, int)):
        word = as_word(float(value))
        exact = "/" in word and parse_fraction(word) == value
        return json.dumps(word) if exact else repr(float(value))
    return json.dumps(value) if isinstance(value, str) else str(value)
