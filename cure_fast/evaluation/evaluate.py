"""Accuracy of a classifier on natural images and under attacks, so that it can be believed.

Every number is taken in evaluation mode and in the weights' own precision, on counted images, with
the model's state left exactly as it was. An image counts as robust if it is classified right both
as it is and as the attack left it, so only the naturally right images need to be attacked. Random
starts are drawn per image from (seed, kind of attack, index of the image): neither the batch size
nor the device decides which start an image gets. AutoAttack alone draws per batch, and its batch
size is recorded. See :mod:`cure_fast.evaluation.trust` for what is refused and what is warned of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cure_fast.classifier import attack_mode
from cure_fast.config.attack_names import ATTACKS, AttackSpec, parse_attack
from cure_fast.errors import InputError
from cure_fast.evaluation.attack_result import AttackResult
from cure_fast.evaluation.measurement import Measurement
from cure_fast.evaluation.trust import Guard, full_precision
from cure_fast.progress import Work


def evaluate(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    attacks: Sequence[str],
    eps: float,
    step_size: float | None,
    batch_size: int,
    device: torch.device | str,
    seed: int,
    aa_limit: int | None = None,
    state_dir: Path | None = None,
    model_name: str = "model",
    stop: Callable[[], bool] | None = None,
    on_result: Callable[[AttackResult], None] | None = None,
    work: Callable[[AttackSpec], AbstractContextManager[Work]] | None = None,
) -> dict[str, AttackResult]:
    """Return the accuracy under each attack, by name and in the order asked for.

    Args:
        model: from images [N, C, H, W] in [0, 1] to logits [N, num_classes]; left as it is.
        images: uint8 [N, H, W, C], or floating in [0, 1] (stored adversarial images).
        labels: int64 [N] in [0, num_classes).
        num_classes: number of classes, at least 2.
        attacks: names that :func:`parse_attack` takes.
        eps: radius of the L-inf ball in pixel units, in [0, 1].
        step_size: length of a step of pgdK and cwK in pixel units; None takes eps / 10.
        batch_size: images per batch; decides only the result of aa. Halved where memory runs out.
        device: where to compute.
        seed: of all random starts, in [0, 2**63).
        aa_limit: images for aa, the first ones; None for all.
        state_dir: folder that keeps finished attacks (aa: batches) for a later call; None for none.
        model_name: what messages call the model.
        stop: asked before every pass through the model; true ends the evaluation.
        on_result: called with each result as soon as it is there.
        work: opens what is told of an attack's progress; None for nothing.

    Raises:
        InputError: for arguments out of range, or a state of other weights, images or settings.
        CureFastError: for values that are not finite, a changed model, a ball that was left.
        MemoryExhaustedError: if a batch of aa, or one image, does not fit.
        StoppedError: if ``stop()`` became true; what is finished is kept.
    """
    specs = {text: parse_attack(text) for text in attacks}
    _check_data(images, labels)
    _check_classes(labels, num_classes)
    task = Measurement(
        guard=Guard(model, num_classes=num_classes, stop=stop),
        images=images,
        labels=labels,
        device=torch.device(device),
        eps=eps,
        step_size=_check_settings(eps, step_size, batch_size, seed, aa_limit, specs),
        batch_size=batch_size,
        seed=seed,
        aa_images=len(images) if aa_limit is None else min(aa_limit, len(images)),
        state_dir=state_dir,
        name=model_name,
        **({} if work is None else {"work": work}),
    )
    results = {}
    with _measuring(model, task.device):
        for text, spec in specs.items():
            results[text] = task.result(spec)
            if on_result is not None:
                on_result(results[text])
    return results


def adversarial_examples(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    step_size: float,
    steps: int,
    device: torch.device | str,
    seed: int,
    stop: Callable[[], bool] | None = None,
) -> dict[str, np.ndarray]:
    """Return what PGD on the cross-entropy makes of a few images, as arrays for a picture.

    They are those that :func:`evaluate` with ``pgd<steps>`` sees at the same place of its set; the
    arguments are as there, with 1 to 1000 steps.

    Returns:
        ``adversarial`` float32 [N, H, W, C] in [0, 1], and the predicted classes int64 [N] as
        ``natural_prediction`` and ``adversarial_prediction``.
    """
    spec = parse_attack(f"pgd{steps}")
    _check_data(images, labels)
    _check_settings(eps, step_size, 1, seed, None, {spec.name: spec})
    task = Measurement(
        guard=Guard(model, stop=stop),
        images=images,
        labels=labels,
        device=torch.device(device),
        eps=eps,
        step_size=step_size,
        batch_size=len(images),
        seed=seed,
    )
    found: list[tuple[Tensor, Tensor, Tensor]] = []

    def attack(indices: Tensor) -> None:
        x, y = task.load(indices)
        task.guard.at(x, indices, spec.name)
        logits = task.guard(x)
        _check_classes(labels, logits.shape[1])
        x_adv = task.perturb(spec, x, y, indices)
        after = task.guard(x_adv)
        found.append((x_adv.permute(0, 2, 3, 1).float(), logits.argmax(1), after.argmax(1)))

    with _measuring(model, task.device):
        task.each_batch(torch.arange(len(images)), attack)
        task.watch.check()
    arrays = [torch.cat(parts).cpu().contiguous().numpy() for parts in zip(*found, strict=True)]
    names = ("adversarial", "natural_prediction", "adversarial_prediction")
    return dict(zip(names, arrays, strict=True))


@contextmanager
def _measuring(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Hold the model in the state that it is measured in, and restore all of it after."""
    for name, parameter in model.named_parameters():
        here = parameter.device
        if here.type != device.type or device.index not in (None, here.index):
            raise InputError(f"model: expected it on {device}, but {name} is on {here}.")
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        attack_mode(model, "eval"),
        full_precision(model, device),
    ):
        yield


