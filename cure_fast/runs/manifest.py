"""Manifests of checkpoints: which files belong to one, of which size and content.

A manifest is written after the files that it names, and its own digest is part of it. Reading one
trusts nothing: whatever is wrong is a reason in one line, never another error.
"""

from __future__ import annotations

import json
import re
import stat
from pathlib import Path
from typing import Any

import torch

import cure_fast
from cure_fast.config.checks import shown
from cure_fast.config.values import digest
from cure_fast.files import file_hash, flush, replacing

FORMAT = 2
PREFIX = "checkpoint-"
# A folder under its name, and with ~ while another save of the same step takes its place.
NAME = re.compile(rf"{PREFIX}([0-9]{{9,18}})(~?)")
WEIGHTS, STATE, MANIFEST = "weights.safetensors", "state.pt", "manifest.json"


def write_manifest(folder: Path, step: int, config: dict[str, Any], *, best: bool) -> None:
    """Flush the files of a checkpoint to disk and write the manifest that names them."""
    files = {}
    for name in (WEIGHTS, STATE):
        path = folder / name
        flush(path)
        files[name] = {"bytes": path.stat().st_size, "sha256": file_hash(path)}
    manifest = {
        "format": FORMAT,
        "step": step,
        "best": best,
        "torch": torch.__version__,
        "cure_fast": cure_fast.__version__,
        "config": config,
        "config_digest": digest(config),
        "files": files,
    }
    with replacing(folder / MANIFEST) as temporary:
        temporary.write_text(_text(manifest | {"digest": digest(manifest)}), encoding="utf-8")


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of the checkpoint ``path``; format and content are not checked.

    Raises:
        ValueError: if it is none, saying in one line what is wrong.
        RecursionError: if it is nested too deeply.
        OSError: if it cannot be read.
    """
    file = path / MANIFEST
    # A pipe would block, a device never end.
    if not stat.S_ISREG(file.stat().st_mode):
        raise ValueError(f"{MANIFEST} is not a regular file")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{MANIFEST} is not valid JSON: {error}") from error
    if not isinstance(manifest, dict):
        raise ValueError(f"{MANIFEST} holds a {type(manifest).__name__}, expected a table")
    return manifest


def check_checkpoint(path: Path, *, hashes: bool = True) -> str:
    """Return what is wrong with the checkpoint ``path`` in one line, "" if nothing; never raises.

    With ``hashes`` the content of the files is compared too, not their sizes alone.
    """
    try:
        for name, written in _files_of(path).items():
            file = path / name
            status = file.stat()
            same = (
                isinstance(written, dict)
                and stat.S_ISREG(status.st_mode)
                and status.st_size == written.get("bytes")
                and (not hashes or file_hash(file) == written.get("sha256"))
            )
            if not same:
                return f"{name} is not what was written"
    except OSError as error:
        what = f"{Path(str(error.filename)).name}: " if error.filename else ""
        return f"{what}{error.strerror or type(error).__name__}"
    except (ValueError, RecursionError) as error:
        return str(error)
    return ""


def _text(manifest: dict[str, Any]) -> str:
    """Return the one text that a manifest is written as."""
    return json.dumps(manifest, indent=2) + "\n"


def _files_of(path: Path) -> dict[str, Any]:
    """Return size and hash by file name, as a manifest of any known format states them.

    Raises:
        ValueError: if the manifest is not as it was written, or of a format unknown here.
        OSError: if it cannot be read.
    """
    manifest = read_manifest(path)
    number, step = manifest.get("format"), manifest.get("step")
    if type(number) is not int or number < 1:
        raise ValueError(f"{MANIFEST} names no format of a checkpoint")
    if number > FORMAT:
        raise ValueError(
            f"format {shown(number)}, written by a newer cure-fast; "
            f"this one reads 1 to {FORMAT}: update it"
        )
    match = NAME.fullmatch(path.name)
    if match and (type(step) is not int or step != int(match[1])):
        raise ValueError(f"{MANIFEST} is of another step than the folder's name")
    if number == 1:
        return {STATE: manifest}
    text = (path / MANIFEST).read_text(encoding="utf-8")
    if text != _text(manifest) or manifest.pop("digest", None) != digest(manifest):
        raise ValueError(f"{MANIFEST} is not what was written")
    files = manifest.get("files")
    # No other names: a path in a forged manifest would lead out of the folder.
    if not isinstance(files, dict) or set(files) != {WEIGHTS, STATE}:
        raise ValueError(f"{MANIFEST} names other files than {WEIGHTS} and {STATE}")
    return files
