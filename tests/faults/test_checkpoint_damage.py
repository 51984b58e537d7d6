"""Damaged and malicious checkpoints: refused before they are read, for the one before."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch

from cure_fast.cli.main import main
from cure_fast.config.values import digest
from cure_fast.errors import InputError
from cure_fast.runs.checkpoint import load_checkpoint, save_checkpoint
from small_state import is_state, state

RUN = Path(__file__).parent / "data" / "run-format-1"
FILES = ("manifest.json", "state.pt", "weights.safetensors")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("seed", range(20))
def test_one_flipped_bit_is_refused_for_the_checkpoint_before(tmp_path, name, seed):
    save_checkpoint(tmp_path, 1, state(1), {"lr": 0.1})
    file = save_checkpoint(tmp_path, 2, state(2), {"lr": 0.1}) / name
    damaged = bytearray(file.read_bytes())
    position = random.Random(seed).randrange(len(damaged) * 8)
    damaged[position // 8] ^= 1 << position % 8
    file.write_bytes(damaged)
    loaded, skipped = load_checkpoint(tmp_path)
    assert is_state(loaded, 1)
    assert len(skipped) == 1 and "checkpoint-000000002" in skipped[0] and "\n" not in skipped[0]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_refused_for_the_checkpoint_before(tmp_path, name, kept):
    save_checkpoint(tmp_path, 1, state(1), {})
    file = save_checkpoint(tmp_path, 2, state(2), {}) / name
    os.truncate(file, int(file.stat().st_size * kept))
    loaded, skipped = load_checkpoint(tmp_path)
    assert is_state(loaded, 1) and "checkpoint-000000002" in skipped[0]


@pytest.mark.parametrize("thing", ["absent", "folder", "pipe"])
@pytest.mark.parametrize("name", FILES)
def test_another_thing_in_the_place_of_a_file(tmp_path, name, thing):
    save_checkpoint(tmp_path, 1, state(1), {})
    file = save_checkpoint(tmp_path, 2, state(2), {}) / name
    file.unlink()
    if thing == "folder":
        file.mkdir()
    elif thing == "pipe":
        os.mkfifo(file)
    loaded, skipped = load_checkpoint(tmp_path)
    assert is_state(loaded, 1) and name in skipped[0]
    save_checkpoint(tmp_path, 3, state(3), {})
    assert not file.parent.exists()


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (os.system, (f"touch '{self.target}'",))


def forge(path, changes=None):
    """Make the manifest fit the files again, as someone can who knows how it is made."""
    manifest = json.loads((path / "manifest.json").read_text())
    for name, entry in manifest.get("files", {"state.pt": manifest}).items():
        stored = (path / name).read_bytes()
        entry |= {"bytes": len(stored), "sha256": hashlib.sha256(stored).hexdigest()}
    manifest |= changes or {}
    if manifest.pop("digest", None):
        manifest["digest"] = digest(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


@pytest.mark.parametrize("wrapped", [False, True], ids=["alone", "in a table"])
def test_a_pickled_payload_is_refused_and_does_not_run(tmp_path, wrapped):
    ran, folder = tmp_path / "ran", tmp_path / "checkpoints"
    path = save_checkpoint(folder, 1, state(1), {})
    payload = Payload(ran)
    torch.save(state(1) | {"random": payload} if wrapped else payload, path / "state.pt")
    forge(path)
    with pytest.raises(InputError, match=r"holds pickled objects .*nothing was run"):
        load_checkpoint(folder)
    assert not ran.exists()
    # The payload works where pickles are trusted.
    torch.load(path / "state.pt", weights_only=False)
    assert ran.exists()


@pytest.mark.parametrize("number", [1, 2])
def test_a_pickled_payload_in_a_run_folder_does_not_run_on_resume(tmp_path, capsys, number):
    run = Path(shutil.copytree(RUN, tmp_path / "run"))
    shutil.rmtree(run / "checkpoints/checkpoint-000000002")
    path = run / "checkpoints/checkpoint-000000003"
    if number == 2:
        shutil.rmtree(path)
        save_checkpoint(run / "checkpoints", 3, state(3), {})
    torch.save(Payload(tmp_path / "ran"), path / "state.pt")
    forge(path)
    assert main(["train", str(run), "--resume", "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert "pickled objects" in error and error.count("\n") == 1
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "files",
    [
        {"../../secret": {}, "state.pt": {}},
        {"/etc/passwd": {}},
        {"state.pt": {}},
        {},
        [],
        None,
        {"state.pt": 3, "weights.safetensors": None},
    ],
    ids=str,
)
def test_a_manifest_names_no_file_outside_its_folder(tmp_path, files):
    path = save_checkpoint(tmp_path, 1, state(1), {})
    forge(path, {"files": files})
    with pytest.raises(InputError, match=r"names other files|is not what was written"):
        load_checkpoint(tmp_path)


def test_weights_that_do_not_belong_to_the_state_are_refused(tmp_path):
    path = save_checkpoint(tmp_path, 1, state(1), {})
    torch.save({"model": {}}, path / "state.pt")
    forge(path)
    with pytest.raises(InputError, match="no place for"):
        load_checkpoint(tmp_path)
