"""What is exported: the model of a run, or of a file of weights, and what is known of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cure_fast.config import Config
from cure_fast.errors import InputError
from cure_fast.evaluation.record import stored_record
from cure_fast.files import file_hash
from cure_fast.models import ImageClassifier, Normalize
from cure_fast.models.building import load_model
from cure_fast.models.weights import WEIGHTS_FILE, read_metadata
from cure_fast.runs.folder import load_config


@dataclass(frozen=True)
class Source:
    """A model to export, on the CPU in evaluation mode, and the file that it was read from.

    ``metadata`` is what the file says of itself, ``results`` the content of ``results.json``; a
    file by itself has no ``config`` and no results.
    """

    path: Path
    sha256: str
    model: ImageClassifier
    metadata: dict[str, str]
    config: Config | None = None
    results: dict[str, Any] | None = None


def read_source(target: Path) -> Source:
    """Return the best model of a run folder, or the model of a file that cure-fast wrote."""
    config = results = None
    path = target
    if target.is_dir():
        config = load_config(target)
        path = target / WEIGHTS_FILE
        if not path.exists():
            raise InputError(f"{target}: the run has no {WEIGHTS_FILE} yet; train it first.")
        results = stored_record(target / "results.json")
    metadata = read_metadata(path)
    missing = [key for key in ("model", "num_classes", "data") if not metadata.get(key)]
    if missing:
        raise InputError(
            f"{path}: expected a run folder or a .safetensors file that cure-fast wrote; this file "
            f"does not say its {', '.join(missing)}. Load it with `cure-fast train RECIPE "
            "--init-from FILE` and export that run."
        )
    trusted = None if config is None else config.model.model
    model = load_model(path, metadata, trusted=trusted).eval()
    return Source(path, file_hash(path), model, metadata, config, results)


def describe(source: Source) -> dict[str, str]:
    """Return what an exported file says of itself: enough to rebuild the model and to feed it."""
    model, known = source.model, source.metadata
    told = {
        **known,
        "width": str(model.width or ""),
        "input": "images [N, 3, H, W], float32 in [0, 1], RGB",
        "output": f"logits [N, {known['num_classes']}], float32",
        "normalization": "none",
        "source_sha256": source.sha256,
    }
    if isinstance(model.normalize, Normalize):
        told["normalization"] = "first layer of the network"
        for name, values in (("mean", model.normalize.mean), ("std", model.normalize.std)):
            # Nine digits tell every float32 apart.
            told[name] = ",".join(f"{value:.9g}" for value in values.flatten().tolist())
    classes = (source.results or {}).get("classes")
    if classes:
        told["classes"] = json.dumps(classes)
    return told
