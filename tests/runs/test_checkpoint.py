"""Checkpoints: what comes back, what is kept, and what is refused before it is read."""

from __future__ import annotations

import io
import json
import random
import shutil
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from cure_fast.errors import InputError
from cure_fast.files import write_json
from cure_fast.runs.checkpoint import (
    check_checkpoint,
    has_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from cure_fast.step.random_state import random_state, restore_random_state, seed_all
from tiny_step import tiny_run

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool)


def state(value):
    return {"weights": torch.full((50,), float(value)), "step": value, "best": (1.0, 2.0, 3)}


def steps(folder):
    return sorted(int(p.name[-9:]) for p in folder.iterdir() if p.name != "latest")


def same(a, b):
    """Whether two states are equal to the bit, types and dtypes included."""
    if isinstance(a, torch.Tensor):
        return (
            isinstance(b, torch.Tensor)
            and a.dtype == b.dtype
            and a.shape == b.shape
            and torch.equal(a.cpu().contiguous().view(-1), b.contiguous().view(-1))
        )
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def test_the_newest_comes_back_and_two_are_kept(tmp_path):
    for step in (1, 2, 10):
        save_checkpoint(tmp_path, step, state(step), {"a": step})
    loaded, skipped = load_checkpoint(tmp_path)
    assert skipped == [] and same(loaded, state(10))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoint-000000002",
        "checkpoint-000000010",
        "latest",
    ]
    assert (tmp_path / "latest").readlink().as_posix() == "checkpoint-000000010"
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-000000010"


@pytest.mark.parametrize("method", ["cure", "trades"])
def test_a_whole_run_comes_back_to_the_bit(tmp_path, method):
    from cure_fast.step.train_step import train_step

    run = tiny_run(method)
    for number in range(2):
        train_step(run, run.loader.batch(number))
    stored = run.state_dict()
    path = save_checkpoint(tmp_path, 2, stored, {"optim": {"lr": 0.5}})
    assert same(stored, load_checkpoint(tmp_path)[0])
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["format"] == 2 and manifest["step"] == 2 and not manifest["best"]
    assert manifest["config"] == {"optim": {"lr": 0.5}} and manifest["torch"] == torch.__version__
    from safetensors.torch import load_file

    assert "model/layer1.0.conv1.weight" in load_file(path / "weights.safetensors")


def test_networks_may_be_in_any_memory_layout_and_share_memory(tmp_path):
    conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    tied = conv.state_dict() | {"twin": conv.weight, "part": conv.weight[1:3, ::2]}
    given_state = {"model": tied, "networks": {"a/b": {"c": conv.bias}, "a": {}}, "empty": {}}
    save_checkpoint(tmp_path, 1, given_state, {})
    loaded = load_checkpoint(tmp_path)[0]
    assert same({**given_state, "model": dict(tied)}, loaded)
    other = nn.Conv2d(3, 4, 3)
    other.load_state_dict({k: loaded["model"][k] for k in ("weight", "bias")})
    assert torch.equal(other.weight, conv.weight)


TENSORS = st.builds(
    lambda dtype, shape: torch.arange(int(np.prod(shape))).reshape(shape).to(dtype),
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 3), max_size=3),
)
LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | TENSORS
)
NESTED = st.recursive(
    LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8
)


@settings(max_examples=40)
@given(
    networks=st.dictionaries(st.text(), st.dictionaries(st.text(), LEAVES), max_size=3),
    rest=st.dictionaries(st.text(), NESTED, max_size=3),
)
def test_any_plain_state_comes_back(tmp_path_factory, networks, rest):
    folder = tmp_path_factory.mktemp("states")
    paths = [f"{name}/{key}" for name, values in networks.items() for key in values]
    stored = {**rest, "networks": networks}
    assume(len(set(paths)) == len(paths))
    save_checkpoint(folder, 3, stored, {})
    assert same(stored, load_checkpoint(folder)[0])


@pytest.mark.parametrize(
    "value",
    [np.float64(1), np.zeros(2), {1, 2}, object(), torch.float32, {"a": [np.int64(3)]}],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("where", ["policies", "model"])
def test_a_state_that_could_not_be_read_back_is_refused_when_saved(tmp_path, value, where):
    save_checkpoint(tmp_path, 1, state(1), {})
    with pytest.raises(TypeError, match=f"{where}.*expected tensors and plain values"):
        save_checkpoint(tmp_path, 2, {where: {"x": value}}, {})
    assert steps(tmp_path) == [1] and same(load_checkpoint(tmp_path)[0], state(1))


def test_an_ordered_dict_is_plain(tmp_path):
    save_checkpoint(tmp_path, 1, {"policies": [OrderedDict(a=torch.ones(2))]}, {})
    assert torch.equal(load_checkpoint(tmp_path)[0]["policies"][0]["a"], torch.ones(2))


def test_the_best_is_kept_besides_the_newest_two(tmp_path):
    for step in range(1, 8):
        save_checkpoint(tmp_path, step, state(step), {}, best=step in (1, 3))
    assert steps(tmp_path) == [3, 6, 7]
    save_checkpoint(tmp_path, 8, state(8), {}, best=True)
    assert steps(tmp_path) == [7, 8]


def test_saving_the_best_step_again_keeps_it_best(tmp_path):
    save_checkpoint(tmp_path, 1, state(1), {"lr": 1}, best=True)
    save_checkpoint(tmp_path, 1, state(1), {"lr": 1})
    for step in (2, 3, 4):
        save_checkpoint(tmp_path, step, state(step), {"lr": 1})
    assert steps(tmp_path) == [1, 3, 4]


def test_the_best_of_another_configuration_is_not_the_best(tmp_path):
    save_checkpoint(tmp_path, 1, state(1), {"lr": 1}, best=True)
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, state(step), {"lr": 2})
    assert steps(tmp_path) == [2, 3]


