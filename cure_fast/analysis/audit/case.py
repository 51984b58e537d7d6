"""What the checks of an audit are given, and what each of them gives back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from torch import nn

from cure_fast.analysis.shape import Settings, Subject, Task
from cure_fast.config.arguments import AuditChecks
from cure_fast.errors import CureFastError, MemoryExhaustedError, StoppedError
from cure_fast.evaluation.attack_result import AttackResult
from cure_fast.evaluation.autoattack import flags_to_text, text_to_flags
from cure_fast.loaders import ImageSet

T = TypeVar("T")

PASSED, FAILED, DOUBTFUL, ABSENT = "passed", "failed", "doubtful", "not applicable"
# What a check found: ``verdict``, ``evidence``, and numbers of its own.
Finding = dict[str, Any]

# The checks in the order that they are made and shown, and what each of them asks.
CHECKS = {
    "answers": "Do passes over the same images agree, on finite logits?",
    "classes": "Are the answers classes that there are, and more than one?",
    "gradients": "Do gradients lead where the logits go?",
    "zero": "Is an attack of radius 0 no attack?",
    "order": "Are stronger attacks stronger?",
    "plateau": "Do more steps find no more?",
    "ball": "Do adversarial images lie in the ball?",
    "curve": "Is nothing right where the ball is large?",
    "black-box": "Do attacks without gradients find no more?",
    "planted": "Is an adversarial image found that is known to be there?",
    "rescoring": "Do saved adversarial images score the same again?",
    "counts": "Were all test images counted?",
    "selection": "Was the epoch chosen on other images than those of the test?",
    "overlap": "Are test images no training images?",
    "published": "Is the accuracy one that others have reached?",
}


@dataclass(frozen=True, kw_only=True)
class AuditSettings(AuditChecks, Settings):
    """Settings of ``cure-fast audit``."""


@dataclass(frozen=True, kw_only=True)
class Known:
    """What is known beside the network and the images that are attacked.

    Attributes:
        data: name of the data set; empty where it is not known.
        test: reads all test images; None where nobody knows where they are.
        training: reads the training images and those held out of them, None where there are none;
            None where nobody knows where they are. Both raise ``InputError`` for absent data.
    """

    data: str = ""
    test: Callable[[], ImageSet] | None = None
    training: Callable[[], Sequence[torch.Tensor | None]] | None = None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What an attack left of the images.

    Attributes:
        result: as an evaluation has it.
        right: which images are right under it, bool [N].
        told: what the part of the task holds besides.
    """

    result: AttackResult
    right: torch.Tensor
    told: dict[str, Any]

    @property
    def accuracy(self) -> float:
        """Percent of the images."""
        return self.result.accuracy


@dataclass(frozen=True)
class Case:
    """What an audit is about."""

    task: Task
    settings: AuditSettings
    known: Known
    kept: dict[tuple[str, float], Measured] = field(default_factory=dict)

    @property
    def subject(self) -> Subject:
        """The one network that is looked at."""
        return self.task.subjects[0]

    @property
    def data(self) -> str:
        """Name of the data set."""
        return self.task.data or self.known.data

    @cached_property
    def steps(self) -> tuple[int, int, int]:
        """Steps of the attacks, growing: a quarter, a half and all of the settings'."""
        most = self.settings.steps
        return most // 4, most // 2, most

    @cached_property
    def strongest(self) -> tuple[str, str]:
        """The attacks with gradients that are believed most."""
        return f"pgd{self.steps[2]}", f"cw{self.steps[2]}"

    def one(self, name: str, part: Callable[[], T]) -> T:
        """Return what a part of the task gives, which is kept for the same command later."""
        return self.task.each({name: part}, "audit")[name]

    def has(self, attack: str) -> bool:
        """Return whether an attack was measured at the audit's radius."""
        return (attack, self.task.eps) in self.kept

    def measure(self, attack: str, eps: float | None = None) -> Measured:
        """Return what an attack leaves of the images; it is run once."""
        radius = self.task.eps if eps is None else eps
        name = (attack, radius)
        if name not in self.kept:
            part = partial(self._attack, attack, radius)
            told = self.one(f"{attack} at {radius:.6g}", part)
            self.kept[name] = Measured(
                result=AttackResult.from_dict(told["result"]),
                right=text_to_flags(told["right"]),
                told=told,
            )
        return self.kept[name]

    def survivors(self) -> torch.Tensor:
        """Return which images no attack with gradients broke, bool [N]."""
        left = self.measure("natural").right
        for attack in self.strongest:
            left = left & self.measure(attack).right
        return left

    def logits(
        self, images: torch.Tensor, *, model: nn.Module | None = None, size: int | None = None
    ) -> torch.Tensor:
        """Return finite logits [N, K] of images [N, C, H, W], on the CPU; as attacks see them.

        They are of another ``model`` where one is given, in batches of another ``size``.
        """
        return self.task.logits(model or self.subject.network, images, size=size)

    def _attack(self, attack: str, eps: float) -> dict[str, Any]:
        images, found = self.task.pixels, []
        result = self.task.accuracies(
            self.subject, [attack], eps=eps, on_images=lambda _, kept: found.append(kept)
        )[attack]
        attacked = torch.from_numpy(found[0]).permute(0, 3, 1, 2) if found else images
        # Of the images as 8 bits hold them, which is how pictures are kept.
        rounded = (255 * attacked).round() / 255
        answers, again = (self.logits(each).argmax(1) for each in (attacked, rounded))
        moved = (attacked - images).flatten(1).double()
        far = moved.norm(dim=1) if self.task.norm == "l2" else moved.abs().amax(dim=1)
        return {
            "result": result.to_dict(),
            "right": flags_to_text(answers == self.task.labels),
            "answers": answers.bincount().tolist(),
            "farthest": float(far.max()),
            "range": [float(attacked.min()), float(attacked.max())],
            "right_in_8_bits": int((again == self.task.labels).sum()),
        }


def found(evidence: str, failed: Sequence[str] = (), doubtful: Sequence[str] = ()) -> Finding:
    """Return a finding: what speaks against the network, or ``evidence`` that nothing does."""
    verdict = FAILED if failed else DOUBTFUL if doubtful else PASSED
    text = "; ".join([*failed, *doubtful]) or evidence
    return {"verdict": verdict, "evidence": f"{text[:1].upper()}{text[1:].rstrip('.')}."}


def absent(why: str) -> Finding:
    """Return the finding of a check that cannot be made."""
    return {**found(why), "verdict": ABSENT}


def refusing(check: Callable[[], Finding]) -> Finding:
    """Return what a check finds; that the network cannot be measured is a finding too."""
    try:
        return check()
    except (StoppedError, MemoryExhaustedError):
        raise
    except CureFastError as error:
        return found("", [str(error)])


def overall(verdicts: dict[str, str]) -> str:
    """Return the verdict of the audit in a sentence, from the verdicts by the checks' names."""
    names = {
        verdict: [name for name, each in verdicts.items() if each == verdict]
        for verdict in (PASSED, FAILED, DOUBTFUL, ABSENT)
    }
    made = len(verdicts) - len(names[ABSENT])
    if names[FAILED]:
        return f"does not hold up: {len(names[FAILED])} of {made} checks failed (" + (
            f"{', '.join(names[FAILED])})"
        )
    if not names[PASSED]:
        return "nothing is known: no check passed"
    doubts = f", {len(names[DOUBTFUL])} in doubt ({', '.join(names[DOUBTFUL])})"
    return f"holds up: {len(names[PASSED])} of {made} checks passed" + (
        doubts if names[DOUBTFUL] else ""
    )
