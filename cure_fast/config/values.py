"""Configurations as JSON values and back, with every wrong entry refused by name."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from cure_fast.config.checks import NONE, check, field_types, parse_fraction, shown
from cure_fast.errors import InputError

T = TypeVar("T")

# Fields of the training attack that an evaluation's radius is for.
BALL = ("eps", "norm")


def to_dict(config: Any) -> dict[str, Any]:
    """Return the dataclass as nested plain dicts, lists, strings and numbers (JSON types)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def sections(config: Any) -> dict[str, Any]:
    """Return the parts of a configuration that hold its flags, by name."""
    own = {n: part for n, part in vars(config).items() if dataclasses.is_dataclass(part)}
    return own | dict(config.policies)


def with_values(config: T, values: Mapping[str, Any]) -> T:
    """Return a configuration with other values of fields, which are unique among its sections.

    Fields that it does not have are left alone. An evaluation is within another --eps too, unless
    its own radius is given with it. Another norm without a radius raises :class:`InputError`.
    """
    attack = config.attack  # pyright: ignore[reportAttributeAccessIssue]
    if "eps" not in values:
        check_norm(values.get("norm"), attack.norm, "--norm", "--eps")
    if "eval_eps" not in values:
        norm = values.get("norm", config.evaluated_norm)  # pyright: ignore[reportAttributeAccessIssue]
        check_norm(values.get("eval_norm"), norm, "--eval-norm", "--eval-eps")
    if any(values.get(name, getattr(attack, name)) != getattr(attack, name) for name in BALL):
        values = {"eval_eps": None, **values}
    changes: dict[str, Any] = {}
    policies = dict(config.policies)  # pyright: ignore[reportAttributeAccessIssue]
    for name, part in sections(config).items():
        taken = {field: values[field] for field in vars(part) if field in values}
        if taken:
            (policies if name in policies else changes)[name] = dataclasses.replace(part, **taken)
    return dataclasses.replace(config, **changes, policies=policies)  # pyright: ignore[reportArgumentType]


def check_norm(wanted: str | None, own: str, flag: str, radius: str) -> None:
    """Raise ``InputError`` for another norm than a configuration's own, without a radius in it."""
    if wanted not in (None, own):
        raise InputError(
            f"{flag} {wanted}: expected {radius} with it, as the radius so far is one in {own}. "
            f"Usual for CIFAR-10 are {radius} 8/255 in linf and {radius} 0.5 in l2."
        )


def digest(values: Mapping[str, Any]) -> str:
    """Return 16 hexadecimal digits that identify a JSON-like mapping, whatever its key order."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def from_dict(kind: type[T], values: Mapping[str, Any], **narrow: type) -> T:
    """Build the dataclass ``kind`` from what :func:`to_dict` writes; missing fields take defaults.

    ``narrow`` has, for a field annotated with a base class, the subclass to build. An unknown key
    and a value of the wrong type raise :class:`InputError`.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"configuration: expected a table for {kind.__name__}, got {values!r}.")
    hints = {**field_types(kind), **narrow}
    names = [f.name for f in dataclasses.fields(kind)]  # pyright: ignore[reportArgumentType]
    unknown = sorted(set(values) - set(names))
    if unknown:
        raise InputError(
            f"configuration: unknown {', '.join(map(shown, unknown))} in {kind.__name__}; "
            f"it has {', '.join(names)}."
        )
    return kind(**{name: convert(name, hints[name], value) for name, value in values.items()})


def convert(name: str, hint: Any, value: Any) -> Any:
    """Return the JSON ``value`` as the type ``hint`` of the field ``name``; refuse another."""
    origin, arguments = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value)  # pyright: ignore[reportArgumentType]
    if origin in (Union, types.UnionType):
        kinds = [a for a in arguments if a is not type(None)]
        # A word in a number's place.
        words = [a for a in kinds if get_origin(a) is Literal and isinstance(value, str)]
        named = any(value in get_args(word) for word in words)
        # The text is how command lines and files of TOML write it.
        if value in (None, *NONE) and len(kinds) < len(arguments) and not named:
            return None
        return convert(name, [*words, *kinds][0], value)
    if origin is Literal:
        check(value in arguments, name, value, f"one of {', '.join(map(str, arguments))}")
        return value
    if origin is tuple:
        check(isinstance(value, list | tuple), name, value, "a list")
        return tuple(convert(name, arguments[0], item) for item in value)
    if hint is float and isinstance(value, str):
        try:
            return parse_fraction(value)
        except ValueError:
            check(False, name, value, "a number such as 0.03 or 8/255")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        check(abs(value) <= sys.float_info.max, name, value, "a number that a float can hold")
        return float(value)
    right = isinstance(value, hint) and not (hint is not bool and isinstance(value, bool))
    check(right, name, value, f"a value of type {hint.__name__}")
    return value