def test_a_damaged_checkpoint_does_not_count_as_one_of_the_two(tmp_path):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, state(step), {})
    (tmp_path / "checkpoint-000000002/state.pt").unlink()
    save_checkpoint(tmp_path, 3, state(3), {})
    assert steps(tmp_path) == [1, 3]


def test_later_steps_are_left_alone_by_a_run_that_went_back(tmp_path):
    for step in (10, 20, 30):
        save_checkpoint(tmp_path, step, state(step), {})
    for step in (20, 30):
        (tmp_path / f"checkpoint-{step:09d}/state.pt").write_bytes(b"")
    save_checkpoint(tmp_path, 15, state(15), {})
    loaded, skipped = load_checkpoint(tmp_path)
    assert loaded["step"] == 15 and len(skipped) == 2
    save_checkpoint(tmp_path, 30, state(30), {})
    assert load_checkpoint(tmp_path)[0]["step"] == 30 and steps(tmp_path) == [15, 30]


def test_the_same_step_again_takes_the_place_of_the_older(tmp_path):
    save_checkpoint(tmp_path, 1, state(1), {})
    save_checkpoint(tmp_path, 1, state(1) | {"new": True}, {})
    assert load_checkpoint(tmp_path)[0]["new"] and steps(tmp_path) == [1]


def test_of_two_of_one_step_the_one_that_was_replaced_comes_second(tmp_path):
    path = save_checkpoint(tmp_path, 1, state(1), {})
    kept = tmp_path / "kept"
    shutil.copytree(path, kept)
    save_checkpoint(tmp_path, 1, state(1) | {"new": True}, {})
    # As a process leaves it that is killed before it deletes the replaced one.
    kept.rename(tmp_path / f"{path.name}~")
    assert load_checkpoint(tmp_path)[0]["new"]
    (path / "state.pt").unlink()
    loaded, skipped = load_checkpoint(tmp_path)
    assert same(loaded, state(1)) and len(skipped) == 1


@pytest.mark.parametrize(
    "manifest", ["", "[]", "{}", '{"format": 99}', "{", "null", '{"format": true, "step": 1}']
)
def test_a_bad_manifest_is_a_reason_to_skip(tmp_path, manifest):
    path = save_checkpoint(tmp_path, 1, state(1), {})
    (path / "manifest.json").write_text(manifest)
    assert check_checkpoint(path)
    with pytest.raises(InputError, match="no valid checkpoint"):
        load_checkpoint(tmp_path)
    assert newest_checkpoint(tmp_path) is None and has_checkpoints(tmp_path)


def test_a_checkpoint_under_another_step_is_refused(tmp_path):
    path = save_checkpoint(tmp_path, 1, state(1), {})
    path.rename(tmp_path / "checkpoint-000000009")
    assert "another step" in check_checkpoint(tmp_path / "checkpoint-000000009")


def test_what_is_no_finished_checkpoint_is_never_chosen(tmp_path):
    save_checkpoint(tmp_path, 1, state(1), {})
    (tmp_path / ".tmp-checkpoint-000000002").mkdir()
    (tmp_path / "checkpoint-000000003.bak").mkdir()
    (tmp_path / "notes.txt").touch()
    loaded, skipped = load_checkpoint(tmp_path)
    assert loaded["step"] == 1 and skipped == []
    save_checkpoint(tmp_path, 2, state(2), {})
    assert not list(tmp_path.glob(".tmp-*")) and (tmp_path / "notes.txt").exists()


def test_no_checkpoint_at_all_is_said(tmp_path):
    assert not has_checkpoints(tmp_path / "absent") and newest_checkpoint(tmp_path) is None
    with pytest.raises(InputError, match="none was written"):
        load_checkpoint(tmp_path)


def draw():
    return random.random(), random.gauss(0, 1), np.random.randn(3).tolist(), torch.rand(3).tolist()


@settings(max_examples=20)
@given(seed=st.integers(0, 2**63 - 1), drawn=st.integers(0, 3))
def test_random_numbers_go_on_where_they_were(seed, drawn):
    seed_all(seed)
    for _ in range(drawn):
        draw()
    np.random.randn()  # one of a pair, so that the other is part of the state
    stored = io.BytesIO()
    torch.save(random_state(), stored)
    stored.seek(0)
    expected = draw()
    seed_all(0)
    restore_random_state(torch.load(stored, weights_only=True))
    assert draw() == expected
    seed_all(seed)
    first = draw()
    seed_all(seed)
    restore_random_state(None)
    assert draw() == first


def test_json_replaces_the_old_file_whole(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    write_json(path, {"b": 2})
    assert json.loads(path.read_text()) == {"b": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
