"""Checkpoints: whole or absent, checked before use, older ones dropped."""

from __future__ import annotations

import json

import pytest
import torch

from cure_fast.checkpoint import check_checkpoint, load_checkpoint, save_checkpoint
from cure_fast.errors import InputError
from cure_fast.files import write_json


def state(value):
    return {"weights": torch.full((50,), float(value)), "step": value, "best": (1.0, 2.0, 3)}


def test_the_newest_comes_back_and_two_are_kept(tmp_path):
    for step in (1, 2, 10):
        save_checkpoint(tmp_path, step, state(step), {"a": step})
    loaded, skipped = load_checkpoint(tmp_path)
    assert loaded["step"] == 10 and skipped == []
    assert torch.equal(loaded["weights"], torch.full((50,), 10.0))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoint-000000002",
        "checkpoint-000000010",
    ]


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.999])
def test_a_truncated_checkpoint_is_skipped_for_the_one_before(tmp_path, keep):
    save_checkpoint(tmp_path, 1, state(1), {})
    newest = save_checkpoint(tmp_path, 2, state(2), {}) / "state.pt"
    content = newest.read_bytes()
    newest.write_bytes(content[: int(len(content) * keep)])
    loaded, skipped = load_checkpoint(tmp_path)
    assert loaded["step"] == 1 and "checkpoint-000000002" in skipped[0]


def test_one_flipped_bit_is_noticed(tmp_path):
    path = save_checkpoint(tmp_path, 1, state(1), {})
    data = bytearray((path / "state.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (path / "state.pt").write_bytes(data)
    assert "not what was written" in check_checkpoint(path)
    with pytest.raises(InputError, match="no valid checkpoint"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("manifest", ["", "[]", "{}", '{"format": 99}', "{"])
def test_a_bad_manifest_is_a_reason_to_skip(tmp_path, manifest):
    path = save_checkpoint(tmp_path, 1, state(1), {})
    (path / "manifest.json").write_text(manifest)
    assert check_checkpoint(path)


def test_an_unfinished_folder_is_never_chosen(tmp_path):
    save_checkpoint(tmp_path, 1, state(1), {})
    (tmp_path / ".tmp-checkpoint-000000002").mkdir()
    assert load_checkpoint(tmp_path)[0]["step"] == 1


def test_code_in_a_pickle_is_not_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    path = save_checkpoint(tmp_path, 1, state(1), {})
    torch.save(Payload(), path / "state.pt")
    manifest = json.loads((path / "manifest.json").read_text())
    data = (path / "state.pt").read_bytes()
    import hashlib

    manifest |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        load_checkpoint(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_json_replaces_the_old_file_whole(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    write_json(path, {"b": 2})
    assert json.loads(path.read_text()) == {"b": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
