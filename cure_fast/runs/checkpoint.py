"""Checkpoints: one folder per saved step, whole or absent, checked by hash before it is read.

``checkpoint-<step>/`` holds ``weights.safetensors`` (the tensors of the model and of the further
networks), ``state.pt`` (everything else: tensors and plain values, read with
``weights_only=True``) and, written last, ``manifest.json`` with the size and SHA-256 of both, and a
digest of its own. The folder is written under a temporary name, flushed to disk and renamed;
``latest`` links to it. Format 1, which had everything in ``state.pt``, is still read.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import stat
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cure_fast
from cure_fast.config.checks import shown
from cure_fast.config.values import digest
from cure_fast.errors import InputError
from cure_fast.files import file_hash, flush, write_json

FORMAT = 2
PREFIX = "checkpoint-"
# A folder under its name, and with ~ while another save of the same step takes its place.
NAME = re.compile(rf"{PREFIX}([0-9]{{9,18}})(~?)")
WEIGHTS, STATE, MANIFEST = "weights.safetensors", "state.pt", "manifest.json"
TEMPORARY = ".tmp-"
LATEST = "latest"
# The newest and the one before it, in case the newest turns out damaged.
KEPT = 2
# Entries of the state whose tensors go into the file of weights.
NETWORKS = ("model", "networks")
# What states of format 1 lack, beside ``counted``; random numbers go on from where they are.
LACKING = {
    **dict.fromkeys(("random", "pending", "micro_batch_size", "micro_batch_asked")),
    **dict.fromkeys(("skipped", "skipped_in_row"), 0),
}
# What reading with weights_only=True gives back as it was.
PLAIN = (type(None), bool, int, float, str)


def save_checkpoint(
    folder: Path, step: int, state: dict[str, Any], config: dict[str, Any], *, best: bool = False
) -> Path:
    """Store ``state`` as the checkpoint of ``step`` finished steps and return its path.

    The newest two whole checkpoints stay, and the newest one saved as ``best``. Later steps than
    ``step``, which a run that went back to an older checkpoint leaves behind, are not touched.

    Args:
        folder: of the run's checkpoints, made when absent inside an existing folder.
        step: number of finished steps.
        state: tensors on any device and plain values, nested in dicts, lists and tuples.
        config: resolved configuration of JSON types, stored so that a resumed run can be compared.
        best: whether this is the best state so far; one that was saved as best before stays it.

    Raises:
        OSError: if the folder cannot be written to, or the disk is full. Older checkpoints are as
            they were then, and no partial one stays.
        TypeError: if the state holds something else.
    """
    if not folder.exists():
        # Not its parents: a run folder that was deleted must not come back as an empty shell.
        folder.mkdir()
        flush(folder.parent)
    _clear_leftovers(folder)
    final = folder / f"{PREFIX}{step:09d}"
    temporary = folder / f"{TEMPORARY}{final.name}"
    try:
        temporary.mkdir()
        _write_state(temporary, state)
        _write_manifest(temporary, step, config, best=best or _was_best(final, config))
        # An older one of the step stays until this one has its name.
        if os.path.lexists(final):
            final.rename(final.with_name(f"{final.name}~"))
        temporary.rename(final)
        flush(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    tidy_checkpoints(folder, step)
    return final


def tidy_checkpoints(folder: Path, step: int) -> None:
    """Finish a save, also one that was killed, where a run goes on from ``step``.

    Raises:
        OSError: if the folder cannot be read or written to.
    """
    _clear_leftovers(folder)
    _link_latest(folder / f"{PREFIX}{step:09d}")
    _prune(folder, step)


def has_checkpoints(folder: Path) -> bool:
    """Return whether a checkpoint was ever finished in ``folder``, valid or not.

    Raises:
        OSError: if the folder is there and cannot be read.
    """
    return bool(_checkpoints(folder))


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint that is valid, ``None`` if there is none to be read."""
    try:
        found = _checkpoints(folder)
    except OSError:
        return None
    return next((path for _, path in found if not check_checkpoint(path)), None)


