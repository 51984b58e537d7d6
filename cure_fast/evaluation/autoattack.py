"""AutoAttack (Croce and Hein, ICML 2020), version standard, through pyautoattack 0.2.0.

The ensemble runs one attack and one batch at a time on the images that are still robust, which is
what pyautoattack does inside, with the same settings and the same seed for every batch: the result
is equal, and it can be continued, which pyautoattack's own state file cannot (the set of attacks
in it is a string when it is read back). Three things are done around it:

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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any, Literal

import torch
from torch import Tensor

from cure_fast import distributed
from cure_fast.config import Norm
from cure_fast.config.attack_names import attack_name
from cure_fast.evaluation.trust import Guard, check_perturbation
from cure_fast.progress import FEW, Work, duration

# How pyautoattack, and with it results, write the norms.
NORMS: dict[Norm, Literal["Linf", "L2"]] = {"linf": "Linf", "l2": "L2"}
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
    """What AutoAttack left: the images that no attack broke, bool [N], and how many after each."""

    robust: Tensor
    robust_after: dict[str, int]
    seconds: float
    warnings: tuple[str, ...]


def autoattack_settings(
    *, eps: float, norm: Norm = "linf", num_classes: int, batch_size: int, seed: int
) -> dict[str, Any]:
    """Return all that decides the result besides model and images, as JSON types.

    The batch size is one of them: pyautoattack draws its starts for a batch as a whole.
    """
    return {
        "eps": eps,
        "norm": NORMS[norm],
        "version": "standard" if num_classes >= DLR_CLASSES else "not standard",
        "attacks": [a for a in STANDARD if a != "apgd-t" or num_classes >= DLR_CLASSES],
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
    broke: Callable[[Tensor, Tensor], None] = lambda indices, x_adv: None,
    work: Work | None = None,
) -> Outcome:
    """Run the attacks of :func:`autoattack_settings` on the images that are naturally right.

    ``load`` takes indices [n] to images [n, C, H, W] in [0, 1] and labels [n], and ``correct`` says
    which natural images are right, bool [N]. After every batch ``save`` receives a JSON-like
    mapping, and an interrupted call goes on from the last of them, given as ``progress``. Before it
    ``broke`` receives the indices [n] and adversarial images [n, C, H, W] of what was broken.
    ``work`` is told how far the attacks are with each call of the model.
    """
    state = progress
    if state is None:
        entry = flags_to_text(correct)
        state = {"after": {}, "entry": entry, "robust": entry, "batches": 0}
        state |= {"seconds": 0.0, "warnings": {}}
        missing = [a for a in STANDARD if a not in settings["attacks"]]
        if missing:
            text = f"not the standard AutoAttack: {', '.join(missing)} needs {DLR_CLASSES} classes"
            note(state["warnings"], text)
    started = time.perf_counter() - state["seconds"]
    robust = text_to_flags(state["robust"])
    norm: Norm = "l2" if settings["norm"] == NORMS["l2"] else "linf"
    size = settings["batch_size"]
    for attack in [a for a in settings["attacks"] if a not in state["after"]]:
        pending = text_to_flags(state["entry"]).nonzero().flatten()
        batches = pending.split(size) if len(pending) else ()

        def attack_own(attack: str, turn: Sequence[Tensor]) -> list[tuple[Tensor, list[str]]]:
            """Return which images of this process's batch, if any, were broken, and warnings."""
            found = []
            for indices in distributed.own(turn):
                x, y = load(indices)
                guard.at(x, indices, attack)
                last = int(indices[-1])
                held, waiting = int(robust[: int(indices[0])].sum()), int(robust[last + 1 :].sum())
                with counting(guard, work, attack, settings, held, waiting, started):
                    x_adv, broken, told = attack_batch(guard, attack, x, y, settings)
                check_perturbation(x_adv, x, indices, settings["eps"], attack, norm)
                broke(indices[broken.cpu()], x_adv[broken])
                found.append((indices[broken.cpu()], told))
            return found

        while state["batches"] < len(batches):
            turn = batches[state["batches"] :][: distributed.processes()]
            for found in distributed.each(partial(attack_own, attack, turn)):
                for fallen, told in found:
                    robust[fallen] = False
                    for text in told:
                        note(state["warnings"], f"{attack}: {text}")
            seconds = time.perf_counter() - started
            state |= {"robust": flags_to_text(robust), "batches": state["batches"] + len(turn)}
            save(state | {"seconds": seconds})
        fell = len(pending) - int(robust.sum())
        if attack == "square" and fell > SQUARE_SHARE * len(robust):
            note(
                state["warnings"],
                f"square: broke {fell} of {len(robust)} images that the attacks with gradients "
                "could not: gradients are masked, and the accuracy is likely to be lower still",
            )
        state["after"][attack] = int(robust.sum())
        state |= {"entry": flags_to_text(robust), "batches": 0}
        save(state | {"seconds": time.perf_counter() - started})
    warnings = tuple(
        text if count == 1 else f"{text} (and {count - 1} more of the kind)"
        for text, count in state["warnings"].values()
    )
    return Outcome(robust, dict(state["after"]), time.perf_counter() - started, warnings)


