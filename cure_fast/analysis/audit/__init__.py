"""Whether the accuracy of a network under attack can be believed: checks, each with a verdict.

Carlini et al., On Evaluating Adversarial Robustness, 2019, list what such an accuracy has to
withstand; :data:`.case.CHECKS` has what is asked here. A check that passes shows that one known
way to fool oneself was not taken. It proves no robustness, and an audit that holds up still says
no more than that nothing speaks against the figures.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from cure_fast.analysis.audit import attacking, network, records
from cure_fast.analysis.audit.case import (
    ABSENT,
    CHECKS,
    FAILED,
    AuditSettings,
    Case,
    Finding,
    Known,
    absent,
    overall,
    refusing,
)
from cure_fast.analysis.audit.drawing import draw
from cure_fast.analysis.audit.planted import planted
from cure_fast.analysis.shape import Analysis, Numbers, Result, Task
from cure_fast.config import DataConfig, Norm
from cure_fast.config.arguments import AuditChecks
from cure_fast.config.checks import check, find
from cure_fast.evaluation.evaluate import check_data
from cure_fast.evaluation.given import as_images
from cure_fast.files import user_path
from cure_fast.loaders import ImageSet, read_dataset, read_training
from cure_fast.runs.folder import load_config

__all__ = ["AUDIT", "AuditResult", "AuditSettings", "Known", "audit", "audit_of", "known_of"]

MADE: dict[str, Callable[[Case], Finding]] = {
    **{name: partial(network.kept, name=name) for name in network.KEPT},
    "classes": network.classes,
    **attacking.CHECKS,
    "planted": planted,
    **records.CHECKS,
}
# Checks that need no answer of the network.
WITHOUT_ANSWERS = ("selection", "overlap")


def checks_of(settings: AuditChecks) -> tuple[str, ...]:
    """Return the names of the checks that are asked for; raise ``InputError`` for other names."""
    asked = tuple(CHECKS) if settings.checks is None else settings.checks
    for name in asked:
        find("--checks", CHECKS, name)
    check(bool(asked), "checks", "", "at least one check")
    return asked


def compute(task: Task, settings: AuditSettings, known: Known | None = None) -> Numbers:
    """Return the verdict, the checks with theirs as ``rows``, the curve, and the attacks."""
    asked = checks_of(settings)
    check_data(task.images, task.labels)
    case = Case(task, settings, known or Known())
    findings: dict[str, Finding] = {}
    # Without answers that can be believed no other check of the network means anything.
    answers = MADE["answers"](case)
    for name in CHECKS:
        if name not in asked:
            continue
        if name == "answers":
            findings[name] = answers
        elif answers["verdict"] == FAILED and name not in WITHOUT_ANSWERS:
            findings[name] = absent("the answers of the network cannot be measured: see answers")
        else:
            findings[name] = refusing(partial(MADE[name], case))
    verdicts = {name: found["verdict"] for name, found in findings.items()}
    if answers["verdict"] == FAILED:
        verdicts["answers"] = FAILED
    shown = ["natural", "fgsm", *(f"pgd{k}" for k in case.steps), case.strongest[1]]
    return {
        "verdict": overall(verdicts),
        "holds_up": FAILED not in verdicts.values() and set(verdicts.values()) != {ABSENT},
        "curve": findings.get("curve", {}).get("curve", []),
        "attacks": [
            {"attack": name, "accuracy": case.measure(name).accuracy}
            for name in shown
            if case.has(name)
        ],
        "rows": [
            {"check": name, "asks": CHECKS[name]}
            | {key: found[key] for key in ("verdict", "evidence")}
            for name, found in findings.items()
        ],
    }


AUDIT = Analysis(
    name="audit",
    title="Whether the accuracy under attack can be believed",
    source="Carlini et al., On Evaluating Adversarial Robustness",
    about=(
        "Above, the accuracy at growing radius, whose dotted line is the radius of the audit, and "
        "under attacks of growing strength; below, each check with its verdict and what it rests "
        "on. Checks look for known ways to fool oneself: passing them all proves no robustness."
    ),
    settings=AuditSettings(),
    compute=compute,
    draw=draw,
    most=1,
    images=200,
)


class AuditResult(Result):
    """What an audit found; ``rows`` has a check each, with ``verdict`` and ``evidence``."""

    def __repr__(self) -> str:
        return f"AuditResult({self.verdict})"

    @property
    def verdict(self) -> str:
        """The verdict in a sentence."""
        return self.numbers["verdict"]

    @property
    def holds_up(self) -> bool:
        """Whether no check failed."""
        return self.numbers["holds_up"]

    @property
    def failed(self) -> dict[str, str]:
        """The evidence of each check that failed, by its name."""
        return {r["check"]: r["evidence"] for r in self.rows if r["verdict"] == FAILED}


def audit_of(known: Known) -> Analysis[AuditSettings]:
    """Return the audit that knows more than the network and the images to attack."""
    return replace(AUDIT, compute=partial(compute, known=known))


def known_of(
    data: DataConfig, root: Path, *, test: ImageSet | None = None, split: bool = True
) -> Known:
    """Return what is known of a network's images, which are read where a check asks for them.

    Args:
        data: names the data set and, for a run, its split.
        root: holds the data sets, of which none is downloaded.
        test: all test images, where they have been read.
        split: whether images were held out as ``data`` says; else none are known to be.
    """
    name = data.data
    options: dict[str, Any] = {"download": False, "image_size": data.image_size}
    read = partial(read_dataset, name, root, **options)

    def training() -> tuple[Tensor, Tensor | None]:
        if not split:
            return as_images(read("train").images), None
        train, val = read_training(
            name,
            root,
            train_images=data.train_images,
            val_images=data.val_images,
            seed=data.split_seed,
            **options,
        )
        return as_images(train.images), as_images(val.images)

    return Known(
        data=name,
        test=partial(read, split="test") if test is None else lambda: test,
        training=training,
    )


def audit(
    model: nn.Module | str | os.PathLike[str],
    images: np.ndarray | Tensor,
    labels: np.ndarray | Tensor,
    *,
    train_images: np.ndarray | Tensor | None = None,
    data: str = "",
    eps: float | str | None = None,
    norm: Norm | None = None,
    step_size: float | str | None = None,
    batch_size: int = 256,
    seed: int = 0,
    **settings: Any,
) -> AuditResult:
    """Return whether the accuracy of a network under attack can be believed, check by check.

    Args:
        model: any module from images [N, C, H, W] in [0, 1] to logits [N, K], which is left as it
            was; or the folder of a run, whose record is looked at too, or a file of weights.
        images: test images, floats in [0, 1], [N, C, H, W], or uint8 [N, H, W, C]; some hundreds.
        labels: whole numbers [N] from 0 to K - 1.
        train_images: training images, as ``images``, for the check that none of them is tested on;
            None takes those of a run, where they can be read.
        data: name of the data set, for the check against published figures, such as ``cifar10``;
            a run's is known.
        eps: radius in pixel units; None takes that of the run or file, and 8/255 for a module.
        norm: ``linf`` or ``l2``, which needs ``eps``; None is as for ``eps``.
        step_size: length of an attack's step in pixel units; None follows ``eps``.
        batch_size: images per batch; changes the time, not the result.
        seed: of all that is drawn.
        settings: ``checks``, a list of names, ``steps``, ``queries`` and ``planted``, which are
            flags of ``cure-fast audit``.

    Raises:
        InputError: for images, labels or settings of another kind.
    """
    known = Known()
    if not isinstance(model, nn.Module) and Path(model).is_dir():
        own = load_config(Path(model)).data
        known = known_of(own, user_path(own.data_root, "data_root"))
    if data:
        known = replace(known, data=data)
    if train_images is not None:
        taken = as_images(train_images)
        known = replace(known, training=lambda: (taken, None))
    found = audit_of(known)(
        model,
        images,
        labels,
        eps=eps,
        norm=norm,
        step_size=step_size,
        batch_size=batch_size,
        seed=seed,
        **settings,
    )
    return AuditResult(found.analysis, found.numbers)
