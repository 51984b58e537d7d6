"""What keeps an evaluation honest: the guarded model, its checks, and the signs of a wrong result.

Attacks fail silently: a model whose gradients are masked, whose logits are NaN or whose answers
change between calls looks robust to them. :class:`Guard` refuses what cannot be measured,
:func:`find_instability` and :func:`find_masking` look for what misleads an attack, and
:func:`trust_warnings` compares the results of several attacks (Carlini et al., On Evaluating
Adversarial Robustness, 2019; Athalye et al., Obfuscated Gradients, ICML 2018).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from string import ascii_lowercase
from typing import Any

import torch
from torch import Tensor, nn

from cure_fast.errors import CureFastError, DivergedError, InputError, StoppedError
from cure_fast.evaluation.attack_result import AttackResult
from cure_fast.losses import cross_entropy, margin

# What float32 rounding may add to eps: AutoAttack exceeds 8/255 by 2e-9.
EPS_TOLERANCE = 1e-6
# Largest difference between two passes over the same images that rounding explains, relative to
# the largest logit; measured 1e-7 to 1e-6 between batch sizes on convolutional networks.
REPEAT_TOLERANCE = 1e-4
# An input gradient has this share of exact zeros only where the model quantises or saturates.
ZERO_PIXELS = 0.5
ZERO_IMAGES_CE = 0.01
# Accuracy in percentage points that two attacks may be out of order by, for their random starts.
ORDER_NOISE = 0.5
# AutoAttack ends a few points below PGD; far more says that PGD was blind.
USUAL_GAP = 15.0


class Guard(nn.Module):
    """A classifier as attacks see it: computes in the weights' dtype, refuses what is not logits.

    Attributes:
        dtype: torch.float32, or torch.float64 where the weights have it.
        detached: True once logits came without a path back to the images; attacks then see a
            gradient of zero, as they would for a constant.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        num_classes: int | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.num_classes = num_classes
        self.stop = stop
        self.dtype = weight_dtype(model)
        self.detached = False
        self._natural: tuple[Tensor, Tensor] | None = None
        self._attack = ""

    def at(self, x: Tensor, indices: Tensor, attack: str = "") -> None:
        """Say what the next calls are about.

        Args:
            x: natural images [N, C, H, W].
            indices: their indices [N].
            attack: name of the attack on them, for messages; empty for none.
        """
        self._natural, self._attack = (x, indices), attack

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [N, K] in the dtype of ``x``, for images [N, C, H, W] in [0, 1].

        Raises:
            StoppedError: if ``stop()`` is true.
            InputError: if the output is not [N, K].
            DivergedError: if a logit is not finite, or, in the backward pass, the gradient in an
                image, naming the image.
        """
        if self.stop is not None and self.stop():
            raise StoppedError("evaluation stopped; the same command continues it.")
        seen = x.to(self.dtype)
        if torch.is_grad_enabled() and x.requires_grad:
            seen = seen.view_as(seen)
            seen.register_hook(partial(self._check_gradient, seen.detach()))
        logits = self.model(seen)
        classes = "K" if self.num_classes is None else self.num_classes
        if (
            not isinstance(logits, Tensor)
            or logits.ndim != 2
            or len(logits) != len(x)
            or (self.num_classes is not None and logits.shape[1] != self.num_classes)
        ):
            came = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise InputError(
                f"model: expected logits of shape ({len(x)}, {classes}), got {came}; "
                "evaluate a classifier trained on these classes."
            )
        if not bool(torch.isfinite(logits).all()):
            self._refuse(x.detach(), logits.detach())
        if torch.is_grad_enabled() and x.requires_grad and not logits.requires_grad:
            self.detached = True
            logits = logits + 0 * seen.flatten(1).sum(dim=1, keepdim=True)
        return logits.to(x.dtype)

    def _check_gradient(self, seen: Tensor, grad: Tensor) -> None:
        # pyautoattack steps along torch's sign, which is 0 for NaN: the image would seem robust.
        if not bool(torch.isfinite(grad).all()):
            row = int((~torch.isfinite(grad).flatten(1).all(dim=1)).nonzero()[0])
            raise DivergedError(
                f"{self._name(seen[row])}: the gradient in the image is not finite, so "
                f"{self._attack or 'an attack'} cannot move it and its robustness cannot be "
                "measured; look for a root or a logarithm of zero in the model."
            )

    def _refuse(self, x: Tensor, logits: Tensor) -> None:
        row = int((~torch.isfinite(logits).all(dim=1)).nonzero()[0])
        raise DivergedError(
            f"{self._name(x[row])}: the model's logits are not finite"
            f"{self._attack and ' under ' + self._attack} "
            f"({logits[row].tolist()[:4]} ...), so its accuracy means nothing; check the weights "
            "for NaN and infinity."
        )

    def _name(self, image: Tensor) -> str:
        """Return which natural image an iterate [C, H, W] comes from: the nearest in L-inf."""
        if self._natural is None:
            return "an image"
        natural, indices = self._natural
        nearest = (natural - image).abs().flatten(1).amax(dim=1).argmin()
        return f"image {int(indices[nearest.cpu()])}"


def weight_dtype(model: nn.Module) -> torch.dtype:
    """Return torch.float64 if a parameter has it, else torch.float32.

    Raises:
        InputError: for parameters or buffers of lower precision, which round gradients to zero.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.dtype not in (torch.float32, torch.float64):
            raise InputError(
                f"model: expected float32 weights, but {name} is {tensor.dtype}; "
                "call model.float() before the evaluation."
            )
    double = any(p.dtype == torch.float64 for p in model.parameters())
    return torch.float64 if double else torch.float32