def passes_of(attack: str, settings: dict[str, Any]) -> tuple[int, int, int]:
    """Return of an attack its parts, such as target classes, and for one the calls and passes.

    They are those of an image that no part breaks; a gradient is a second pass.
    """
    steps, targets = settings["iterations"], settings["target_classes"]
    return {
        "apgd-ce": (1, steps + 2, 2 * steps + 3),
        "apgd-t": (targets, steps + 2, 2 * steps + 3),
        # A gradient and a look at each new image.
        "fab-t": (targets, 2 * steps, 3 * steps),
        "square": (1, settings["square_queries"], settings["square_queries"]),
    }[attack]


def most_passes(right: float, robust: float, settings: dict[str, Any]) -> float:
    """Return the passes for so many images that are right, of which the first attack leaves some.

    That is the most, if none of those falls to a later attack.
    """
    each = [parts * passes for parts, _, passes in _costs(settings["attacks"], settings)]
    return at_least(right) * each[0] + at_least(robust) * sum(each[1:])


def at_least(images: float) -> float:
    """Return of how many images a call takes the time of, where there are so few."""
    return max(images, FEW) if images else 0


def _costs(attacks: Sequence[str], settings: dict[str, Any]) -> list[tuple[int, int, int]]:
    return [passes_of(attack, settings) for attack in attacks]


@contextmanager
def counting(
    guard: Guard,
    work: Work | None,
    attack: str,
    settings: dict[str, Any],
    held: int,
    waiting: int,
    started: float,
) -> Iterator[None]:
    """Tell ``work`` of each call of the model in the block, an attack on one batch.

    Of the other batches ``held`` images withstood the attack and ``waiting`` ones come later.
    """
    if work is None:
        yield
        return
    attacks = settings["attacks"]
    number = attacks.index(attack)
    parts, calls, passes = passes_of(attack, settings)
    later = sum(n * p for n, _, p in _costs(attacks[number + 1 :], settings))
    word = {"apgd-ce": "iteration", "square": "query"}.get(attack, "target")
    called = 0

    def count(_guard: Guard, inputs: tuple[Tensor], _logits: Tensor) -> None:
        nonlocal called
        called += 1
        n = len(inputs[0])
        most = parts if parts > 1 else calls
        at = min(most, 1 + called // calls if parts > 1 else called)
        place = f"{attack_name(attack)} ({number + 1} of {len(attacks)}), {word} {at:,} of {most:,}"
        note = f": {place}, images left: {held + n + waiting:,}, "
        derived = torch.is_grad_enabled() and inputs[0].requires_grad
        taken = at_least(n) * (2 if derived else 1)
        rest = at_least(n) * max(0.0, 1 - called / (parts * calls)) * parts * passes
        rest += at_least(waiting) * parts * passes + at_least(held + n + waiting) * later
        work.expect(taken + rest)
        work.advance(taken, note + duration(time.perf_counter() - started))

    hook = guard.register_forward_hook(count)
    try:
        yield
    finally:
        hook.remove()


def attack_batch(
    guard: Guard, attack: str, x: Tensor, y: Tensor, settings: dict[str, Any]
) -> tuple[Tensor, Tensor, list[str]]:
    """Run one attack of :data:`STANDARD` on images [N, C, H, W] and labels [N].

    Returns the images, unchanged where it failed; which it broke, bool [N]; and its warnings.
    """
    from pyautoattack import AutoAttack, checks

    adversary = AutoAttack(
        guard,
        attacks=[attack],  # pyright: ignore[reportArgumentType]
        device=x.device,
        eps=settings["eps"],
        norm=settings["norm"],
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
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.Logger("auto-attack", level=logging.WARNING)
    logger.addHandler(handler)
    adversary.logger = adversary.apgd.logger = adversary.apgd_targeted.logger = logger
    tracer, no_calls = sys.gettrace(), dict.fromkeys(checks.funcs, 0)
    checks.funcs.update(no_calls)
    devices = [x.device] if x.device.type == "cuda" else []
    try:
        # pyautoattack seeds torch's global generators.
        with torch.random.fork_rng(devices=devices):
            # The reshapes inside need the plain memory layout, and half of its tensors are float32.
            plain = x.float().contiguous()
            x_adv, predicted = adversary.run_standard_evaluation(plain, y, batch_size=len(x))
    finally:
        sys.settrace(tracer)
        checks.funcs.update(no_calls)
    return x_adv, predicted != y, messages


def note(warnings: dict[str, list[Any]], text: str) -> None:
    """Count a warning in place; those that differ in numbers alone are one, told by the first."""
    kind = re.sub(r"\d+(\.\d+)?", "#", text)
    first, count = warnings.get(kind, (text, 0))
    warnings[kind] = [first, count + 1]


def flags_to_text(flags: Tensor) -> str:
    """Return flags [N] as a text of N digits."""
    return "".join("1" if flag else "0" for flag in flags.tolist())


def text_to_flags(text: str) -> Tensor:
    """Return the flags, bool [N], that :func:`flags_to_text` wrote."""
    return torch.tensor([flag == "1" for flag in text], dtype=torch.bool)
