"""Configuration files: the flags of a run as TOML or JSON, tables for its sections."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cure_fast.config import Config
from cure_fast.config.checks import as_word, parse_fraction, shown
from cure_fast.config.values import sections
from cure_fast.errors import InputError

ENDINGS = (".toml", ".json")


def expanded(recipe: str, words: Sequence[str]) -> tuple[str, list[str]]:
    """Return recipe and words, with what a configuration file in the recipe's place says before.

    Its key ``recipe`` names what the others start from, without which that is the library's own.

    Raises:
        InputError: for a file that cannot be read, or holds what is no flag.
    """
    # A folder may have such a name.
    if not recipe.endswith(ENDINGS) or os.path.isdir(recipe):
        return recipe, [*words]
    try:
        text = Path(recipe).read_text(encoding="utf-8")
        found = tomllib.loads(text) if recipe.endswith(".toml") else json.loads(text)
    except OSError as error:
        raise InputError(
            f"{recipe}: expected a configuration file: {error.strerror}. `cure-fast show RECIPE "
            "--toml` writes one."
        ) from error
    except (ValueError, RecursionError) as error:
        kind = recipe.rpartition(".")[2].upper()
        raise InputError(f"{recipe}: not valid {kind}: {error}. Mend it there.") from error
    if not isinstance(found, Mapping):
        raise InputError(f"{recipe}: expected names and their values, got {shown(found)}.")
    base = found.get("recipe", "")
    if not isinstance(base, str):
        raise InputError(f"{recipe}: recipe: expected the name of a recipe, got {shown(base)}.")
    own = {key: value for key, value in found.items() if key != "recipe"}
    return base, [*flat(recipe, own), *words]


def flat(path: str, values: Mapping[str, Any]) -> Iterator[str]:
    """Yield the flags of a file; those of a table as if they stood outside.

    Raises:
        InputError: for a value that no flag has.
    """
    for name, value in values.items():
        flag = f"--{name.replace('_', '-')}"
        if name == "policies" and isinstance(value, Mapping):
            yield f"{flag}={','.join(value) or 'none'}"
        if isinstance(value, Mapping):
            yield from flat(path, value)
        elif isinstance(value, bool):
            yield flag if value else f"--no-{flag[2:]}"
        elif isinstance(value, list) and all(isinstance(v, str | int | float) for v in value):
            yield f"{flag}={','.join(map(as_text, value)) or 'none'}"
        elif value is None or isinstance(value, str | int | float):
            yield f"{flag}={as_text(value)}"
        else:
            raise InputError(
                f"{path}: {name}: expected a text, a number, true, false or a list of them, got "
                f"{shown(value)}."
            )


def as_text(value: Any) -> str:
    """Return a value as a word that reads as exactly that."""
    return repr(value) if isinstance(value, float) else str(value)


def as_toml(config: Config, recipe: str) -> str:
    """Return a configuration as a file that gives it again."""
    lines = [
        "# A configuration of cure-fast: `cure-fast train FILE.toml`, and further flags after it.",
        f"recipe = {json.dumps(recipe)}" if recipe else "",
        f"name = {json.dumps(config.name)}",
        f"method = {json.dumps(config.method)}",
        f"policies = {json.dumps([*config.policies])}",
    ]
    for name, part in sections(config).items():
        lines += ["", f"[{name}]", *(f"{key} = {as_value(v)}" for key, v in vars(part).items())]
    return "\n".join(lines)


def as_value(value: Any) -> str:
    """Return a setting as TOML writes it; None, which TOML has not, as the text that flags take."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(as_value, value))}]"
    if isinstance(value, float):
        word = as_word(value)
        return json.dumps(word) if "/" in word and parse_fraction(word) == value else repr(value)
    return json.dumps(str(value)) if value is None or isinstance(value, str) else str(value)
