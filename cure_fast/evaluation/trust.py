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
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from cure_fast.config import Norm
from cure_fast.config.attack_names import attack_name, parse_attack
from cure_fast.errors import CureFastError, DivergedError, InputError, StoppedError
from cure_fast.evaluation.attack_result import AttackResult
from cure_fast.losses import cross_entropy, margin

# What float32 rounding may add to eps, or to each 1 of it: AutoAttack exceeds 8/255 by 2e-9.
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

    Where logits come without a path back to the images, it is ``detached`` from then on, and
    attacks see a gradient of zero, as they would for a constant.
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
        """Say for messages which natural images [N, C, H, W] the next calls are about."""
        self._natural, self._attack = (x, indices), attack

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [N, K] in the dtype of ``x``, for images [N, C, H, W] in [0, 1].

        Refuses, naming the image, logits that are not finite and, in the backward pass, gradients.
        """
        if self.stop is not None and self.stop():
            raise StoppedError("stopped by a signal")
        seen = x.to(self.dtype)
        if torch.is_grad_enabled() and x.requires_grad:
            seen = seen.view_as(seen)
            # pyautoattack steps along the sign, 0 for NaN in torch: the image would seem robust.
            refusal = (
                "the gradient in the image is not finite, so "
                f"{self._attack or 'an attack'} cannot move it and its robustness cannot be "
                "measured; look for a root or a logarithm of zero in the model."
            )
            seen.register_hook(partial(self._require_finite, seen.detach(), refusal))
        logits = self.model(seen)
        came = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        if len(came) != 2 or came[0] != len(x) or self.num_classes not in (None, came[1]):
            raise InputError(
                f"model: expected logits of shape ({len(x)}, {self.num_classes or 'K'}), got "
                f"{came}; evaluate a classifier trained on these classes."
            )
        under = self._attack and f" under {self._attack}"
        refusal = (
            f"the model's logits are not finite{under} ({{}} ...), so its accuracy means nothing; "
            "check the weights for NaN and infinity."
        )
        self._require_finite(x.detach(), refusal, logits.detach())
        if torch.is_grad_enabled() and x.requires_grad and not logits.requires_grad:
            self.detached = True
            logits = logits + 0 * seen.flatten(1).sum(dim=1, keepdim=True)
        return logits.to(x.dtype)

    def _require_finite(self, x: Tensor, refusal: str, values: Tensor) -> None:
        """Raise, naming the natural image that the first row with other values comes from."""
        if bool(torch.isfinite(values).all()):
            return
        row = int((~torch.isfinite(values).flatten(1).all(dim=1)).nonzero()[0])
        name = "an image"
        if self._natural is not None:
            natural, indices = self._natural
            nearest = (natural - x[row]).abs().flatten(1).amax(dim=1).argmin()
            name = f"image {int(indices[nearest.cpu()])}"
        raise DivergedError(f"{name}: {refusal.format(values[row].flatten()[:4].tolist())}")


def weight_dtype(model: nn.Module) -> torch.dtype:
    """Return torch.float64 if a parameter has it, else float32; less rounds gradients to zero."""
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_floating_point() and tensor.dtype not in (torch.float32, torch.float64):
            raise InputError(
                f"model: expected float32 weights, but {name} is {tensor.dtype}; "
                "call model.float() before the evaluation."
            )
    double = any(p.dtype == torch.float64 for p in model.parameters())
    return torch.float64 if double else torch.float32


def check_perturbation(
    x_adv: Tensor, x: Tensor, indices: Tensor, eps: float, attack: str, norm: Norm = "linf"
) -> None:
    """Raise, naming attack and image, unless all are finite, in [0, 1] and within eps of ``x``."""
    moved = (x_adv - x).flatten(1)
    # A sum of as many squares as an image has pixels is taken in float64.
    far = moved.double().norm(dim=1) if norm == "l2" else moved.abs().amax(dim=1)
    low, high = x_adv.flatten(1).amin(dim=1), x_adv.flatten(1).amax(dim=1)
    # Written so that NaN is a violation.
    held = (far <= eps + EPS_TOLERANCE * max(1.0, eps)) & (low >= 0) & (high <= 1)
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
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    mkldnn: Any = torch.backends.mkldnn
    switches: list[tuple[Any, str, Any]]
    if hasattr(matmul, "fp32_precision"):
        owners = (matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn)
        switches = [(owner, "fp32_precision", "ieee") for owner in owners]
    else:  # before torch 2.9
        switches = [(owner, "allow_tf32", False) for owner in (matmul, cudnn)]
    # The last batch of an attack has another size each time: trying out algorithms for it would
    # take longer than what the best of them saves.
    switches.append((cudnn, "benchmark", False))
    switches += [(m, "compute_dtype", None) for m in model.modules() if hasattr(m, "compute_dtype")]
    former = [getattr(owner, name) for owner, name, _ in switches]
    try:
        for owner, name, value in switches:
            setattr(owner, name, value)
        # An autocast within this one, which would be a network's own, would else keep the weights
        # it has cast for as long as the block lasts, however they move meanwhile.
        with torch.autocast(device.type, enabled=False, cache_enabled=False):
            yield
    finally:
        for (owner, name, _), value in zip(switches, former, strict=True):
            setattr(owner, name, value)


def find_instability(guard: Guard, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[str, ...]:
    """Return the signs that the answers themselves cannot be trusted, as sentences."""
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
    """Return the signs that gradients do not lead attacks to adversarial images, as sentences."""
    count = pixels = zero_images = zero_pixels = saturated = 0
    probabilities = True
    for x, y in batches:
        with torch.no_grad():
            logits = guard(x)
        ones = (logits.sum(dim=1) - 1).abs() < 1e-4
        probabilities &= bool((logits >= 0).all() and ones.all())
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
            "as the softmax is saturated: believe C&W and AutoAttack, not FGSM and PGD"
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

    Holds the warnings of every result, by name of the attack, and what only shows between results
    of one model: an attack with a higher accuracy than the natural one or than a weaker attack,
    eps 0 that differs from natural, and AutoAttack far below PGD.
    """
    by_text: dict[str, list[str]] = {}
    for name, result in results.items():
        for text in result.warnings:
            by_text.setdefault(text, []).append(attack_name(name))
    found = [f"{', '.join(names)}: {text}" for text, names in by_text.items()]
    natural = results.get("natural")
    for name, result in results.items():
        if natural is None or name == "natural" or natural.count != result.count:
            continue
        if result.correct > natural.correct:
            found.append(
                f"{attack_name(name)}: more images right ({result.correct}) than without an attack"
            )
        elif result.settings.get("eps") == 0 and result.correct != natural.correct:
            found.append(f"{attack_name(name)}: eps is 0, yet the accuracy is not the natural one")
    for weak, strong in _chains(results):
        lead = results[strong].accuracy - results[weak].accuracy
        if lead > _noise(results[weak], results[strong]):
            found.append(
                f"{attack_name(strong)}: accuracy {results[strong].accuracy:.1f} % is above that "
                f"of the weaker {attack_name(weak)} ({results[weak].accuracy:.1f} %): the attack "
                "does not optimise well"
            )
    if "aa" in results:
        for name, result in results.items():
            gap = result.accuracy - results["aa"].accuracy
            if name.startswith(("pgd", "cw")) and gap > USUAL_GAP + _noise(result, results["aa"]):
                word = attack_name(name)
                found.append(f"{word}: AutoAttack is {gap:.1f} points lower: do not believe {word}")
    return found


def _chains(results: Mapping[str, AttackResult]) -> list[tuple[str, str]]:
    """Return pairs of a weaker attack and the next stronger one among the results."""
    specs = sorted(map(parse_attack, results), key=lambda spec: spec.steps)
    end = ["aa"] if "aa" in results else []
    pgd = [spec.name for spec in specs if spec.family == "pgd"]
    pairs = [*pairwise(pgd + end)]
    for family in ("pgd-t", "cw"):
        pairs += pairwise([spec.name for spec in specs if spec.family == family] + end)
    if "fgsm" in results:
        # Steps by which not every start reaches every corner of the ball may end behind fgsm.
        used = {name: results[name].settings for name in pgd}
        long = [n for n, s in used.items() if s["steps"] * s["step_size"] >= 2 * s["eps"]]
        pairs += [("fgsm", name) for name in (long + end)[:1]]
    return pairs


def _noise(a: AttackResult, b: AttackResult) -> float:
    """Return the lead in percentage points that chance explains."""
    fewest = min(a.count, b.count)
    noise = max(ORDER_NOISE, 200 / fewest)
    if a.count == b.count:
        return noise
    share = (a.correct + b.correct) / (a.count + b.count)
    return noise + 300 * math.sqrt(share * (1 - share) / fewest)
