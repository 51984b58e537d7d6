"""One model measured on one set of images: what attacks share, and what is kept between calls."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cure_fast.attack_result import AttackResult, AttackSpec
from cure_fast.attacks import pgd
from cure_fast.autoattack import autoattack_settings, run_autoattack
from cure_fast.errors import InputError
from cure_fast.files import write_json
from cure_fast.losses import cross_entropy, margin
from cure_fast.progress import track
from cure_fast.trust import (
    Guard,
    check_perturbation,
    check_unchanged,
    find_instability,
    find_masking,
    state_hashes,
    tensor_hash,
)

# Images that are looked at for signs of a wrong evaluation: enough for a share, little beside PGD.
PROBE_IMAGES = 64
# Steps that add up to less than this share of eps cannot explore the ball.
SHORTEST_PATH = 0.9


@dataclass(kw_only=True)
class Measurement:
    """One model on one set of images, and what several attacks share."""

    guard: Guard
    images: Tensor
    labels: Tensor
    device: torch.device
    eps: float
    step_size: float
    batch_size: int
    seed: int
    aa_images: int = 0
    state_dir: Path | None = None
    name: str = "model"
    hashes: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.hashes = state_hashes(self.guard.model)

    def load(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return images [n, C, H, W] in [0, 1] and labels [n], both on the device."""
        x = self.images[indices].to(self.device).permute(0, 3, 1, 2)
        scale = 255 if x.dtype == torch.uint8 else 1
        return x.to(self.guard.dtype) / scale, self.labels[indices].to(self.device)

    def result(self, spec: AttackSpec) -> AttackResult:
        """Return the stored result of the attack, or run it and store it."""
        settings = self.settings(spec)
        count = self.aa_images if spec.family == "aa" else len(self.images)
        path, identity, state = None, {}, {}
        if self.state_dir is not None:
            path = self.state_dir / f"{spec.name}.json"
            identity = self.identity(spec, settings, count)
            state = read_state(path, identity)
        if "result" in state:
            return AttackResult.from_dict(state["result"])

        def save(**part: Any) -> None:
            check_unchanged(self.guard.model, self.hashes)
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, {"identity": identity, **part})

        natural, seconds = self.natural
        warnings = self.instability
        if spec.family == "aa":
            outcome = run_autoattack(
                self.guard,
                self.load,
                natural[:count],
                settings=settings,
                progress=state.get("progress"),
                save=lambda progress: save(progress=progress),
                title=f"{self.name} aa",
            )
            robust, seconds = outcome.robust, outcome.seconds
            warnings += self.masking + outcome.warnings
            # For ratios to the natural accuracy, where aa sees a part of the images.
            settings = settings | {
                "robust_after": outcome.robust_after,
                "natural_correct": int(natural[:count].sum()),
            }
        elif spec.family == "natural":
            robust = natural
        else:
            started = time.perf_counter()
            robust = self.under_attack(spec, natural)
            seconds = time.perf_counter() - started
            warnings += self.masking + self.step_warnings(spec)
        result = AttackResult(
            attack=spec.name,
            correct=int(robust.sum()),
            count=count,
            seconds=seconds,
            settings=settings,
            warnings=warnings,
            reliable=not warnings,
            precision=self.precision,
        )
        save(result=result.to_dict())
        return result

    @cached_property
    def natural(self) -> tuple[Tensor, float]:
        """Which images are classified right, bool [N], and the seconds that took."""
        started = time.perf_counter()
        correct = torch.zeros(len(self.images), dtype=torch.bool)
        with track(f"{self.name} natural", len(correct)) as advance:
            for indices in torch.arange(len(correct)).split(self.batch_size):
                x, y = self.load(indices)
                self.guard.at(x, indices)
                correct[indices] = (self.guard(x).argmax(dim=1) == y).cpu()
                advance(len(indices))
        return correct, time.perf_counter() - started

    @cached_property
    def instability(self) -> tuple[str, ...]:
        """What the first images say against the model's answers."""
        return find_instability(self.guard, self.first_batches())

    @cached_property
    def masking(self) -> tuple[str, ...]:
        """What the first images say against the model's gradients."""
        return find_masking(self.guard, self.first_batches())

    def first_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the images that are looked at for signs of a wrong evaluation, and their labels."""
        for indices in torch.arange(min(PROBE_IMAGES, len(self.images))).split(self.batch_size):
            x, y = self.load(indices)
            self.guard.at(x, indices)
            yield x, y

    def under_attack(self, spec: AttackSpec, correct: Tensor) -> Tensor:
        """Return which images [N] stay right under a gradient attack, given which are right now."""
        robust, pending = correct.clone(), correct.nonzero().flatten()
        with track(f"{self.name} {spec.name}", len(correct)) as advance:
            advance(len(correct) - len(pending))
            for indices in pending.split(self.batch_size) if len(pending) else ():
                x, y = self.load(indices)
                self.guard.at(x, indices)
                x_adv = self.perturb(spec, x, y, indices)
                robust[indices] = (self.guard(x_adv).argmax(dim=1) == y).cpu()
                advance(len(indices))
        return robust

    def perturb(self, spec: AttackSpec, x: Tensor, y: Tensor, indices: Tensor) -> Tensor:
        """Return the last iterate of fgsm, pgdK or cwK from images [n, C, H, W] and labels [n]."""
        loss = margin if spec.family == "cw" else cross_entropy
        fgsm = spec.family == "fgsm"
        draw = uniform_start(x.shape[1:], indices, spec.family, self.seed).to(x)
        x_adv = pgd(
            self.guard,
            x,
            # Summed, so that one image's gradient does not depend on how many there are.
            lambda logits: loss(logits, y).sum(),
            eps=self.eps,
            step_size=self.eps if fgsm else self.step_size,
            steps=spec.steps,
            start="zero" if fgsm else self.eps * draw,
        )
        check_perturbation(x_adv, x, indices, self.eps, spec.name)
        return x_adv

    def step_warnings(self, spec: AttackSpec) -> tuple[str, ...]:
        """Return what speaks against the length of the attack's steps."""
        if spec.family == "fgsm" or self.eps == 0:
            return ()
        if self.step_size > 2 * self.eps:
            return (f"a step of {self.step_size:g} crosses the whole ball of eps {self.eps:g}",)
        if spec.steps * self.step_size < SHORTEST_PATH * self.eps:
            return (f"{spec.steps} steps of {self.step_size:g} do not reach eps {self.eps:g}",)
        return ()

    @property
    def precision(self) -> str:
        """Name of the dtype that everything is computed in."""
        return str(self.guard.dtype).removeprefix("torch.")

    def settings(self, spec: AttackSpec) -> dict[str, Any]:
        """Return all that decides the result besides model and images, as JSON types."""
        if spec.family == "natural":
            return {}
        if spec.family == "aa":
            return autoattack_settings(
                eps=self.eps,
                num_classes=self.guard.num_classes or 0,
                batch_size=self.batch_size,
                seed=self.seed,
            )
        settings = {"eps": self.eps, "norm": "Linf", "steps": spec.steps}
        if spec.family == "fgsm":
            return settings | {"step_size": self.eps, "loss": "cross-entropy", "start": "zero"}
        return settings | {
            "step_size": self.step_size,
            "loss": "margin" if spec.family == "cw" else "cross-entropy",
            "start": "uniform",
            "restarts": 1,
            "iterate": "last",
            "seed": self.seed,
        }

    def identity(self, spec: AttackSpec, settings: dict[str, Any], count: int) -> dict[str, Any]:
        """Return what must be the same for a stored result to be this one, as flat JSON types."""
        kinds = [(n, type(m).__qualname__) for n, m in self.guard.model.named_modules()]
        return {
            "attack": spec.name,
            "weights": hashlib.sha256(json.dumps(self.hashes).encode()).hexdigest(),
            "layers": hashlib.sha256(json.dumps(kinds).encode()).hexdigest(),
            "images": tensor_hash(self.images[:count]),
            "labels": tensor_hash(self.labels[:count]),
            "precision": self.precision,
            "torch": torch.__version__,
            **settings,
        }


