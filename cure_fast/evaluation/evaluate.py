"""Accuracy of a classifier on natural images and under attacks, so that it can be believed.

Every number is taken in evaluation mode and in the weights' own precision, on counted images, with
the model's state left exactly as it was. An image counts as robust if it is classified right both
as it is and as the attack left it, so only the naturally right images need to be attacked. Random
starts are drawn per image from (seed, kind of attack, index of the image): neither the batch size
nor the device decides which start an image gets. AutoAttack alone draws per batch, and its batch
size is recorded. See :mod:`cure_fast.evaluation.trust` for what is refused and what is warned of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cure_fast.classifier import attack_mode
from cure_fast.config import Norm
from cure_fast.config.attack_names import ATTACKS, AttackSpec, parse_attack, parse_single
from cure_fast.config.steps import STEP_SHARE
from cure_fast.errors import InputError
from cure_fast.evaluation.attack_result import AttackResult
from cure_fast.evaluation.autoattack import NORMS
from cure_fast.evaluation.measurement import Measurement, Round
from cure_fast.evaluation.trust import Guard, full_precision
from cure_fast.progress import Work


def evaluate(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    num_classes: int | None,
    attacks: Sequence[str],
    eps: float,
    step_size: float | None,
    batch_size: int,
    device: torch.device | str,
    seed: int,
    norm: Norm = "linf",
    step_share: float = STEP_SHARE,
    restarts: int = 1,
    aa_limit: int | None = None,
    state_dir: Path | None = None,
    model_name: str = "model",
    stop: Callable[[], bool] | None = None,
    on_result: Callable[[AttackResult], None] | None = None,
    on_images: Callable[[str, np.ndarray], None] | None = None,
    work: Callable[[AttackSpec], AbstractContextManager[Work]] | None = None,
) -> dict[str, AttackResult]:
    """Return the accuracy under each attack, by name and in the order asked for.

    Args:
        model: from images [N, C, H, W] in [0, 1] to logits [N, num_classes]; left as it is.
        images: uint8 [N, H, W, C], or floating in [0, 1] (stored adversarial images).
        labels: int64 [N] in [0, num_classes).
        num_classes: number of classes, at least 2; None takes the model's number of logits.
        attacks: names that :func:`parse_attack` takes.
        eps: radius of the ball in pixel units, in [0, 1] for L-inf.
        step_size: length of a step of pgdK and cwK in pixel units; None takes that of
            :func:`cure_fast.config.steps.evaluation_step`.
        batch_size: images per batch; decides only the result of aa. Halved where memory runs out.
        device: where to compute.
        seed: of all random starts, in [0, 2**63).
        norm: the ball's, ``linf`` or ``l2``.
        step_share: length of a step as a share of eps, in [0, 2], where ``step_size`` is None.
        restarts: random starts of pgdK, pgdK-t and cwK; an image is right that is so after all.
        aa_limit: images for aa, the first ones; None for all.
        state_dir: folder that keeps finished attacks (aa: batches) for a later call; None for none.
        model_name: what messages call the model.
        stop: asked before every pass through the model; true ends the evaluation.
        on_result: called with each result as soon as it is there.
        on_images: called before that with the name of each attack and its images, float32
            [N, H, W, C] in [0, 1]: those that broke the model, else the last that were tried (aa:
            the natural ones), and the natural ones where these are classified wrongly already.
        work: opens what is told of an attack's progress; None for nothing.

    Raises:
        InputError: for arguments out of range, or a state of other weights, images or settings.
        CureFastError: for values that are not finite, a changed model, a ball that was left.
        MemoryExhaustedError: if a batch of aa, or one image, does not fit.
        StoppedError: if ``stop()`` became true; what is finished is kept.
    """
    specs = {text: parse_attack(text) for text in attacks}
    check_data(images, labels)
    if num_classes is not None:
        _check_classes(labels, num_classes)
    _check_settings(eps, norm, step_size, step_share, batch_size, seed, aa_limit, specs)
    if restarts < 1:
        raise InputError(f"restarts: expected at least 1, got {restarts}.")
    task = Measurement(
        guard=Guard(model, num_classes=num_classes, stop=stop),
        images=images,
        labels=labels,
        device=torch.device(device),
        eps=eps,
        step_size=step_size,
        norm=norm,
        step_share=step_share,
        restarts=restarts,
        keep_images=on_images is not None,
        batch_size=batch_size,
        seed=seed,
        aa_images=len(images) if aa_limit is None else min(aa_limit, len(images)),
        state_dir=state_dir,
        name=model_name,
        **({} if work is None else {"work": work}),
    )
    results = {}
    with measuring(model, task.device):
        if num_classes is None:
            _ask_classes(task)
        for text, spec in specs.items():
            results[text] = task.result(spec)
            if on_images is not None and spec.family != "natural":
                on_images(text, task.kept.pop(spec.name))
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
    norm: Norm = "linf",
    stop: Callable[[], bool] | None = None,
) -> dict[str, np.ndarray]:
    """Return what PGD on the cross-entropy makes of a few images, as arrays for a picture.

    They are those that :func:`evaluate` with ``pgd<steps>`` sees at the same place of its set; the
    arguments are as there, with 1 to 1000 steps.

    Returns:
        ``adversarial`` float32 [N, H, W, C] in [0, 1], and the predicted classes int64 [N] as
        ``natural_prediction`` and ``adversarial_prediction``, with the network's probabilities of
        them float32 [N] as ``natural_confidence`` and ``adversarial_confidence``.
    """
    spec = parse_attack(f"pgd{steps}")
    check_data(images, labels)
    _check_settings(eps, norm, step_size, STEP_SHARE, 1, seed, None, {spec.name: spec})
    task = Measurement(
        guard=Guard(model, stop=stop),
        images=images,
        labels=labels,
        device=torch.device(device),
        eps=eps,
        step_size=step_size,
        batch_size=len(images),
        seed=seed,
        norm=norm,
    )
    found: list[tuple[Tensor, ...]] = []

    def attack(indices: Tensor) -> None:
        x, y = task.load(indices)
        task.guard.at(x, indices, spec.name)
        logits = task.guard(x)
        _check_classes(labels, logits.shape[1])
        x_adv = task.perturb(spec, x, y, indices, Round())
        after = task.guard(x_adv)
        classes = (each.argmax(1) for each in (logits, after))
        confidences = (each.float().softmax(1).amax(1) for each in (logits, after))
        found.append((x_adv.permute(0, 2, 3, 1).float(), *classes, *confidences))

    with measuring(model, task.device):
        task.each_batch(torch.arange(len(images)), attack)
        task.watch.check()
    arrays = [torch.cat(parts).cpu().contiguous().numpy() for parts in zip(*found, strict=True)]
    kinds = ("natural", "adversarial")
    of_both = (f"{kind}_{what}" for what in ("prediction", "confidence") for kind in kinds)
    return dict(zip(("adversarial", *of_both), arrays, strict=True))


def adversarial_images(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    attack: str,
    eps: float,
    step_size: float | None,
    batch_size: int,
    device: torch.device | str,
    seed: int,
    norm: Norm = "linf",
    step_share: float = STEP_SHARE,
    stop: Callable[[], bool] | None = None,
) -> Tensor:
    """Return what an attack makes of all the images, right or wrong: [N, C, H, W] on the device.

    They are those that :func:`evaluate` measures with the same arguments, which are as there, but
    for ``attack``: ``fgsm``, ``pgdK`` or ``cwK``, with one random start.
    """
    spec = parse_single(attack)
    check_data(images, labels)
    specs = {spec.name: spec}
    _check_settings(eps, norm, step_size, step_share, batch_size, seed, None, specs)
    task = Measurement(
        guard=Guard(model, stop=stop),
        images=images,
        labels=labels,
        device=torch.device(device),
        eps=eps,
        step_size=step_size,
        norm=norm,
        step_share=step_share,
        batch_size=batch_size,
        seed=seed,
    )
    found: list[Tensor] = []

    def perturb(indices: Tensor) -> None:
        x, y = task.load(indices)
        task.guard.at(x, indices, spec.name)
        found.append(task.perturb(spec, x, y, indices, Round()))

    with measuring(model, task.device):
        _ask_classes(task)
        task.each_batch(torch.arange(len(images)), perturb)
        task.watch.check()
    return torch.cat(found)


def _ask_classes(task: Measurement) -> None:
    """Take the number of classes from the logits of the first image."""
    x, _ = task.load(torch.arange(1))
    task.guard.num_classes = task.guard(x).shape[1]
    _check_classes(task.labels, task.guard.num_classes)


@contextmanager
def measuring(model: nn.Module, device: torch.device) -> Iterator[None]:
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
    norm: Norm,
    step_size: float | None,
    step_share: float,
    batch_size: int,
    seed: int,
    aa_limit: int | None,
    specs: Mapping[str, AttackSpec],
) -> None:
    """Raise :class:`InputError` for a setting out of range."""
    stepping = eps > 0 and any(spec.iterated for spec in specs.values())
    most, box = (1, "1]") if norm == "linf" else (math.inf, "infinity)")
    positive = step_size != 0 or not stepping
    steps_right = step_size is None or (0 <= step_size <= most and positive)
    for name, value, right, expected in (
        ("attacks", [], len(specs) > 0, f"at least one of {', '.join(ATTACKS)}"),
        ("norm", norm, norm in NORMS, f"one of {', '.join(NORMS)}"),
        ("eps", eps, 0 <= eps <= most, f"a number in [0, {box} in pixel units"),
        ("step_size", step_size, steps_right, f"a number in (0, {box} in pixel units"),
        ("step_share", step_share, 0 <= step_share <= 2, "a number in [0, 2]"),
        ("batch_size", batch_size, batch_size >= 1, "at least 1"),
        ("aa_limit", aa_limit, aa_limit is None or aa_limit >= 1, "at least 1"),
        ("seed", seed, 0 <= seed < 2**63, "a whole number in [0, 2**63)"),
    ):
        if not right:
            raise InputError(f"{name}: expected {expected}, got {value!r}.")


def check_data(images: Tensor, labels: Tensor) -> None:
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
