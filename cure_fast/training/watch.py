"""Watches a run for what wastes its hours: each alarm is a line that says what it saw, and flags.

The first steps show an attack that attacks nothing, one that leaves nothing right, and a network
that learns nothing. Validations show catastrophic overfitting: a network that is trained against
one step withstands that step and nothing else (Wong et al., Fast is better than free, ICLR 2020).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cure_fast.attacks import pgd
from cure_fast.batch import Batch
from cure_fast.classifier import attack_mode
from cure_fast.console import warn
from cure_fast.errors import is_out_of_memory
from cure_fast.evaluation.chance import beats_chance
from cure_fast.losses import cross_entropy, kl_divergence
from cure_fast.step.state import TrainState, Undo

# Numbers of steps after which a batch is looked at; a shorter run is after its last step too.
LOOKS = (50, 100, 200)
# Images of it that are looked at, the first ones.
MOST_IMAGES = 128
# An attack moves predictions by more than this share of what one step of length eps does, in KL,
# which is about the square of a distance: a tenth of the way.
LEAST_MOVE = 0.01
# What it may take from the cross-entropy, as a share of what that step adds: an attack on another
# loss, such as TRADES', takes a little where many predictions are wrong.
MOST_LOSS = 0.1
# "None is right" needs so many images, "no better than chance" so many that chance gets right.
LEAST_IMAGES, LEAST_EXPECTED = 64, 10
# Share of predictions that are of one class where a network tells nothing apart.
NEARLY_ALL = 0.9
# Catastrophic overfitting: points from PGD up to FGSM, and PGD below this share of its best and so
# many points below it: where the best is low, epochs differ by half of it.
GAP, FALLEN, LOST = 20.0, 0.5, 10.0


@dataclass(frozen=True)
class Seen:
    """What the trained network makes of images, in evaluation mode.

    Attributes:
        count: number of images, of ``classes`` classes.
        common: largest number of images with one label.
        predicted: largest number of natural images with one prediction.
        right: natural images that are classified right.
        attacked: images that are right under the training attack; None where that leaves them as
            they are, as in a natural phase.
        losses: mean cross-entropy of natural images, under that attack, and after one step of
            length eps.
        moves: mean KL from natural to attacked predictions, and to those after that one step.
    """

    count: int
    classes: int
    common: int
    predicted: int
    right: int
    attacked: int | None = None
    losses: tuple[float, float, float] = (0.0, 0.0, 0.0)
    moves: tuple[float, float] = (0.0, 0.0)

    @property
    def learnt(self) -> bool:
        """Whether more is right than by chance, and than by naming the commonest class."""
        share = max(1 / self.classes, self.common / self.count)
        return beats_chance(self.right, self.count, share)


def watch_step(run: TrainState, batch: Batch, *, stage: str) -> None:
    """Look at the batch of the step just done where that is due, and print alarms.

    Neither the run nor its random sources are moved.
    """
    ended = run.position == run.total_steps
    if run.step in LOOKS or (ended and run.step < LOOKS[-1]):
        try:
            seen = look(run, batch)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            warn(f"no memory to look at what step {run.step} does; training goes on unwatched")
            return
        for text in alarms(seen, run.step, "--pretrain-lr" if stage == "pretrain" else "--lr"):
            warn(text)


def look(run: TrainState, batch: Batch) -> Seen:
    """Return what the trained network makes of the batch; what passes move is put back."""
    most = min(MOST_IMAGES, run.micro_batch_size or MOST_IMAGES)
    x, y, index = batch.x[:most], batch.y[:most], batch.index[:most]
    part = Batch(x, y, index, notes={name: note[:most] for name, note in batch.notes.items()})
    undo = Undo(run)
    undo.keep()
    try:
        return _look(run, part)
    finally:
        undo.restore()


def _look(run: TrainState, batch: Batch) -> Seen:
    x, y, eps = batch.x, batch.y, run.config.attack.eps
    with torch.no_grad(), attack_mode(run.model, "eval"):
        logits = run.model(x)
    seen = Seen(
        count=len(y),
        classes=logits.shape[1],
        common=int(y.bincount().max()),
        predicted=int(logits.argmax(dim=1).bincount().max()),
        right=_right(logits, y),
    )
    if not run.method.uses_attack:
        return seen
    with attack_mode(run.model, run.config.attack.attack_mode):
        x_adv = run.method.attack(run, batch)
    if torch.equal(x_adv, x):
        return seen

    def objective(logits: Tensor) -> Tensor:
        return cross_entropy(logits, y).sum()

    with attack_mode(run.model, "eval"):
        one = pgd(run.model, x, objective, eps=eps, step_size=eps, steps=1, start="zero")
        with torch.no_grad():
            attacked, stepped = run.model(x_adv), run.model(one)
    natural, robust, fgsm = (
        float(cross_entropy(each, y).mean()) for each in (logits, attacked, stepped)
    )
    return replace(
        seen,
        attacked=_right(attacked, y),
        losses=(natural, robust, fgsm),
        moves=tuple(float(kl_divergence(logits, each).mean()) for each in (attacked, stepped)),
    )


def _right(logits: Tensor, y: Tensor) -> int:
    return int((logits.argmax(dim=1) == y).sum())


def alarms(seen: Seen, steps: int, rate: str) -> list[str]:
    """Return what is wrong after so many steps, a line each; ``rate`` is the learning rate's flag.

    A fresh network is at chance for a while, where an attack adds next to nothing to its loss. So
    the attack is judged once the network has learnt something, and learning at the last look.
    """
    told, at_last = [], steps >= LOOKS[-1]
    if seen.attacked is not None and seen.learnt:
        (natural, attacked, one), (moved, moved_by_one) = seen.losses, seen.moves
        gain, least = attacked - natural, -MOST_LOSS * (one - natural)
        if moved <= LEAST_MOVE * moved_by_one or gain < min(least, 0.0):
            told.append(
                f"after {steps} steps the training attack does not raise the loss of its batch: "
                f"{natural:.4g} on natural images, {attacked:.4g} on attacked ones, {one:.4g} "
                "after one step of length eps; look at --step-size, --attack-steps and --eps"
            )
        elif at_last and not seen.attacked and seen.count >= LEAST_IMAGES:
            told.append(
                f"after {steps} steps none of {seen.count} images of the batch is classified right "
                f"under the training attack, and {seen.right} are without it; look at --eps and "
                f"--step-size, which are in pixel units of [0, 1], and at {rate}"
            )
    by_chance = seen.count / seen.classes
    constant = seen.predicted >= NEARLY_ALL * seen.count and seen.right <= seen.common
    if at_last and (constant or (by_chance >= LEAST_EXPECTED and seen.right <= by_chance)):
        told.append(
            f"after {steps} steps {seen.right} of {seen.count} natural images of the batch are "
            f"classified right{', nearly all as one class' if constant else ''}: no better than "
            f"chance; look at {rate}, at --eps, and at the labels"
        )
    return told


def in_one_step(run: TrainState) -> bool:
    """Return whether the training attack has one step, so that collapse is looked for."""
    return run.method.uses_attack and (run.method.one_step or run.attack_steps == 1)


def collapsed(run: TrainState, validation: dict[str, Any]) -> bool:
    """Return whether a network that was validated shows catastrophic overfitting, and say so.

    Its accuracy under FGSM is then 20 points or more above that under PGD, and that is below half
    of its best so far, by 10 points or more. A first validation never shows it.

    Args:
        run: with the best epochs so far.
        validation: as :func:`.trainer.validated` returns it.
    """
    for file, reached in {"model": validation, **validation.get("networks", {})}.items():
        fgsm, robust, best = reached.get("fgsm"), reached["robust"], run.best.get(file)
        if fgsm is None or best is None or fgsm - robust < GAP:
            continue
        if robust >= FALLEN * best[0] or best[0] - robust < LOST:
            continue
        name = run.result if file == "model" else file
        of = "" if name == "model" else f" of the {name} network"
        warn(
            f"catastrophic overfitting{of} in epoch {run.epoch}, which is not taken as the best: "
            f"{fgsm:.1f} % under FGSM, but {robust:.1f} % under {reached['attack']}, after "
            f"{best[0]:.1f} % in epoch {best[2]}; look at --attack-steps, --step-size and --eps"
        )
        return True
    return False