def _check_settings(
    eps: float,
    step_size: float | None,
    batch_size: int,
    seed: int,
    aa_limit: int | None,
    specs: Mapping[str, AttackSpec],
) -> float:
    """Raise :class:`InputError` for a setting out of range; return the length of a step."""
    step_size = eps / 10 if step_size is None else step_size
    stepping = eps > 0 and any(spec.family in ("pgd", "cw") for spec in specs.values())
    steps_right = 0 <= step_size <= 1 and not (stepping and step_size == 0)
    for name, value, right, expected in (
        ("attacks", [], len(specs) > 0, f"at least one of {', '.join(ATTACKS)}"),
        ("eps", eps, 0 <= eps <= 1, "a number in [0, 1] in pixel units"),
        ("step_size", step_size, steps_right, "a number in (0, 1] in pixel units"),
        ("batch_size", batch_size, batch_size >= 1, "at least 1"),
        ("aa_limit", aa_limit, aa_limit is None or aa_limit >= 1, "at least 1"),
        ("seed", seed, 0 <= seed < 2**63, "a whole number in [0, 2**63)"),
    ):
        if not right:
            raise InputError(f"{name}: expected {expected}, got {value!r}.")
    return step_size


def _check_data(images: Tensor, labels: Tensor) -> None:
    """Raise :class:`InputError` for other types or shapes, or an image outside [0, 1]."""
    known = images.dtype == torch.uint8 or images.is_floating_point()
    if images.ndim != 4 or not len(images) or not known:
        raise InputError(
            "images: expected uint8 or floating [N, H, W, C] with at least one image, "
            f"got {images.dtype} {tuple(images.shape)}."
        )
    if images.is_floating_point():
        # Written so that NaN is outside.
        inside = ((images >= 0) & (images <= 1)).flatten(1).all(dim=1)
        outside = (~inside).nonzero().flatten()
        if len(outside):
            low, high = images[outside[0]].aminmax()
            raise InputError(
                f"image {int(outside[0])}: expected values in [0, 1], "
                f"got {float(low):g} to {float(high):g}; divide by 255 or clip."
            )
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        raise InputError(
            f"labels: expected int64 [{len(images)}], one per image, "
            f"got {labels.dtype} {tuple(labels.shape)}."
        )


def _check_classes(labels: Tensor, num_classes: int) -> None:
    if num_classes < 2:
        raise InputError(f"num_classes: expected at least 2, got {num_classes}.")
    wrong = ((labels < 0) | (labels >= num_classes)).nonzero().flatten()
    if len(wrong):
        raise InputError(
            f"label of image {int(wrong[0])}: expected a class in [0, {num_classes - 1}], "
            f"got {int(labels[wrong[0]])}."
        )
