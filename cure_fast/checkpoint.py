"""Checkpoints: one folder per saved step, whole or absent, checked by hash before it is read.

``checkpoint-<step>/`` holds ``state.pt`` (tensors and plain values, read with
``weights_only=True``) and, written last, ``manifest.json`` with the size and SHA-256 of
``state.pt``. The folder is written under a temporary name, flushed to disk and renamed.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from cure_fast.errors import InputError
from cure_fast.files import file_hash, flush, write_json

FORMAT = 1
PREFIX = "checkpoint-"
# The newest and the one before it, in case the newest turns out damaged.
KEPT = 2


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], config: dict[str, Any]) -> Path:
    """Store ``state`` as the checkpoint of ``step``, keep the newest two, and return its path.

    Args:
        folder: folder that holds the run's checkpoints; made when absent.
        step: number of finished steps.
        state: tensors and plain values.
        config: resolved configuration, stored so that a resumed run can be compared with it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"{PREFIX}{step:09d}"
    temporary = folder / f".tmp-{final.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    data = temporary / "state.pt"
    torch.save(state, data)
    flush(data)
    manifest = {
        "format": FORMAT,
        "step": step,
        "torch": torch.__version__,
        "bytes": data.stat().st_size,
        "sha256": file_hash(data),
        "config": config,
    }
    write_json(temporary / "manifest.json", manifest)
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    flush(folder)
    for old in sorted(folder.glob(f"{PREFIX}*"))[:-KEPT]:
        shutil.rmtree(old)
    return final


def has_checkpoints(folder: Path) -> bool:
    """Return whether a checkpoint was ever finished in ``folder``, valid or not."""
    return any(folder.glob(f"{PREFIX}*"))


def load_checkpoint(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the state of the newest valid checkpoint, and why newer ones were skipped.

    Raises:
        InputError: if there is no valid checkpoint.
    """
    skipped = []
    for path in sorted(folder.glob(f"{PREFIX}*"), reverse=True):
        problem = check_checkpoint(path)
        if problem:
            skipped.append(f"{path.name}: {problem}")
            continue
        state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
        return state, skipped
    reasons = "; ".join(skipped) or "none was written"
    raise InputError(
        f"no valid checkpoint in {folder}: {reasons}. "
        "Start anew with another --out, or delete the folder."
    )


def check_checkpoint(path: Path) -> str:
    """Return what is wrong with the checkpoint, "" if nothing."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        data = path / "state.pt"
        if manifest["format"] != FORMAT:
            return f"format {manifest['format']}, this version reads {FORMAT}"
        if data.stat().st_size != manifest["bytes"] or file_hash(data) != manifest["sha256"]:
            return "state.pt is not what was written"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""