def load_checkpoint(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the state of the newest valid checkpoint, and why newer ones were skipped.

    Returns:
        The state as it was saved, every tensor on the CPU, those of networks contiguous; and one
        line for each checkpoint that was skipped, newest first.

    Raises:
        InputError: if there is no valid checkpoint.
        OSError: if the folder is there and cannot be read.
    """
    skipped = []
    for _, path in _checkpoints(folder):
        problem = check_checkpoint(path)
        if not problem:
            try:
                return _read_state(path), skipped
            except MemoryError:
                raise
            except Exception as error:  # parsers of untrusted files: what they throw, they refused
                problem = _refusal(error)
        skipped.append(f"{path.name}: {problem}")
    reasons = "; ".join(skipped) or "none was written"
    raise InputError(
        f"no valid checkpoint in {folder}: {reasons}. "
        "The run's files of weights can be evaluated, and a new run with another --out can start "
        "from one of them with --init-from."
    )


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


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Return step and folder of the finished checkpoints, valid or not, newest first."""
    if not folder.exists():
        return []
    found = [(match, path) for path in folder.iterdir() if (match := NAME.fullmatch(path.name))]
    # Of two of one step, the one that was replaced comes second.
    found.sort(key=lambda item: (int(item[0][1]), not item[0][2]), reverse=True)
    return [(int(match[1]), path) for match, path in found]


def _write_state(folder: Path, state: dict[str, Any]) -> None:
    from safetensors.torch import save

    weights: dict[str, Tensor] = {}
    rest = {
        name: _stored(value, name, weights if name in NETWORKS else None)
        for name, value in state.items()
    }
    # From memory, because the writers of both libraries report a full disk by other errors than
    # OSError. One after the other, so that no more than one file is in memory.
    (folder / WEIGHTS).write_bytes(save(weights))
    weights.clear()
    content = io.BytesIO()
    torch.save(rest, content)
    (folder / STATE).write_bytes(content.getbuffer())


def _read_state(path: Path) -> dict[str, Any]:
    """Return the state in a checkpoint whose files are what was written."""
    from safetensors.torch import load

    state = torch.load(path / STATE, map_location="cpu", weights_only=True)
    if not isinstance(state, dict):
        raise ValueError(f"{STATE} holds a {type(state).__name__}, expected a table")
    if _read_manifest(path)["format"] == 1:
        # Every step of the epoch under way was counted then.
        return LACKING | {"counted": state.get("batch", 0)} | state
    # From bytes, not from a mapping of the file, which a later truncation turns into a crash.
    weights = load((path / WEIGHTS).read_bytes())
    whole = {
        name: _with_tensors(value, name, weights) if name in NETWORKS else value
        for name, value in state.items()
    }
    if weights:
        raise ValueError(f"{WEIGHTS} holds tensors that {STATE} has no place for")
    return whole


def _with_tensors(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Return ``value`` with the tensors where :func:`_stored` took them from."""
    if isinstance(value, dict):
        return {k: _with_tensors(v, f"{path}/{k}", tensors) for k, v in value.items()}
    return tensors.pop(path) if value is None and path in tensors else value


def _stored(value: Any, path: str, tensors: dict[str, Tensor] | None = None) -> Any:
    """Return ``value`` if reading it with ``weights_only=True`` will give it back.

    That is found out here, at the first save, and not when the run is resumed. The tensors in its
    tables are put into ``tensors``, where that is given, by their paths, and are None in the value:
    copied to the CPU, as safetensors takes contiguous ones that share no memory.

    Raises:
        TypeError: naming the part that would be refused.
    """
    if type(value) in (dict, OrderedDict):
        for name in value:
            _stored(name, f"a key in {path}")
        return {name: _stored(entry, f"{path}/{name}", tensors) for name, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_stored(entry, f"{path}/{at}") for at, entry in enumerate(value))
    if isinstance(value, Tensor) and tensors is not None:
        if path in tensors:
            raise TypeError(f"state of a checkpoint: two tensors have the path {path}")
        tensors[path] = value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        return None
    if not isinstance(value, Tensor) and type(value) not in PLAIN:
        raise TypeError(
            f"state of a checkpoint: {path} is a {type(value).__name__}, "
            "expected tensors and plain values"
        )
    return value


def _write_manifest(folder: Path, step: int, config: dict[str, Any], *, best: bool) -> None:
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
        "files": files,
    }
    write_json(folder / MANIFEST, manifest | {"digest": digest(manifest)})


def _was_best(path: Path, config: dict[str, Any]) -> bool:
    """Return whether the same step of the same configuration was saved as the best already."""
    if check_checkpoint(path, hashes=False):
        return False
    manifest = _read_manifest(path)
    return bool(manifest.get("best")) and manifest.get("config") == config


def _read_manifest(path: Path) -> dict[str, Any]:
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


def _files_of(path: Path) -> dict[str, Any]:
    """Return size and hash by file name, as a manifest of any known format states them.

    Raises:
        ValueError: if the manifest is not as it was written, or of a format unknown here.
        OSError: if it cannot be read.
    """
    manifest = _read_manifest(path)
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
    # Of all JSON that reads the same, the one text that is written.
    text, written = (path / MANIFEST).read_text(encoding="utf-8"), json.dumps(manifest, indent=2)
    if text != f"{written}\n" or manifest.pop("digest", None) != digest(manifest):
        raise ValueError(f"{MANIFEST} is not what was written")
    files = manifest.get("files")
    # No other names: a path in a forged manifest would lead out of the folder.
    if not isinstance(files, dict) or set(files) != {WEIGHTS, STATE}:
        raise ValueError(f"{MANIFEST} names other files than {WEIGHTS} and {STATE}")
    return files


def _clear_leftovers(folder: Path) -> None:
    """Delete what saves that were cut short have left, and give a replaced folder its name back."""
    for path in folder.glob(f"{TEMPORARY}*"):
        _delete(path)
    for path in folder.glob(f"{PREFIX}*~"):
        final = path.with_name(path.name[:-1])
        if os.path.lexists(final):
            if not check_checkpoint(final):
                _delete(path)
                continue
            # What took its place is damaged, and the replaced one may be all there is.
            _delete(final)
        path.rename(final)


def _link_latest(final: Path) -> None:
    """Point the link ``latest`` to the checkpoint: for people, nothing here reads it."""
    link = final.with_name(f"{TEMPORARY}{LATEST}")
    # Some file systems have no links; the checkpoint is complete without.
    with contextlib.suppress(OSError):
        link.symlink_to(final.name)
        link.replace(final.with_name(LATEST))


def _prune(folder: Path, step: int) -> None:
    """Delete the checkpoints up to ``step`` that are neither new nor best, or not whole."""
    past = [path for number, path in _checkpoints(folder) if number <= step]
    whole = [path for path in past if not check_checkpoint(path, hashes=False)]
    best = [path for path in whole if _read_manifest(path).get("best")]
    kept = {*whole[:KEPT], *best[:1]}
    for path in past:
        if path not in kept:
            _delete(path)


def _delete(path: Path) -> None:
    """Delete a file or folder if possible; half a folder is never left under its name."""
    if path.is_symlink() or not path.is_dir():
        with contextlib.suppress(OSError):
            path.unlink()
        return
    doomed = path
    if not path.name.startswith(TEMPORARY):
        doomed = path.with_name(f"{TEMPORARY}deleted-{path.name}")
        # What cannot be deleted now, the next save tries again.
        with contextlib.suppress(OSError):
            path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _refusal(error: Exception) -> str:
    """Return in one line why a reader refused a file."""
    text = str(error)
    if "weights_only" in text or "Weights only" in text:
        named = re.search(r"GLOBAL ([\w.]+)", text)
        what = f" ({named[1]})" if named else ""
        return f"{STATE} holds pickled objects{what}; it was refused and nothing was run"
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no reason given'}"
