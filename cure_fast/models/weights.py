"""Weights in files: read without ever running code from them, load strictly, write atomically."""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
import stat
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from cure_fast.errors import InputError
from cure_fast.files import replacing
from cure_fast.models import ImageClassifier

LOG = logging.getLogger(__name__)

# Name of the weights inside a run folder.
WEIGHTS_FILE = "model.safetensors"
# Key of the metadata in a safetensors file.
METADATA_KEY = "cure-fast"
# Where training codes keep the state dict inside a checkpoint, most telling name first.
WRAPPER_KEYS = ("state_dict", "model_state_dict", "model", "net")
# Put before every key by DataParallel, by wrappers that normalise, and by torch.compile.
PREFIXES = ("module.", "model.", "_orig_mod.")
# First bytes of a pickle by itself, protocols 2 to 5.
PICKLE_STARTS = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
# Keys that an error message lists of each kind.
LISTED_KEYS = 4


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the state dict in a file, on the CPU, with the prefixes of wrappers removed.

    Args:
        path: a ``.safetensors`` file; any other file is read as one of ``torch.save`` (.pt, .pth,
            .tar), holding a state dict alone or under ``state_dict``, ``model_state_dict``,
            ``model`` or ``net``; or a run folder, which stands for its ``model.safetensors``.

    Returns:
        Dense tensors by name, in the file's order and dtypes. Names lose any leading ``module.``,
        ``model.`` and ``_orig_mod.``.

    Raises:
        InputError: if the file is absent, cut short, something else than weights (a web page, a
            Git LFS pointer), or holds pickled objects, which are never executed.
    """
    file = _find(path)
    content = found = _read(file)
    if isinstance(content, Mapping) and not all(isinstance(v, Tensor) for v in content.values()):
        wrapped = [content[key] for key in WRAPPER_KEYS if isinstance(content.get(key), Mapping)]
        found = wrapped[0] if wrapped else content
    if not isinstance(found, Mapping) or not found:
        raise InputError(
            f"{file}: expected a state dict (tensors by name), got {type(found).__name__}"
            f"{' without entries' if isinstance(found, Mapping) else ''}. "
            "Save model.state_dict() to it."
        )
    weights: dict[str, Tensor] = {}
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise InputError(
                f"{file}: expected tensors by name, alone or under one of "
                f"{', '.join(WRAPPER_KEYS)}; {name!r} is a {type(tensor).__name__}. "
                "Save model.state_dict() to it."
            )
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise InputError(
                f"{file}: {name} is not a dense tensor with values. Save a plain floating-point "
                "model."
            )
        while name.startswith(PREFIXES):
            name = name.split(".", 1)[1]
        if name in weights:
            raise InputError(
                f"{file}: holds two sets of weights ({name} appears twice once the prefixes "
                f"{', '.join(PREFIXES)} are removed). Save one state dict to it."
            )
        weights[name] = tensor.detach()
    return weights


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Return what :func:`save_weights` stored beside the weights; empty where nothing was stored.

    Raises:
        InputError: if it is absent, no complete safetensors file, or what is stored is damaged.
    """
    from safetensors import SafetensorError, safe_open

    file = _find(path)
    if file.suffix != ".safetensors":
        return {}
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            stored = dict(opened.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise InputError(_damaged(file, "safetensors", str(error))) from error
    if METADATA_KEY not in stored:
        return stored
    try:
        described = json.loads(stored[METADATA_KEY])
    except ValueError as error:
        raise InputError(_damaged(file, "safetensors", f"metadata: {error}")) from error
    if not isinstance(described, dict) or not all(isinstance(v, str) for v in described.values()):
        raise InputError(_damaged(file, "safetensors", "metadata: expected strings by name"))
    return described


def resized_to(path: Path, metadata: Mapping[str, str]) -> int | None:
    """Return the size that images of a file's network were brought to, None if they were not."""
    text = metadata.get("resized", "")
    if text and not (text.isdecimal() and 1 <= int(text[:9]) <= 4096):
        raise InputError(f"{path}: expected resized from 1 to 4096, the file says {text!r}.")
    return int(text) if text else None


def save_weights(
    source: nn.Module | Mapping[str, Tensor],
    path: str | os.PathLike[str],
    metadata: Mapping[str, str],
) -> None:
    """Write a model's state dict as safetensors; the file is complete or not there at all.

    Tensors, on any device, are stored as contiguous copies in their own dtype. Equal tensors and
    equal metadata make equal bytes: safetensors writes several metadata keys in an order that
    changes from call to call, so all of it is one JSON string under one key.

    Raises:
        OSError: if the folder cannot be written to, or the disk is full; no partial file stays.
    """
    from safetensors.torch import save

    state = source.state_dict() if isinstance(source, nn.Module) else source
    copies = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in state.items()
    }
    described = json.dumps(dict(metadata), sort_keys=True)
    with replacing(Path(path)) as temporary:
        temporary.write_bytes(save(copies, metadata={METADATA_KEY: described}))


