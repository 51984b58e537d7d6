"""Trained networks from Python: loaded, attacked and measured; any other network is too."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from torch import Tensor, nn

from cure_fast.analysis.opening import opened
from cure_fast.api.answers import Results
from cure_fast.config import Norm
from cure_fast.evaluation.evaluate import adversarial_images
from cure_fast.evaluation.evaluate import evaluate as measure
from cure_fast.evaluation.given import as_images, as_labels, as_number, device_of
from cure_fast.evaluation.record import model_entry
from cure_fast.evaluation.trust import trust_warnings


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
    model, ball = opened(model, eps, norm)
    results = measure(
        model,
        as_images(images),
        as_labels(labels),
        num_classes=None,
        attacks=attacks,
        **ball,
        step_size=as_number("step_size", step_size),
        restarts=restarts,
        batch_size=batch_size,
        device=device_of(model),
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
    model, ball = opened(model, eps, norm)
    return adversarial_images(
        model,
        as_images(x),
        as_labels(y),
        attack=attack,
        **ball,
        step_size=as_number("step_size", step_size),
        batch_size=batch_size,
        device=device_of(model),
        seed=seed,
    )
