"""Any value in any place of the files by which a run is resumed: its configuration, a manifest."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from cure_fast.errors import InputError
from cure_fast.runs.checkpoint import check_checkpoint, load_checkpoint, save_checkpoint
from cure_fast.runs.folder import load_config

FORMAT_1 = Path(__file__).parent / "data" / "run-format-1"
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


def places(values, path=()):
    """The path of every value in nested tables and lists."""
    items = values.items() if isinstance(values, dict) else enumerate(values)
    for key, value in items:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


def put(values, path, value):
    *parents, last = path
    for key in parents:
        values = values[key]
    values[last] = value


CONFIG = json.loads((FORMAT_1 / "config.json").read_text())
MANIFEST = json.loads((FORMAT_1 / "checkpoints/checkpoint-000000003/manifest.json").read_text())


@given(data=st.data(), value=JSON)
def test_any_value_in_any_place_of_a_configuration(tmp_path_factory, data, value):
    values = copy.deepcopy(CONFIG)
    put(values, data.draw(st.sampled_from(list(places(CONFIG)))), value)
    expect_config_or_input_error(tmp_path_factory, json.dumps(values))


@given(text=st.one_of(JSON.map(json.dumps), st.text(), st.just("[" * 50_000 + "]" * 50_000)))
def test_any_text_as_a_configuration(tmp_path_factory, text):
    expect_config_or_input_error(tmp_path_factory, text)


def expect_config_or_input_error(tmp_path_factory, text):
    folder = tmp_path_factory.getbasetemp() / "configs"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        config = load_config(folder)
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000
    else:
        assert load_config(folder) == config or "NaN" in text


@given(data=st.data(), value=JSON)
def test_any_value_in_any_place_of_a_manifest(tmp_path_factory, data, value):
    folder = checkpoint_for_fuzzing(tmp_path_factory)
    original = json.loads((folder / "written.json").read_text())
    values = copy.deepcopy(original)
    put(values, data.draw(st.sampled_from(list(places(original)))), value)
    assume(json.dumps(values) != json.dumps(original))
    expect_reason(folder, json.dumps(values, indent=2) + "\n")


@given(text=st.one_of(JSON.map(json.dumps), st.text(), st.just("[" * 50_000 + "]" * 50_000)))
def test_any_text_as_a_manifest(tmp_path_factory, text):
    expect_reason(checkpoint_for_fuzzing(tmp_path_factory), text)


@given(data=st.data(), value=JSON)
def test_any_value_in_a_manifest_of_the_first_format(tmp_path_factory, data, value):
    folder = tmp_path_factory.getbasetemp() / "first" / "checkpoint-000000003"
    if not folder.exists():
        shutil.copytree(FORMAT_1 / "checkpoints/checkpoint-000000003", folder)
    values = copy.deepcopy(MANIFEST)
    name = data.draw(st.sampled_from(["format", "step", "bytes", "sha256"]))
    assume(json.dumps(value) != json.dumps(values[name]))
    expect_reason(folder, json.dumps(values | {name: value}))


def checkpoint_for_fuzzing(tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "second"
    if not folder.exists():
        folder.mkdir()
        path = save_checkpoint(folder, 1, {"model": {"w": torch.ones(3)}}, CONFIG)
        shutil.copy(path / "manifest.json", path / "written.json")
    return folder / "checkpoint-000000001"


def expect_reason(path, text):
    (path / "manifest.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    problem = check_checkpoint(path)
    assert problem and "\n" not in problem and len(problem) < 500
    output = io.StringIO()
    with (
        contextlib.redirect_stdout(output),
        pytest.raises(InputError, match="no valid checkpoint"),
    ):
        load_checkpoint(path.parent)
