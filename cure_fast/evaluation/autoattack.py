"""AutoAttack (Croce and Hein, ICML 2020), version standard, L-inf, through pyautoattack 0.2.0.

The ensemble runs one attack and one batch at a time on the images that are still robust, which is
what pyautoattack does inside, with the same settings and the same seed for every batch: the result
is equal, and it can be interrupted and continued, which pyautoattack's own state file cannot
(the set of attacks in it is a string when it is read back). Three things are done around it:

- its warnings, which by default go to a logger that nobody hears, become part of the result;
- its check for dynamic defences replaces the process's trace function and counts calls in a global
  that is never reset: both are put back;
- its check that Square breaks little compares attacks within one call, and so sees nothing when
  they run one at a time: it is made here.
"""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from cure_fast.evaluation.trust import Guard, check_perturbation
from cure_fast.progress import track

STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
TARGET_CLASSES = 9
ITERATIONS = 100
SQUARE_QUERIES = 5000
# The targeted DLR loss divides by the first, third and fourth largest logit.
DLR_CLASSES = 4
# More than this share of all images broken by Square, which sees no gradient, says that the
# attacks that do were misled (pyautoattack's own threshold).
SQUARE_SHARE = 0.002


@dataclass(frozen=True)
class Outcome:
    """What AutoAttack left.

    Attributes:
        robust: bool [N], the images that no attack broke.
        robust_after: number of robust images after each attack.
        seconds: time spent, over all the calls that it took.
        warnings: what speaks against the result.
    """

    robust: Tensor
    robust_after: dict[str, int]
    seconds: float
    warnings: tuple[str, ...]


def planned_attacks(num_classes: int) -> tuple[str, ...]:
    """Return the attacks of version standard that exist for this many classes, in its order."""
    return tuple(a for a in STANDARD if a != "apgd-t" or num_classes >= DLR_CLASSES)


def autoattack_settings(
    *, eps: float, num_classes: int, batch_size: int, seed: int
) -> dict[str, Any]:
    """Return all that decides the result besides model and images, as JSON types.

    The batch size is one of them: pyautoattack draws its starts for a batch as a whole.
    """
    return {
        "eps": eps,
        "norm": "Linf",
        "version": "standard" if num_classes >= DLR_CLASSES else "not standard",
        "attacks": list(planned_attacks(num_classes)),
        "target_classes": min(TARGET_CLASSES, num_classes - 1),
        "iterations": ITERATIONS,
        "restarts": 1,
        "square_queries": SQUARE_QUERIES,
        "batch_size": batch_size,
        "seed": seed,
        "pyautoattack": version("pyautoattack"),
    }


def run_autoattack(
    guard: Guard,
    load: Callable[[Tensor], tuple[Tensor, Tensor]],
    correct: Tensor,
    *,
    settings: dict[str, Any],
    progress: dict[str, Any] | None = None,
    save: Callable[[dict[str, Any]], None] = lambda progress: None,
    title: str = "aa",
) -> Outcome:
    """Run the attacks of ``settings`` on the images that are naturally right.

    Args:
        guard: the model, in evaluation mode, its parameters without gradients.
        load: from indices [n] int64 to images [n, C, H, W] in [0, 1] and labels [n] int64.
        correct: bool [N], whether each natural image is classified right.
        settings: what :func:`autoattack_settings` returns.
        progress: what ``save`` received last in an interrupted call; None starts anew.
        save: receives, after every batch, a JSON-like mapping to continue from.
        title: name on the progress bar.

    Raises:
        CureFastError: if an attack returns an image outside the eps-ball or [0, 1].
    """
    state = progress or {
        "after": {},
        "entry": _flags_to_text(correct),
        "robust": _flags_to_text(correct),
        "batches": 0,
        "seconds": 0.0,
        "warnings": _first_warnings(settings),
    }
    started = time.perf_counter() - state["seconds"]
    robust = _text_to_flags(state["robust"])
    size = settings["batch_size"]
    for attack in [a for a in settings["attacks"] if a not in state["after"]]:
        pending = _text_to_flags(state["entry"]).nonzero().flatten()
        with track(f"{title} {attack}", len(pending)) as advance:
            advance(min(len(pending), state["batches"] * size))
            for indices in pending.split(size)[state["batches"] :] if len(pending) else ():
                x, y = load(indices)
                guard.at(x, indices, attack)
                x_adv, broken, told = attack_batch(guard, attack, x, y, settings)
                check_perturbation(x_adv, x, indices, settings["eps"], attack)
                robust[indices[broken.cpu()]] = False
                for text in told:
                    note(state["warnings"], f"{attack}: {text}")
                seconds = time.perf_counter() - started
                state |= {"robust": _flags_to_text(robust), "batches": state["batches"] + 1}
                save(state | {"seconds": seconds})
                advance(len(indices))
        if attack == "square":
            _judge_square(state["warnings"], len(pending) - int(robust.sum()), len(robust))
        state["after"][attack] = int(robust.sum())
        state |= {"entry": _flags_to_text(robust), "batches": 0}
        save(state | {"seconds": time.perf_counter() - started})
    seconds = time.perf_counter() - started
    return Outcome(robust, dict(state["after"]), seconds, told_warnings(state["warnings"]))


