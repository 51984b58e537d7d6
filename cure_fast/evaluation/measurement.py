"""One model measured on one set of images: what attacks share, and what is kept between calls."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

import cure_fast
from cure_fast.attacks import pgd
from cure_fast.config.attack_names import AttackSpec, parse_attack
from cure_fast.console import warn
from cure_fast.errors import MemoryExhaustedError, is_out_of_memory
from cure_fast.evaluation.attack_result import AttackResult, read_state, write_state
from cure_fast.evaluation.autoattack import Outcome, autoattack_settings, run_autoattack
from cure_fast.evaluation.model_state import Watch, layers_hash, tensor_hash
from cure_fast.evaluation.trust import Guard, check_perturbation, find_instability, find_masking
from cure_fast.losses import cross_entropy, margin
from cure_fast.progress import Progress, Work

# Images that are looked at for signs of a wrong evaluation: enough for a share, little beside PGD.
PROBE_IMAGES = 64
# Steps that add up to less than this share of eps cannot explore the ball.
SHORTEST_PATH = 0.9

T = TypeVar("T")


def untold(spec: AttackSpec) -> AbstractContextManager[Work]:
    """Return work that nobody is told of."""
    return Progress().work(spec.name, spec.name)


@dataclass(kw_only=True)
class Measurement:
    """One model on one set of images, and what several attacks share.

    Batches are of ``batch_size`` for AutoAttack, whose result depends on it, and else of
    ``fitting_size``, which is halved whenever memory ran out.
    """

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
    work: Callable[[AttackSpec], AbstractContextManager[Work]] = untold
    fitting_size: int = field(init=False)
    watch: Watch = field(init=False)

    def __post_init__(self) -> None:
        self.fitting_size = min(self.batch_size, len(self.images))
        # Only a result that is kept for later needs the weights themselves.
        self.watch = Watch(self.guard.model, thorough=self.state_dir is not None)

    def load(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return images [n, C, H, W] in [0, 1] and labels [n], both on the device."""
        x = self.images[indices].to(self.device).permute(0, 3, 1, 2)
        scale = 255 if x.dtype == torch.uint8 else 1
        return x.to(self.guard.dtype) / scale, self.labels[indices].to(self.device)

    def result(self, spec: AttackSpec) -> AttackResult:
        """Return the stored result of the attack, or run it and store it."""
        settings = self.settings(spec)
        count = self.aa_images if spec.family == "aa" else len(self.images)
        precision = str(self.guard.dtype).removeprefix("torch.")
        path, identity, state = None, {}, {}
        if self.state_dir is not None:
            path = self.state_dir / f"{spec.name}.json"
            # What must be the same for a stored result to be this one.
            identity = {
                "attack": spec.name,
                "weights": hashlib.sha256(json.dumps(self.watch.hashes).encode()).hexdigest(),
                "layers": layers_hash(self.guard.model),
                "images": tensor_hash(self.images[:count]),
                "labels": tensor_hash(self.labels[:count]),
                "precision": precision,
                "cure_fast": cure_fast.__version__,
                "torch": torch.__version__,
                **settings,
            }
            state = read_state(path, identity)
        if "result" in state:
            return AttackResult.from_dict(state["result"])

        def save(*, thorough: bool = True, **part: Any) -> None:
            self.watch.check(thorough=thorough)
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_state(path, {"identity": identity, **part})

        natural, seconds = self.natural
        warnings = self.instability
        if spec.family == "aa":
            outcome = self.under_autoattack(
                natural[:count],
                settings,
                state.get("progress"),
                # Between the batches of one attack the look that costs nothing has to do.
                lambda p: save(progress=p, thorough=p["batches"] == 0),
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
            precision=precision,
            by_class=by_class(robust, self.labels[:count], self.guard.num_classes or 0),
        )
        save(result=result.to_dict())
        return result

    @cached_property
    def natural(self) -> tuple[Tensor, float]:
        """Which images are classified right, bool [N], and the seconds that took."""
        started = time.perf_counter()
        everything = torch.ones(len(self.images), dtype=torch.bool)
        return self.under_attack(parse_attack("natural"), everything), time.perf_counter() - started

    @cached_property
    def instability(self) -> tuple[str, ...]:
        """What the first images say against the model's answers."""
        return self.fitting(lambda: find_instability(self.guard, self.first_batches()))

    @cached_property
    def masking(self) -> tuple[str, ...]:
        """What the first images say against the model's gradients."""
        return self.fitting(lambda: find_masking(self.guard, self.first_batches()))

    def first_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the images that are looked at for signs of a wrong evaluation, and their labels."""
        for indices in torch.arange(min(PROBE_IMAGES, len(self.images))).split(self.fitting_size):
            x, y = self.load(indices)
            self.guard.at(x, indices)
            yield x, y

    def each_batch(self, indices: Tensor, work: Callable[[Tensor], None]) -> None:
        """Call ``work`` with the indices [N] in order, with fewer of the same if memory ran out."""
        done = 0

        def next_batch() -> int:
            batch = indices[done : done + self.fitting_size]
            work(batch)
            return len(batch)

        while done < len(indices):
            done += self.fitting(next_batch)

    def fitting(self, work: Callable[[], T]) -> T:
        """Return what ``work`` does, called anew with batches half as large if memory ran out."""
        while True:
            try:
                return work()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                reason = _told(error)
            # Here the error is gone, and with it the frames that hold the batch.
            size = self.fitting_size
            if size == 1:
                raise MemoryExhaustedError(
                    f"{self.name}: one image takes more memory than there is ({reason}); end other "
                    "programs on the device, or use --device cpu."
                )
            self.fitting_size = size // 2
            if self.device.type == "cuda":
                torch.cuda.empty_cache()  # blocks that were cut for the former size
            warn(
                f"{self.name}: {size} images did not fit into memory; from here "
                f"{self.fitting_size} images per pass, which changes no result ({reason})"
            )

    def under_attack(self, spec: AttackSpec, correct: Tensor) -> Tensor:
        """Return which of the correct images, bool [N], stay so under any attack but aa."""
        robust, pending = correct.clone(), correct.nonzero().flatten()
        natural = spec.family == "natural"
        with self.work(spec) as work:
            work.advance(len(correct) - len(pending), skip=True)

            def attack(indices: Tensor) -> None:
                x, y = self.load(indices)
                self.guard.at(x, indices, "" if natural else spec.name)
                x_adv = x if natural else self.perturb(spec, x, y, indices)
                robust[indices] = (self.guard(x_adv).argmax(dim=1) == y).cpu()
                work.advance(len(indices))

            self.each_batch(pending, attack)
        return robust

    def under_autoattack(
        self,
        correct: Tensor,
        settings: dict[str, Any],
        progress: dict[str, Any] | None,
        save: Callable[[dict[str, Any]], None],
    ) -> Outcome:
        """Return what :func:`run_autoattack` leaves of the images that are right now."""
        try:
            with self.work(parse_attack("aa")) as work:
                return run_autoattack(
                    self.guard,
                    self.load,
                    correct,
                    settings=settings,
                    progress=progress,
                    save=save,
                    work=work,
                )
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            size = min(self.batch_size, len(correct))
            remedy = (
                "which no other batch size can stand in for, as the result depends on it; evaluate "
                f"with --eval-batch-size {size // 2} (for cure-fast eval: --batch-size)"
                if size > 1
                else "the smallest there is; end other programs on the device, or use --device cpu"
            )
            raise MemoryExhaustedError(
                f"{self.name} aa: out of memory with {size} images in a batch, {remedy} "
                f"({_told(error)})."
            ) from error

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


def by_class(right: Tensor, labels: Tensor, classes: int) -> tuple[float | None, ...]:
    """Return the percentage of each class's images that are right, None for one without images."""
    counts = labels.bincount(minlength=classes).tolist()
    hits = labels[right].bincount(minlength=len(counts)).tolist()
    return tuple(100 * hit / n if n else None for hit, n in zip(hits, counts, strict=True))


def uniform_start(shape: Sequence[int], indices: Tensor, family: str, seed: int) -> Tensor:
    """Return a draw per image from the uniform distribution on [-1, 1), float32 [n, *shape].

    It depends on ``indices`` [n], places in the set, and the family, not on batch or step count.
    """
    word = hashlib.sha256(f"{family} {seed}".encode()).digest()[:8]
    draws = np.empty((len(indices), *shape), dtype=np.float32)
    for row, index in enumerate(indices.tolist()):
        key = np.array([int.from_bytes(word, "little"), index], dtype=np.uint64)
        draws[row] = np.random.Generator(np.random.Philox(key=key)).random(shape, dtype=np.float32)
    return torch.from_numpy(draws).mul_(2).sub_(1)


def _told(error: Exception) -> str:
    """Return the first sentence or two of an error: which allocator, and how much it was asked."""
    text = " ".join(str(error).split())
    return text[:160].rpartition(". ")[0] or text[:160] or type(error).__name__