def check_perturbation(x_adv: Tensor, x: Tensor, indices: Tensor, eps: float, attack: str) -> None:
    """Raise unless all images are finite, in [0, 1] and within eps of their own.

    Raises:
        DivergedError: for an image with values that are not finite, naming attack and image.
        CureFastError: for one outside of the ball or of [0, 1].
    """
    far = (x_adv - x).abs().flatten(1).amax(dim=1)
    low, high = x_adv.flatten(1).amin(dim=1), x_adv.flatten(1).amax(dim=1)
    # Written so that NaN is a violation.
    held = (far <= eps + EPS_TOLERANCE) & (low >= 0) & (high <= 1)
    broken = (~held).nonzero().flatten().cpu()
    if len(broken):
        row = int(broken[0])
        if not bool(torch.isfinite(x_adv[row]).all()):
            raise DivergedError(
                f"{attack}: the adversarial image {int(indices[row])} has values that are not "
                "finite, as its gradient is not, so its robustness cannot be measured; look for a "
                "root or a logarithm of zero in the model."
            )
        raise CureFastError(
            f"{attack}: the adversarial image {int(indices[row])} lies {float(far[row]):g} from "
            f"the natural one (eps {eps:g}), with values from {float(low[row]):g} to "
            f"{float(high[row]):g}; the attack is at fault, and its result would be worthless."
        )


