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
from cure_fast.config import Norm
from cure_fast.config.arguments import EvalArgs
from cure_fast.config.checks import check, shown
from cure_fast.config.values import convert
from cure_fast.errors import InputError
from cure_fast.evaluation.evaluate import adversarial_images
from cure_fast.evaluation.evaluate import evaluate as measure
from cure_fast.evaluation.record import main_settings, model_entry, stated_settings
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
    path = _path(source)
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
    norm: Norm | None = None,
    step_size: float | None = None,
    restarts: int = 1,
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
        attacks: ``natural``, ``fgsm``, ``pgdK``, ``pgdK-t`` (targeted), ``cwK`` (K steps), ``aa``
            (AutoAttack).
        eps: radius of the ball in pixel units of [0, 1]; None takes that of the run or file, and
            8/255 for a module.
        norm: ``linf`` or ``l2``, which needs ``eps``; None takes that of the run or file, and linf
            for a module.
        step_size: length of a step of ``pgdK`` and ``cwK``; None follows ``eps``.
        restarts: random starts of ``pgdK`` and ``cwK``; an image is right that is so after all.
        batch_size: images per batch; changes the time, not the result, but for ``aa``.
        aa_limit: images for ``aa`` alone, the first ones; None takes all.
        seed: of the attacks' random starts.

    Raises:
        InputError: a ``ValueError`` for images, labels or settings of another kind.
        DivergedError: for logits or gradients that are not finite.
    """
    if isinstance(attacks, str):
        attacks = attacks.split(",")
    model, ball = _opened(model, eps, norm)
    results = measure(
        model,
        _images(images),
        _labels(labels),
        num_classes=None,
        attacks=attacks,
        **ball,
        step_size=_number("step_size", step_size),
        restarts=restarts,
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
    model: nn.Module | str | os.PathLike[str],
    x: np.ndarray | Tensor,
    y: np.ndarray | Tensor | Sequence[int],
    *,
    attack: str = "pgd20",
    eps: float | None = None,
    norm: Norm | None = None,
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
        eps: as for :func:`evaluate`.
        norm: as for :func:`evaluate`.
        step_size: as for :func:`evaluate`.
        batch_size: images per batch; changes the time, not the result.
        seed: of the random starts.

    Returns:
        Images [N, C, H, W] in [0, 1] within ``eps`` of ``x``, on the device of the model.

    Raises:
        InputError: a ``ValueError`` for images, labels or settings of another kind.
    """
    model, ball = _opened(model, eps, norm)
    return adversarial_images(
        model,
        _images(x),
        _labels(y),
        attack=attack,
        **ball,
        step_size=_number("step_size", step_size),
        batch_size=batch_size,
        device=_device(model),
        seed=seed,
    )


def _opened(model: Any, eps: float | None, norm: Norm | None) -> tuple[nn.Module, dict[str, Any]]:
    """Return the network, where it computes, and the norm and radius to attack it with."""
    own: dict[str, Any] = {"norm": "linf", "eps": EPS}
    if not isinstance(model, nn.Module):
        own = _own_ball(_path(model))
        model = load(model).to(choose_device("auto"))
    if norm not in (None, own["norm"]):
        check(eps is not None, "norm", norm, f"a radius of its own with it, eps; {EPS} is linf's")
    given = {"norm": norm, "eps": _number("eps", eps)}
    return model, own | {name: value for name, value in given.items() if value is not None}


def _path(model: Any) -> Path:
    """Return where a run or a file of weights is."""
    if not isinstance(model, str | os.PathLike):
        raise InputError(f"model: expected a module, a run or a file of it, got {shown(model)}.")
    return Path(model)


def _number(name: str, value: Any) -> Any:
    """Return a number, which may be written as ``8/255``; all else as it is."""
    return convert(name, float, value) if isinstance(value, str) else value


def _own_ball(source: Path) -> dict[str, Any]:
    """Return norm and radius that a run is evaluated with, or that a file was trained with."""
    if source.is_dir():
        config = load_config(source)
    else:
        given = dict.fromkeys(vars(EvalArgs()))
        config = stated_settings(read_metadata(source), given, source)
    found = main_settings(config)
    return {name: found[name] for name in ("norm", "eps")}


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
