"""What an evaluation keeps of a finished or begun attack, and for what it may be used again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from cure_fast.errors import InputError
from cure_fast.files import write_json


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write what :func:`read_state` reads, with a checksum of it all, whole or not at all."""
    write_json(path, {**state, "sha256": _state_hash(state)})


def read_state(path: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """Return what an earlier evaluation stored at ``path``, or nothing if it stored nothing.

    Raises:
        InputError: if it is not readable, is damaged, or is of another model, set of images,
            version or settings.
    """
    if not path.exists():
        return {}
    remedy = f"Delete {path} or evaluate into another folder to start over."
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        stored = dict(state["identity"])
        told = state.pop("sha256")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: not a stored evaluation ({error!r}). {remedy}") from error
    if told != _state_hash(state):
        raise InputError(
            f"{path}: its checksum is not that of its content, so it is damaged or was edited. "
            f"{remedy}"
        )
    here = json.loads(json.dumps(identity))
    different = [
        f"{name} ({_short(stored.get(name))} there, {_short(here.get(name))} here)"
        for name in {**stored, **here}
        if stored.get(name) != here.get(name)
    ]
    if different:
        raise InputError(f"{path}: stored with other {', '.join(different)}. {remedy}")
    return state


def _state_hash(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) < 64 else text[:8]
