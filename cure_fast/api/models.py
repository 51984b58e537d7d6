"""Trained networks from Python: loaded, attacked and measured; any other network is too."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cure_fast.api.answers import Results
from cure_fast.cli.evaluate import stated_eps
from cure_fast.config.checks import shown
from cure_fast.errors import InputError
from cure_fast.evaluation.evaluate import adversarial_images
from cure_fast.evaluation.evaluate import evaluate as measure
from cure_fast.evaluation.record import main_settings, model_entry
from cure_fast.evaluation.trust import trust_warnings
from cure_fast.models.building import load_model
from cure_fast.models.weights import read_metadata
from cure_fast.runs.environment import choose_device
from cure_fast.runs.folder import load_config

# Radius for a network that does not say its own.
EPS = 8 / 255
TAKEN = "an array or tensor of floats in [0, 1], [N, C, H, W] or of uint8 [N, H, W, C], C 1 or 3"


def load(source: str | os.PathLike[str], *, model: str | None = None) -> nn.Module:
    """Return the network of a run, or in a file of weights, on the CPU and in evaluation mode.

    Args:
        source: folder of a run, whose result is loaded; or a file of weights that cure-fast wrote,
            such as ``runs/x/start.safetensors``.
        model: the function of your own that makes the network of a file, as ``--model`` names it:
            no file by itself decides which code is run.

    Raises:
        InputError: for what is neither, or weights that do not fit.
    """
    path = Path(source)
    if path.is_dir():
        model = load_config(path).model.model
        path /= "model.safetensors"
    return load_model(path, trusted=model).eval()


def evaluate(
    model: nn.Module | str | os.PathLike[str],
    images: np.ndarray | Tensor,
    labels: np.ndarray | Tensor | Sequence[int],
    *,
    attacks: Sequence[str] = ("natural", "pgd20"),
    eps: float | None = None,
    step_size: float | None = None,
    batch_size: int = 256,
    aa_limit: int | None = None,
    seed: int = 0,
) -> Results:
    """Return the accuracy of a model on these images under each attack.

    Args:
        model: any module from images [N, C, H, W] in [0, 1] to logits [N, K], which is left as it
            was and computes where it is; or a run or file that :func:`load` takes, which is put on
            the GPU where there is one.
        images: floats in [0, 1], [N, C, H, W], or uint8 [N, H, W, C]; C is 1 or 3.
        labels: whole numbers [N] from 0 to K - 1.
        attacks: ``natural``, ``fgsm``, ``pgdK``, ``cwK`` (K steps), ``aa`` (AutoAttack).
        eps: radius of the L-inf ball in pixel units of [0, 1]; None takes that of the run or file,
            and 8/255 for a module.
        step_size: length of a step of ``pgdK`` and ``cwK``; None follows ``eps``.
        batch_size: images per batch; changes the time, not the result, but for ``aa``.
        aa_limit: images for ``aa`` alone, the first ones; None takes all.
        seed: of the attacks' random starts.

    Raises:
        InputError: a ``ValueError`` for images, labels or settings of another kind.
        DivergedError: for logits or gradients that are not finite.
    """
    if isinstance(attacks, str):
        attacks = attacks.split(",")
    if eps is None:
        eps = EPS if isinstance(model, nn.Module) else _own_eps(Path(model))
    if not isinstance(model, nn.Module):
        model = load(model).to(choose_device("auto"))
    results = measure(
        model,
        _images(images),
        _labels(labels),
        num_classes=None,
        attacks=attacks,
        eps=eps,
        step_size=step_size,
        batch_size=batch_size,
        device=_device(model),
        seed=seed,
        aa_limit=aa_limit,
    )
    warnings = trust_warnings(results)
    record = model_entry(type(model).__name__, results) | {"warnings": warnings}
    accuracy = {name: result.accuracy for name, result in results.items()}
    return Results(accuracy, tuple(warnings), record)


def attack(
    model: nn.Module,
    x: np.ndarray | Tensor,
    y: np.ndarray | Tensor | Sequence[int],
    *,
    attack: str = "pgd20",
    eps: float = EPS,
    step_size: float | None = None,
    batch_size: int = 256,
    seed: int = 0,
) -> Tensor:
    """Return adversarial images: what :func:`evaluate` with the same settings measures.

    All images are attacked, also those that the model gets wrong as they are.

    Args:
        model: as for :func:`evaluate`; left as it was.
        x: images, as for :func:`evaluate`.
        y: labels, as for :func:`evaluate`.
        attack: ``fgsm``, ``pgdK`` or ``cwK``.
        eps: radius of the L-inf ball in pixel units of [0, 1].
        step_size: as for :func:`evaluate`.
        batch_size: images per batch; changes the time, not the result.
        seed: of the random starts.

    Returns:
        Images [N, C, H, W] in [0, 1] within ``eps`` of ``x``, on the device of the model.

    Raises:
        InputError: a ``ValueError`` for images, labels or settings of another kind.
    """
    return adversarial_images(
        model,
        _images(x),
        _labels(y),
        attack=attack,
        eps=eps,
        step_size=step_size,
        batch_size=batch_size,
        device=_device(model),
        seed=seed,
    )


def _own_eps(source: Path) -> float:
    """Return the radius that a run is evaluated with, or that a file was trained with."""
    if source.is_dir():
        return main_settings(load_config(source))["eps"]
    return stated_eps(source, read_metadata(source))


def _images(images: Any) -> Tensor:
    """Return images as evaluation takes them: on the CPU, [N, H, W, C], uint8 or floating."""
    if not isinstance(images, np.ndarray | Tensor):
        raise InputError(f"images: expected {TAKEN}, got {type(images).__name__}.")
    try:
        pixels = torch.as_tensor(images).detach().cpu()
    except TypeError as error:
        raise InputError(f"images: expected {TAKEN}, got {images.dtype}.") from error
    floating = pixels.is_floating_point()
    channels = pixels.shape[1 if floating else 3] if pixels.ndim == 4 else 0
    if channels not in (1, 3) or not (floating or pixels.dtype == torch.uint8):
        came = f"{str(pixels.dtype).removeprefix('torch.')} {list(pixels.shape)}"
        raise InputError(f"images: expected {TAKEN}, got {came}.")
    return pixels.permute(0, 2, 3, 1) if floating else pixels


def _labels(labels: Any) -> Tensor:
    """Return labels as int64 on the CPU."""
    try:
        numbers = torch.as_tensor(labels).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"labels: expected whole numbers [N], got {shown(labels)}.") from error
    kind = numbers.dtype
    if kind.is_floating_point or kind.is_complex or kind == torch.bool:
        raise InputError(f"labels: expected whole numbers [N], got {kind}.")
    return numbers.long()


def _device(model: nn.Module) -> torch.device:
    """Return where a model computes."""
    tensor = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device
