"""One model measured on one set of images: what attacks share, and what is kept between calls."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

import cure_fast
from cure_fast import distributed
from cure_fast.attacks import pgd
from cure_fast.config import Norm
from cure_fast.config.attack_names import AttackSpec, parse_attack
from cure_fast.config.steps import STEP_SHARE, evaluation_step, step_warning
from cure_fast.console import warn
from cure_fast.errors import MemoryExhaustedError, is_out_of_memory
from cure_fast.evaluation.attack_result import AttackResult, read_state, write_state
from cure_fast.evaluation.autoattack import (
    NORMS,
    TARGET_CLASSES,
    Outcome,
    autoattack_settings,
    flags_to_text,
    run_autoattack,
    text_to_flags,
)
from cure_fast.evaluation.model_state import Watch, layers_hash, tensor_hash
from cure_fast.evaluation.trust import Guard, check_perturbation, find_instability, find_masking
from cure_fast.files import file_hash
from cure_fast.losses import cross_entropy, margin
from cure_fast.progress import Progress, Work

# Images that are looked at for signs of a wrong evaluation: enough for a share, little beside PGD.
PROBE_IMAGES = 64

LOSSES = {
    "pgd": "cross-entropy",
    "pgd-t": "logit of the target less the label's",
    "cw": "margin",
}

T = TypeVar("T")


@dataclass(frozen=True)
class Round:
    """One of the runs of an attack of which an image has to withstand all.

    Attributes:
        restart: 0-based; the first has the start that the attack has without restarts.
        target: 0-based place of the class to reach among the other classes, likeliest first.
    """

    restart: int = 0
    target: int | None = None

    @property
    def word(self) -> str:
        """What the seed of its starts is told by, beside the attack's; empty for a plain one."""
        target = f" target {self.target}" if self.target else ""
        return target + (f" restart {self.restart}" if self.restart else "")


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
    step_size: float | None
    batch_size: int
    seed: int
    norm: Norm = "linf"
    step_share: float = STEP_SHARE
    restarts: int = 1
    keep_images: bool = False
    aa_images: int = 0
    state_dir: Path | None = None
    name: str = "model"
    work: Callable[[AttackSpec], AbstractContextManager[Work]] = untold
    fitting_size: int = field(init=False)
    watch: Watch = field(init=False)
    kept: dict[str, np.ndarray] = field(init=False, default_factory=dict)

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
            state = distributed.first(partial(read_state, path, identity))
        kept = None
        if self.keep_images and spec.family != "natural":
            kept, state = self.open_images(spec, count, state)
        if "result" in state:
            return AttackResult.from_dict(state["result"])

        def save(*, thorough: bool = True, **part: Any) -> None:
            self.watch.check(thorough=thorough)
            if path is not None and distributed.writes():
                path.parent.mkdir(parents=True, exist_ok=True)
                if isinstance(kept, np.memmap):
                    kept.flush()
                    if "result" in part:
                        part["adversarial"] = file_hash(self.images_file(spec))
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
                partial(keep, kept),
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
            robust, seconds = self.under_rounds(
                spec, natural, state.get("progress"), lambda p: save(progress=p), kept
            )
            warnings += self.masking
            if told := step_warning(self.eps, spec.steps, self.step_of(spec)):
                warnings += (told,)
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

    def rounds(self, spec: AttackSpec) -> list[Round]:
        """Return the rounds of an attack; each is on what is right after those before."""
        if not spec.iterated:
            return [Round()]
        targets = range(self.targets) if spec.family == "pgd-t" else [None]
        return [Round(again, target) for again in range(self.restarts) for target in targets]

    @property
    def targets(self) -> int:
        """How many other classes a targeted attack takes as its targets."""
        return min(TARGET_CLASSES, (self.guard.num_classes or 0) - 1)

    def under_rounds(
        self,
        spec: AttackSpec,
        correct: Tensor,
        progress: dict[str, Any] | None,
        save: Callable[[dict[str, Any]], None],
        kept: np.ndarray | None = None,
    ) -> tuple[Tensor, float]:
        """Return which of the correct images, bool [N], stay so in all rounds, and the seconds.

        After each round but the last ``save`` receives what a later call takes as ``progress``.
        """
        state = progress or {"rounds": 0, "robust": flags_to_text(correct), "seconds": 0.0}
        robust, started = text_to_flags(state["robust"]), time.perf_counter() - state["seconds"]
        rounds = self.rounds(spec)
        for number, now in enumerate(rounds[state["rounds"] :], state["rounds"] + 1):
            robust = self.under_attack(spec, robust, now, kept)
            seconds = time.perf_counter() - started
            if number < len(rounds):
                text = flags_to_text(robust)
                save({"rounds": number, "robust": text, "seconds": seconds})
        return robust, time.perf_counter() - started

    def images_file(self, spec: AttackSpec) -> Path:
        """Return where an attack's images are between calls, below the folder of its state."""
        assert self.state_dir is not None
        return self.state_dir / f"{spec.name}.images.npy"

    def open_images(
        self, spec: AttackSpec, count: int, state: dict[str, Any]
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Return where an attack's images [n, H, W, C] go, and its state if these are there."""
        shape = (count, *self.images.shape[1:])
        path = None if self.state_dir is None else self.images_file(spec)
        if path is not None and state:
            # Without images, or with damaged ones, the attack begins anew.
            with suppress(OSError, ValueError):
                found = np.lib.format.open_memmap(path, mode="r+")
                whole = "result" not in state or state.get("adversarial") == file_hash(path)
                if found.shape == shape and found.dtype == np.float32 and whole:
                    self.kept[spec.name] = found
                    return found, state
        if path is None:
            found = np.empty(shape, dtype=np.float32)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            found = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
        for indices in torch.arange(count).split(self.batch_size):
            keep(found, indices, self.load(indices)[0])
        self.kept[spec.name] = found
        return found, {}

    def under_attack(
        self,
        spec: AttackSpec,
        correct: Tensor,
        now: Round | None = None,
        kept: np.ndarray | None = None,
    ) -> Tensor:
        """Return which of the correct images, bool [N], stay so under a round of any attack but aa.

        The images that the attack leaves go into ``kept`` [N, H, W, C].
        """
        robust, pending = correct.clone(), correct.nonzero().flatten()
        natural = spec.family == "natural"
        with self.work(spec) as work:
            work.advance(len(correct) - len(pending), skip=True)

            def attack(indices: Tensor) -> None:
                x, y = self.load(indices)
                self.guard.at(x, indices, "" if natural else spec.name)
                x_adv = x if natural else self.perturb(spec, x, y, indices, now or Round())
                keep(kept, indices, x_adv)
                robust[indices] = (self.guard(x_adv).argmax(dim=1) == y).cpu()
                # The others are about as far.
                work.advance(len(indices) * distributed.processes())

            def attack_own() -> Tensor:
                # Whole batches, so that each is what it is in one process.
                batches = distributed.own(pending.split(self.fitting_size))
                self.each_batch(torch.cat([pending[:0], *batches]), attack)
                return robust

            # Flags only fall.
            return torch.stack(distributed.each(attack_own)).all(dim=0)

    def under_autoattack(
        self,
        correct: Tensor,
        settings: dict[str, Any],
        progress: dict[str, Any] | None,
        save: Callable[[dict[str, Any]], None],
        broke: Callable[[Tensor, Tensor], None],
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
                    broke=broke,
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

    def perturb(
        self, spec: AttackSpec, x: Tensor, y: Tensor, indices: Tensor, now: Round
    ) -> Tensor:
        """Return the last iterate of a round from images [n, C, H, W] and labels [n]."""
        loss = margin if spec.family == "cw" else cross_entropy
        fgsm = spec.family == "fgsm"
        if now.target is not None:
            logits = self.guard(x).scatter(1, y[:, None], -math.inf)
            loss = partial(lead_of, logits.argsort(dim=1, descending=True)[:, now.target])
        start = {"linf": uniform_start, "l2": start_in_ball}[self.norm]
        draw = start(x.shape[1:], indices, f"{spec.family}{now.word}", self.seed).to(x)
        x_adv = pgd(
            self.guard,
            x,
            # Summed, so that one image's gradient does not depend on how many there are.
            lambda logits: loss(logits, y).sum(),
            eps=self.eps,
            step_size=self.step_of(spec),
            steps=spec.steps,
            norm=self.norm,
            start="zero" if fgsm else self.eps * draw,
        )
        check_perturbation(x_adv, x, indices, self.eps, spec.name, self.norm)
        return x_adv

    def step_of(self, spec: AttackSpec) -> float:
        """Return the length of a step of an attack with steps, in pixel units."""
        if spec.family == "fgsm":
            return self.eps
        return evaluation_step(self.eps, spec.steps, size=self.step_size, share=self.step_share)

    def settings(self, spec: AttackSpec) -> dict[str, Any]:
        """Return all that decides the result besides model and images, as JSON types."""
        if spec.family == "natural":
            return {}
        if spec.family == "aa":
            return autoattack_settings(
                eps=self.eps,
                norm=self.norm,
                num_classes=self.guard.num_classes or 0,
                batch_size=self.batch_size,
                seed=self.seed,
            )
        settings = {"eps": self.eps, "norm": NORMS[self.norm], "steps": spec.steps}
        settings |= {"step_size": self.step_of(spec)}
        if spec.family == "fgsm":
            return settings | {"loss": "cross-entropy", "start": "zero"}
        return settings | {
            "loss": LOSSES[spec.family],
            "start": "uniform",
            "restarts": self.restarts,
            **({"target_classes": self.targets} if spec.family == "pgd-t" else {}),
            "iterate": "last",
            "seed": self.seed,
        }


def lead_of(target: Tensor, logits: Tensor, y: Tensor) -> Tensor:
    """Return by how much the logit of a class exceeds that of the label, [n], from logits [n, K].

    Gowal et al., An Alternative Surrogate Loss for PGD-based Adversarial Testing, 2019.
    """
    return (logits.gather(1, target[:, None]) - logits.gather(1, y[:, None])).squeeze(1)


def keep(kept: np.ndarray | None, indices: Tensor, images: Tensor) -> None:
    """Write images [n, C, H, W] to their places [n] in an array [N, H, W, C], if there is one."""
    if kept is not None:
        kept[indices.numpy()] = images.permute(0, 2, 3, 1).float().cpu().numpy()


def by_class(right: Tensor, labels: Tensor, classes: int) -> tuple[float | None, ...]:
    """Return the percentage of each class's images that are right, None for one without images."""
    counts = labels.bincount(minlength=classes).tolist()
    hits = labels[right].bincount(minlength=len(counts)).tolist()
    return tuple(100 * hit / n if n else None for hit, n in zip(hits, counts, strict=True))


def uniform_start(shape: Sequence[int], indices: Tensor, family: str, seed: int) -> Tensor:
    """Return a draw per image from the uniform distribution on [-1, 1), float32 [n, *shape].

    It depends on ``indices`` [n], places in the set, and the family, not on batch or step count.
    """
    draws = np.empty((len(indices), *shape), dtype=np.float32)
    for row, source in enumerate(sources(indices, family, seed)):
        draws[row] = source.random(shape, dtype=np.float32)
    return torch.from_numpy(draws).mul_(2).sub_(1)


def start_in_ball(shape: Sequence[int], indices: Tensor, family: str, seed: int) -> Tensor:
    """Return a draw per image from the uniform distribution in the L2 ball of radius 1.

    It is float32 [n, *shape], and depends on the same as :func:`uniform_start`.
    """
    draws = np.empty((len(indices), *shape), dtype=np.float32)
    for row, source in enumerate(sources(indices, family, seed)):
        # Points on a sphere of two more dimensions, seen without these, fill the ball evenly.
        point = source.standard_normal(math.prod(shape) + 2)
        draws[row] = (point / np.linalg.norm(point))[:-2].reshape(shape)
    return torch.from_numpy(draws)


def sources(indices: Tensor, family: str, seed: int) -> Iterator[np.random.Generator]:
    """Yield a source of random numbers for each image, of its place, the attack and the seed."""
    word = hashlib.sha256(f"{family} {seed}".encode()).digest()[:8]
    for index in indices.tolist():
        key = np.array([int.from_bytes(word, "little"), index], dtype=np.uint64)
        yield np.random.Generator(np.random.Philox(key=key))


def _told(error: Exception) -> str:
    """Return the first sentence or two of an error: which allocator, and how much it was asked."""
    text = " ".join(str(error).split())
    return text[:160].rpartition(". ")[0] or text[:160] or type(error).__name__