def load_into(model: ImageClassifier, weights: Mapping[str, Tensor], *, source: str) -> None:
    """Copy ``weights`` into the model: every tensor must be there, fit and be finite.

    Modules that published files carry without ever using them
    (:attr:`ImageClassifier.unused_modules`) are left out, which is logged. The model keeps its
    device, dtype and memory layout, and is unchanged when an error is raised. Messages call the
    weights ``source``.

    Raises:
        InputError: for missing, unexpected, mis-shaped, mistyped or non-finite tensors.
    """
    unused = {name for name in weights if name.split(".", 1)[0] in model.unused_modules}
    if unused:
        modules = ", ".join(sorted({name.split(".", 1)[0] for name in unused}))
        LOG.warning(
            "%s: left out %d tensors of %s, which no forward pass uses.",
            *(source, len(unused), modules),
        )
    weights = {name: tensor for name, tensor in weights.items() if name not in unused}
    own = model.state_dict()
    differing = {
        "Missing from them": [name for name in own if name not in weights],
        "Not in the model": [name for name in weights if name not in own],
    }
    told = "".join(f" {what}: {_first(names)}." for what, names in differing.items() if names)
    if told:
        raise InputError(
            f"{source}: the weights are of another architecture than the model.{told} "
            "Choose the --model that they were trained with."
        )
    wrong = [
        f"{name} {list(weights[name].shape)} instead of {list(own[name].shape)}"
        for name in own
        if own[name].shape != weights[name].shape
    ]
    if wrong:
        raise InputError(
            f"{source}: tensors of another shape than the model's: {_first(wrong)}."
            + "".join(_reasons(model, own, weights))
        )
    for name, tensor in weights.items():
        expected = own[name].dtype
        if tensor.is_floating_point() != expected.is_floating_point or tensor.is_complex():
            raise InputError(
                f"{source}: {name} has dtype {tensor.dtype}, expected {expected}. "
                "Save the weights as plain floating-point tensors."
            )
        # In the model's dtype, as a finite float64 can be infinite in float32.
        if not torch.isfinite(tensor.to(expected)).all():
            raise InputError(
                f"{source}: {name} holds values that are not finite numbers. The training that "
                "wrote it diverged, or the file is damaged; take an earlier checkpoint."
            )
    model.load_state_dict(weights)