@contextmanager
def full_precision(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Compute in the weights' own precision, without autocast and TF32; restore all after."""
    modules = [m for m in model.modules() if getattr(m, "compute_dtype", None) is not None]
    former: list[tuple[Any, str, Any]] = [(m, "compute_dtype", m.compute_dtype) for m in modules]
    new_values: list[Any] = [None] * len(former)
    # The last batch of an attack has another size each time: trying out algorithms for it would
    # take longer than what the best of them saves.
    benchmark = (torch.backends.cudnn, "benchmark", False)
    for owner, name, value in [*_rounding_switches(), benchmark]:
        former.append((owner, name, getattr(owner, name)))
        new_values.append(value)
    try:
        for (owner, name, _), value in zip(former, new_values, strict=True):
            setattr(owner, name, value)
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for owner, name, value in former:
            setattr(owner, name, value)


def _rounding_switches() -> list[tuple[Any, str, Any]]:
    """Return owner, attribute and exact value of each switch that lets float32 be rounded."""
    backends = torch.backends
    if not hasattr(backends.cuda.matmul, "fp32_precision"):  # before torch 2.9
        return [(backends.cuda.matmul, "allow_tf32", False), (backends.cudnn, "allow_tf32", False)]
    cudnn: Any = backends.cudnn
    mkldnn: Any = backends.mkldnn
    owners = (backends.cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn)
    return [(owner, "fp32_precision", "ieee") for owner in owners]


def find_instability(guard: Guard, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[str, ...]:
    """Return the signs that the answers themselves cannot be trusted, as sentences.

    Args:
        guard: the model, in evaluation mode.
        batches: pairs of images [N, C, H, W] in [0, 1] and labels [N] int64; a few are enough.
    """
    repeat = alone = 0.0
    for x, _ in batches:
        with torch.no_grad():
            logits = guard(x)
            scale = logits.abs().max().clamp(min=1e-12)
            repeat = max(repeat, float((guard(x) - logits).abs().max() / scale))
            half = (len(x) + 1) // 2
            alone = max(alone, float((guard(x[:half]) - logits[:half]).abs().max() / scale))
    if repeat > REPEAT_TOLERANCE:
        return (
            f"two passes over the same images differ by {repeat:.1%} of the largest logit: the "
            "model is random, and attacks on it need averaging over passes",
        )
    if alone > REPEAT_TOLERANCE:
        return (
            f"logits change by {alone:.1%} with the other images of the batch: accuracy depends "
            "on the batch size",
        )
    return ()


def find_masking(guard: Guard, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[str, ...]:
    """Return the signs that gradients do not lead attacks to adversarial images, as sentences.

    Args:
        guard: the model, in evaluation mode, its parameters without gradients.
        batches: pairs of images [N, C, H, W] in [0, 1] and labels [N] int64; a few are enough.
    """
    count = pixels = zero_images = zero_pixels = saturated = 0
    probabilities = True
    for x, y in batches:
        with torch.no_grad():
            logits = guard(x)
        sums = logits.sum(dim=1)
        probabilities &= bool((logits >= 0).all() and ((sums - 1).abs() < 1e-4).all())
        zeros = _zero_gradient(guard, x, y, margin)
        count, pixels = count + len(x), pixels + zeros.numel()
        zero_pixels += int(zeros.sum())
        zero_images += int(zeros.all(dim=1).sum())
        saturated += int(_zero_gradient(guard, x, y, cross_entropy).all(dim=1).sum())
    found = []
    if probabilities:
        found.append(
            "the outputs look like probabilities: attacks need logits, softmax flattens gradients"
        )
    if guard.detached:
        found.append(
            "the outputs have no gradient path to the image: PGD tries nothing but its start"
        )
    elif zero_images:
        found.append(
            f"the gradient of the margin is exactly zero for {zero_images} of {count} images: "
            "gradients are masked, and PGD finds nothing there"
        )
    elif zero_pixels > ZERO_PIXELS * pixels:
        found.append(
            f"{zero_pixels / pixels:.0%} of the input gradient is exactly zero: it may be masked"
        )
    if not zero_images and saturated > ZERO_IMAGES_CE * count:
        found.append(
            f"the gradient of the cross-entropy is exactly zero for {saturated} of {count} images, "
            "as the softmax is saturated: believe cw and aa, not fgsm and pgd"
        )
    return tuple(found)


def _zero_gradient(
    guard: Guard, x: Tensor, y: Tensor, loss: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Return where the gradient of the loss in the image is exactly zero, bool [N, C*H*W]."""
    leaf = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        (grad,) = torch.autograd.grad(loss(guard(leaf), y).sum(), leaf)
    return (grad == 0).flatten(1)


def trust_warnings(results: Mapping[str, AttackResult]) -> list[str]:
    """Return the known signs that these results are wrong, one sentence each; empty is good.

    Holds the warnings of every result, and what only shows between results of one model: an attack
    with a higher accuracy than the natural one or than a weaker attack, eps 0 that differs from
    natural, and AutoAttack far below PGD.

    Args:
        results: from attack name to result, all of one model, eps and set of images.
    """
    by_text: dict[str, list[str]] = {}
    for name, result in results.items():
        for text in result.warnings:
            by_text.setdefault(text, []).append(name)
    found = [f"{', '.join(names)}: {text}" for text, names in by_text.items()]
    natural = results.get("natural")
    for name, result in results.items():
        if natural is None or name == "natural" or natural.count != result.count:
            continue
        if result.correct > natural.correct:
            found.append(f"{name}: more images right ({result.correct}) than without an attack")
        elif result.settings.get("eps") == 0 and result.correct != natural.correct:
            found.append(f"{name}: eps is 0, yet the accuracy is not the natural one")
    for weak, strong in _chains(results):
        lead = results[strong].accuracy - results[weak].accuracy
        if lead > _noise(results[weak], results[strong]):
            found.append(
                f"{strong}: accuracy {results[strong].accuracy:.1f} % is above that of the weaker "
                f"{weak} ({results[weak].accuracy:.1f} %): the attack does not optimise well"
            )
    if "aa" in results:
        for name, result in results.items():
            gap = result.accuracy - results["aa"].accuracy
            if name.startswith(("pgd", "cw")) and gap > USUAL_GAP + _noise(result, results["aa"]):
                found.append(f"{name}: AutoAttack is {gap:.1f} points lower: do not believe {name}")
    return found


def _chains(results: Mapping[str, AttackResult]) -> list[tuple[str, str]]:
    """Return pairs of a weaker attack and the next stronger one among the results."""

    def steps(name: str) -> int:
        return int(name.lstrip(ascii_lowercase))

    end = ["aa"] if "aa" in results else []
    pgd = sorted((n for n in results if n.startswith("pgd")), key=steps)
    cw = sorted((n for n in results if n.startswith("cw")), key=steps)
    pairs = []
    for chain in (pgd + end, cw + end):
        pairs += pairwise(chain)
    if "fgsm" in results:
        long = [n for n in pgd if _crosses_ball(results[n])]
        pairs += [("fgsm", n) for n in (long + end)[:1]]
    return list(dict.fromkeys(pairs))


def _crosses_ball(result: AttackResult) -> bool:
    """Return whether every start can reach every corner; fewer steps may end behind fgsm."""
    settings = result.settings
    return settings["steps"] * settings["step_size"] >= 2 * settings["eps"]


def _noise(a: AttackResult, b: AttackResult) -> float:
    """Return the lead in percentage points that chance explains."""
    fewest = min(a.count, b.count)
    noise = max(ORDER_NOISE, 200 / fewest)
    if a.count == b.count:
        return noise
    share = (a.correct + b.correct) / (a.count + b.count)
    return noise + 300 * math.sqrt(share * (1 - share) / fewest)
