"""Every flag's help: present for each field, with a unit or range for each number."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from typing import get_args, get_type_hints

import pytest

from cure_fast.config import (
    AttackConfig,
    DataConfig,
    EvalConfig,
    MethodSettings,
    ModelConfig,
    OptimConfig,
    PretrainConfig,
    RunConfig,
)
from cure_fast.config.arguments import EvalArgs, ExportArgs
from cure_fast.methods import METHODS
from cure_fast.policies import POLICIES

GROUPS = (DataConfig, ModelConfig, PretrainConfig, AttackConfig, OptimConfig, EvalConfig, RunConfig)
SETTINGS = {type(part.settings) for part in (*METHODS.values(), *POLICIES.values())}
SETTINGS -= {MethodSettings}
CLASSES = sorted({*GROUPS, EvalArgs, ExportArgs, *SETTINGS}, key=lambda kind: kind.__name__)


def helps(kind: type) -> dict[str, str]:
    """Return the docstring below each field of a class and its bases, or an empty one, by name."""
    found = {}
    for base in reversed(kind.__mro__[:-1]):
        found |= own_helps(base)
    return found


def own_helps(kind: type) -> dict[str, str]:
    """Return the docstring below each annotated field in a class's body, by name."""
    (body,) = ast.parse(inspect.getsource(kind)).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for node, after in zip(body.body, [*body.body[1:], ast.Pass()], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            if "ClassVar" in ast.unparse(node.annotation):
                continue
            value = after.value if isinstance(after, ast.Expr) else None
            text = value.value if isinstance(value, ast.Constant) else ""
            found[node.target.id] = text.strip() if isinstance(text, str) else ""
    return found


def is_number(hint: object) -> bool:
    """Return whether the type is int or float, alone, optional or in a tuple."""
    return hint in (int, float) or any(is_number(part) for part in get_args(hint))


def test_the_classes_hold_every_group() -> None:
    names = {kind.__name__ for kind in CLASSES}
    assert {"CureSettings", "AwpSettings", "EvalArgs", "DataConfig", "RunConfig"} <= names


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_field_has_help(kind: type) -> None:
    found = helps(kind)
    assert set(found) == {field.name for field in dataclasses.fields(kind)}
    assert not [name for name, text in found.items() if not text]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_number_states_its_unit_or_range(kind: type) -> None:
    found, hints = helps(kind), get_type_hints(kind)
    numbers = [name for name in found if is_number(hints[name])]
    vague = [name for name in numbers if not re.search(r"\d|\bNone\b|\bfractions?\b", found[name])]
    assert not vague


class Undocumented:
    given: int = 1
    """Images, 1 or more."""
    bare: int = 2
    blank: float = 3
    """ """


def test_missing_help_is_seen() -> None:
    assert helps(Undocumented) == {"given": "Images, 1 or more.", "bare": "", "blank": ""}
    assert is_number(int | None) and is_number(tuple[float, ...])
    assert not is_number(bool) and not is_number(str | None)