def _reasons(
    model: ImageClassifier, own: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> Iterator[str]:
    """Yield a sentence for each setting by which weights with the right names can differ."""
    names = model.classifier_name, *model.stem_names[:1]
    if len(names) < 2 or not all(f"{name}.weight" in own for name in names):
        return
    classifier, stem = (f"{name}.weight" for name in names)
    # A tensor of the wrong rank fits no setting.
    if own[classifier].ndim == weights[classifier].ndim:
        classes, features = weights[classifier].shape
        own_classes, own_features = own[classifier].shape
        if classes != own_classes:
            yield (
                f" They tell {classes} classes apart, the model {own_classes}: "
                "choose the data set that they were trained on."
            )
        width, rest = divmod(model.width * features, own_features)
        if rest == 0 and width != model.width:
            yield f" Their width is {width}, the model's {model.width}: pass --width {width}."
    if own[stem].ndim == weights[stem].ndim and own[stem].shape[2:] != weights[stem].shape[2:]:
        size = weights[stem].shape[2]
        yield f" Their first convolution is {size}x{size}: choose the other --stem."


def _first(names: list[str]) -> str:
    """Return the first few names joined, and how many more there are."""
    more = len(names) - LISTED_KEYS
    return ", ".join(names[:LISTED_KEYS]) + (f" and {more} more" if more > 0 else "")


def _find(path: str | os.PathLike[str]) -> Path:
    """Return the file that ``path`` names; refuse what cannot be read, and failed downloads."""
    file = Path(path)
    try:
        file = file.expanduser()
        mode = file.stat().st_mode
    except (OSError, RuntimeError, ValueError) as error:  # absent, no such home, a null character
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{file}: cannot be opened ({reason}). Give the path of a weights file or a run folder."
        ) from error
    if stat.S_ISDIR(mode):
        if not (file / WEIGHTS_FILE).is_file():
            raise InputError(
                f"{file}: this folder has no {WEIGHTS_FILE}. Give a weights file, or the folder "
                "of a run that has finished."
            )
        file /= WEIGHTS_FILE
    # A pipe or device could block forever.
    elif not stat.S_ISREG(mode):
        raise InputError(f"{file}: not a regular file. Give a weights file or a run folder.")
    try:
        with file.open("rb") as stream:
            start = stream.read(512)
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}).") from error
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for seen, what in (
        (not start, "the file is empty. Copy or download it again."),
        (
            text.startswith(b"version https://git-lfs"),
            "a Git LFS pointer, not the weights themselves. Run `git lfs pull` in its repository.",
        ),
        (
            text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")),
            "a web page, not weights. The download reached a log-in, consent or error page; "
            "download the file itself again.",
        ),
    ):
        if seen:
            raise InputError(f"{file}: {what}")
    return file


def _damaged(file: Path, kind: str, detail: str = "") -> str:
    """Return the message for a file that its reader refuses."""
    return (
        f"{file}: not a complete {kind} file{f' ({detail})' if detail else ''}. It was cut short "
        "or is something else: copy or download it again. Expected .safetensors, or .pt, .pth or "
        ".tar of torch.save."
    )


def _read(file: Path) -> object:
    """Return what the file holds, if that is tensors and plain values alone."""
    from safetensors.torch import load

    safetensors = file.suffix == ".safetensors"
    try:
        if safetensors:
            # From bytes, not from a mapping of the file, which a later truncation makes a crash.
            return load(file.read_bytes())
        with warnings.catch_warnings():
            # Of unusual pickles, which are refused below in words of ours.
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the parser of an untrusted file: whatever it throws, it refused
        with file.open("rb") as stream:
            start = stream.read(2)
        # A zip archive that opened, or a bare pickle. Other bytes fail in the unpickler as well.
        if isinstance(error, pickle.UnpicklingError) and start in (b"PK", *PICKLE_STARTS):
            named = re.search(r"GLOBAL ([\w.]+)", str(error))
            raise InputError(
                f"{file}: holds pickled Python objects{f' ({named[1]})' if named else ''}, not "
                "tensors and plain values alone. Loading them could run any code, so they were "
                "refused and nothing was run. Where you trust the file, open it in the code that "
                "wrote it and save model.state_dict() as safetensors or with torch.save."
            ) from error
        # Only these carry a sentence for people.
        told = safetensors or isinstance(error, RuntimeError)
        detail = str(error).split("\n")[0].rstrip(".") if told else ""
        kind = "safetensors" if safetensors else "torch.save"
        raise InputError(_damaged(file, kind, detail)) from error