def told_warnings(counts: dict[str, list[Any]]) -> tuple[str, ...]:
    """Return one text per kind of warning that :func:`note` counted."""
    return tuple(
        text if count == 1 else f"{text} (and {count - 1} more of the kind)"
        for text, count in counts.values()
    )


def attack_batch(
    guard: Guard, attack: str, x: Tensor, y: Tensor, settings: dict[str, Any]
) -> tuple[Tensor, Tensor, list[str]]:
    """Run one attack on one batch; return the images, which it broke, and what it warned of.

    Args:
        guard: the model.
        attack: one of :data:`STANDARD`.
        x: images [N, C, H, W] float32 in [0, 1].
        y: labels [N] int64.
        settings: what :func:`autoattack_settings` returns.

    Returns:
        Images [N, C, H, W], unchanged where the attack failed; bool [N]; and warnings.
    """
    from pyautoattack import AutoAttack

    adversary = AutoAttack(
        guard,
        attacks=[attack],  # pyright: ignore[reportArgumentType]
        device=x.device,
        eps=settings["eps"],
        norm="Linf",
        seed=settings["seed"],
        version="custom",
    )
    iterating = (adversary.apgd, adversary.apgd_targeted, adversary.fab)
    assert all(part.n_iter == settings["iterations"] for part in iterating)
    # Version custom starts from other numbers than version standard.
    for part in (adversary.apgd, adversary.apgd_targeted, adversary.fab, adversary.square):
        part.n_restarts = settings["restarts"]
    for part in (adversary.apgd_targeted, adversary.fab):
        part.n_target_classes = settings["target_classes"]
    adversary.square.n_queries = settings["square_queries"]
    messages = _listen(adversary)
    devices = [x.device] if x.device.type == "cuda" else []
    # pyautoattack seeds torch's global generators.
    with _dynamic_check_contained(), torch.random.fork_rng(devices=devices):
        # The reshapes inside need the plain memory layout, and half of its tensors are float32.
        plain = x.float().contiguous()
        x_adv, predicted = adversary.run_standard_evaluation(plain, y, batch_size=len(x))
    return x_adv, predicted != y, messages


def note(warnings: dict[str, list[Any]], text: str) -> None:
    """Count a warning in place; those that differ in numbers alone are one, told by the first."""
    kind = re.sub(r"\d+(\.\d+)?", "#", text)
    first, count = warnings.get(kind, (text, 0))
    warnings[kind] = [first, count + 1]


def _first_warnings(settings: dict[str, Any]) -> dict[str, list[Any]]:
    warnings: dict[str, list[Any]] = {}
    missing = [a for a in STANDARD if a not in settings["attacks"]]
    if missing:
        note(
            warnings,
            f"not the standard AutoAttack: {', '.join(missing)} needs {DLR_CLASSES} classes",
        )
    return warnings


def _judge_square(warnings: dict[str, list[Any]], broken: int, count: int) -> None:
    if broken > SQUARE_SHARE * count:
        note(
            warnings,
            f"square: broke {broken} of {count} images that the attacks with gradients could not: "
            "gradients are masked, and the accuracy is likely to be lower still",
        )


def _listen(adversary: Any) -> list[str]:
    """Give the attack a logger of its own; return the list that its warnings go to."""
    messages: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logger = logging.Logger("auto-attack", level=logging.WARNING)
    logger.addHandler(Collect())
    adversary.logger = adversary.apgd.logger = adversary.apgd_targeted.logger = logger
    return messages


@contextmanager
def _dynamic_check_contained() -> Iterator[None]:
    """Start pyautoattack's count of autograd calls from zero, and give back the trace function."""
    from pyautoattack import checks

    tracer = sys.gettrace()
    for name in checks.funcs:
        checks.funcs[name] = 0
    try:
        yield
    finally:
        sys.settrace(tracer)
        for name in checks.funcs:
            checks.funcs[name] = 0


def _flags_to_text(flags: Tensor) -> str:
    return "".join("1" if flag else "0" for flag in flags.tolist())


def _text_to_flags(text: str) -> Tensor:
    return torch.tensor([flag == "1" for flag in text], dtype=torch.bool)