def uniform_start(shape: Sequence[int], indices: Tensor, family: str, seed: int) -> Tensor:
    """Return one draw per image from the uniform distribution on [-1, 1), float32 [n, *shape].

    Args:
        shape: shape of an image.
        indices: place of each image in its set [n]; the draw depends on it, not on the batch.
        family: kind of attack; those that differ in the number of steps alone share their starts.
        seed: seed of the evaluation.
    """
    word = hashlib.sha256(f"{family} {seed}".encode()).digest()[:8]
    draws = np.empty((len(indices), *shape), dtype=np.float32)
    for row, index in enumerate(indices.tolist()):
        key = np.array([int.from_bytes(word, "little"), index], dtype=np.uint64)
        draws[row] = np.random.Generator(np.random.Philox(key=key)).random(shape, dtype=np.float32)
    return torch.from_numpy(draws).mul_(2).sub_(1)


def read_state(path: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """Return what an earlier evaluation stored at ``path``, or nothing if it stored nothing.

    Raises:
        InputError: if it is not readable, or is of another model, set of images or settings.
    """
    if not path.exists():
        return {}
    remedy = f"Delete {path} or evaluate into another folder to start over."
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        stored = dict(state["identity"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a stored evaluation ({error!r}). {remedy}") from error
    here = json.loads(json.dumps(identity))
    different = [
        f"{name} ({_short(stored.get(name))} there, {_short(here.get(name))} here)"
        for name in {**stored, **here}
        if stored.get(name) != here.get(name)
    ]
    if different:
        raise InputError(f"{path}: stored with other {', '.join(different)}. {remedy}")
    return state


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) < 64 else text[:8]
