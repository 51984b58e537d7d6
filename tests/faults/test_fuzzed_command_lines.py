"""Command lines and stored configurations at random: an answer or an input error, nothing else."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bad_input import answer, prepared
from cure_fast.cli.flags import flags_of, parameters
from cure_fast.cli.main import COMMANDS
from cure_fast.config.checks import flag_of
from cure_fast.config.values import sections, to_dict
from cure_fast.errors import InputError
from cure_fast.methods import METHODS, select_method
from cure_fast.recipes import RECIPES, find_recipe
from cure_fast.runs.folder import config_from_dict

KINDS = {
    *(type(part) for part in sections(find_recipe("quickstart")).values()),
    *(type(method.settings) for method in METHODS.values()),
    *(k for f in COMMANDS.values() for k in parameters(f).values() if hasattr(k, "__match_args__")),
}
FLAGS = [*map(flag_of, sorted(flags_of(*KINDS))), "--method", "--resume", "--override", "--help"]
TARGETS = [
    *("quickstart", "run", "run-no-model", "run-cut", "good.safetensors", "notes.txt", "missing"),
    *("digits", "folder:photos", "empty-folder", "full", "write", "locked"),
]
VALUES = [
    *("0", "1", "-1", "8/255", "1e30", "nan", "None", "True", "all", "", "auto", "cpu", "cosine"),
    *("natural,pgd20", "0.5,0.75", "trades", "cure_eff", "natural", "none", "9" * 50),
]
# Without / and ~, so that no valid line writes outside the working folder.
texts = st.text(st.characters(exclude_characters="/~."), max_size=12)
flags = st.sampled_from(FLAGS)
values = st.sampled_from(VALUES) | st.sampled_from(TARGETS) | texts


@st.composite
def flags_with_values(draw: st.DrawFn) -> list[str]:
    """A flag with or without a value, in both ways of writing it, sometimes cut or negated."""
    flag = draw(flags)
    shape = draw(st.sampled_from(["two", "two", "two", "equals", "alone", "cut", "no"]))
    if shape == "two":
        return [flag, draw(values)]
    if shape == "equals":
        return [f"{flag}={draw(values)}"]
    if shape == "cut":
        return [flag[: draw(st.integers(1, len(flag)))], draw(values)]
    return [flag if shape == "alone" else f"--no-{flag[2:]}"]


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """A command with a target and flags, in most cases in an order that could be right."""
    command = draw(st.sampled_from([c for c in COMMANDS if c not in ("list", "doctor")]) | texts)
    target = draw(st.sampled_from([*TARGETS, *RECIPES]) | texts)
    parts = [[target], *draw(st.lists(flags_with_values(), max_size=4))]
    if draw(st.integers(0, 4)) == 0:
        parts = draw(st.permutations([[command], *parts]))
    else:
        parts = [command.split(), *parts]
    return [word for part in parts for word in part]


@pytest.fixture(scope="module")
def folder():
    with prepared() as path:
        yield path


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words=command_lines())
def test_lines_end_with_0_or_2_and_one_line(words, folder):
    code, errors = answer(words)
    assert code in (0, 2, None), errors
    lines = errors.count("\n")
    assert lines == (1 if code == 2 else 0) and "Traceback" not in errors
    shutil.rmtree(folder / "runs", ignore_errors=True)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


@st.composite
def changed(draw: st.DrawFn) -> dict[str, Any]:
    """A stored configuration in which entries are changed, dropped and added, up to three."""
    method = draw(st.sampled_from(sorted(METHODS)))
    config = to_dict(select_method(find_recipe(draw(st.sampled_from(sorted(RECIPES)))), method))
    for _ in range(draw(st.integers(0, 3))):
        tables = [config, *(part for part in config.values() if isinstance(part, dict))]
        table = draw(st.sampled_from(tables))
        if not table:
            continue
        name = draw(st.sampled_from(sorted(table)))
        change = draw(st.sampled_from(["change", "drop", "add"]))
        if change == "drop":
            del table[name]
        else:
            table[name if change == "change" else draw(st.text(max_size=8))] = draw(json_values)
    return config


@settings(max_examples=300)
@given(values=changed())
def test_a_changed_configuration_loads_or_is_an_input_error(values):
    try:
        config = config_from_dict(values)
    except InputError as error:
        assert "\n" not in str(error)
        return
    # What loads is what was stored, with defaults where an entry is gone.
    again = to_dict(config)
    assert config_from_dict(again) == config
    for name, value in values.items():
        if isinstance(value, dict):
            assert {k: again[name][k] for k in value} == value
        else:
            assert again[name] == value
