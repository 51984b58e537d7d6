"""Reads the example images of a run, checked on the way in."""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cure_fast.errors import InputError

# Networks that examples are made against, in the order the page shows them.
AGAINST = ("start", "trained")


@dataclass(frozen=True)
class Examples:
    """Images [n, H, W, 3] float32 in [0, 1], labels [n], and what each model made of them.

    Attributes:
        natural: test images.
        labels: their classes.
        adversarial: by model (``start``, ``trained``), images made against that model.
        predictions: by (model, ``natural`` or ``adversarial``), predicted classes [n].
        confidences: the same for the probability in [0, 1] that the model gives that class; empty
            in files of earlier versions.
        attack: what made the images, as ``pgd20``; None in files of earlier versions.
    """

    natural: np.ndarray
    labels: np.ndarray
    adversarial: dict[str, np.ndarray]
    predictions: dict[tuple[str, str], np.ndarray]
    confidences: dict[tuple[str, str], np.ndarray]
    attack: str | None


def read_examples(path: Path) -> Examples | None:
    """Return the example images, or ``None`` where the file is not there.

    Raises:
        InputError: if the file is damaged, or arrays do not fit together.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = dict(archive)
    except FileNotFoundError:
        return None
    except (OSError, TypeError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(
            f"{path}: expected arrays of images, but reading failed: {error}."
        ) from error
    present = [model for model in AGAINST if f"{model}_adversarial" in arrays]
    guesses = {(m, k): f"{m}_{k}_prediction" for m in present for k in ("natural", "adversarial")}
    absent = [name for name in ("natural", "labels", *guesses.values()) if name not in arrays]
    if absent:
        raise InputError(f"{path}: expected an array {absent[0]}, found {', '.join(arrays)}.")
    natural, labels = arrays["natural"], arrays["labels"]
    for name in ("natural", *(f"{m}_adversarial" for m in present)):
        images = arrays[name]
        fits = images.ndim == 4 and images.shape == natural.shape and images.shape[3] == 3
        if not fits or not np.all((images >= 0) & (images <= 1)):
            raise InputError(
                f"{path}: expected {name} as images [n, H, W, 3] in [0, 1], "
                f"got shape {list(images.shape)}."
            )
    for name in ("labels", *guesses.values()):
        if arrays[name].shape != natural.shape[:1] or arrays[name].dtype.kind not in "iu":
            raise InputError(f"{path}: expected {name} as {len(natural)} whole numbers.")
    adversarial = {model: arrays[f"{model}_adversarial"] for model in present}
    predictions = {key: arrays[name] for key, name in guesses.items()}
    sure = {key: f"{key[0]}_{key[1]}_confidence" for key in guesses}
    confidences = {key: arrays[name] for key, name in sure.items() if name in arrays}
    for key, values in confidences.items():
        if values.shape != labels.shape or not np.all((values >= 0) & (values <= 1)):
            raise InputError(f"{path}: expected {sure[key]} as {len(labels)} shares in [0, 1].")
    attack = str(arrays["attack"]) if "attack" in arrays else None
    return Examples(natural, labels, adversarial, predictions, confidences, attack)
