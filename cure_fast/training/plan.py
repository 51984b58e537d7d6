"""What a job will do and what it will cost, known before it begins."""

from __future__ import annotations

from functools import partial
from statistics import median

import torch

from cure_fast import distributed
from cure_fast.config import Config
from cure_fast.config.attack_names import attack_name, parse_attack
from cure_fast.console import say, warn
from cure_fast.evaluation.results import attack_part, plan_attacks
from cure_fast.methods import find_method, labels, result_of
from cure_fast.models import MODELS, ImageClassifier
from cure_fast.progress import Part, Progress
from cure_fast.runs.environment import multiplies_bf16
from cure_fast.runs.threads import pace
from cure_fast.training.data import Data
from cure_fast.training.opening import epochs_of
from cure_fast.training.passes import epoch_costs
from cure_fast.training.stages import natural_stage

# Trials of each precision.
TURNS = 3
# Training of so many seconds, by its passes in float32, is told of bfloat16 where that takes at
# most so much of a pass's time.
LONG_S, WORTH = 600.0, 0.7


def plan_job(progress: Progress, config: Config, data: Data) -> None:
    """Add the stages of a job and the cost of their parts."""
    label, epochs = labels(config.method, config.policies), config.optim.epochs
    keys = ["trained"]
    if config.model.init_from is None and config.pretrain.pretrain_epochs:
        staged = natural_stage(config)
        progress.stages.append(f"natural training, {epochs_of(staged.optim.epochs)}")
        plan_training(progress, "pretrain", staged, data)
    if progress.stages or config.model.init_from is not None:
        keys.append("start")
    progress.stages.append(f"{label}, {epochs_of(epochs)}")
    plan_training(progress, "train", config, data)
    keys += ["last"] * ({"best", "last"} <= set(config.eval.evaluate))
    attacks = ", ".join(attack_name(attack) for attack in config.eval.attacks)
    progress.stages.append(f"attacks on the test images: {attacks}")
    for key in [*keys, *config.eval.networks]:
        falls = key == "start" and config.model.init_from is None
        plan_attacks(progress, key, config.eval, data.test, falls=falls)


def time_passes(
    progress: Progress,
    config: Config,
    model: ImageClassifier,
    number: int,
    image_size: int,
    resume: bool,
) -> None:
    """Time passes on the CPU with so many threads; tell a run that begins if bfloat16 is quicker.

    That depends on processor and network: on one with instructions for it a ResNet-18 takes 0.45
    of float32's time, a vit-tiny 2.0.
    """
    timed = partial(pace, model, number, image_size=image_size, batch_size=config.optim.batch_size)
    full = half = timed() / distributed.processes()
    passes = sum(part.left for part in progress.parts.values() if part.kind == "train")
    asked, ours = config.run.amp == "bf16", config.model.model in MODELS
    free = config.run.amp == "auto" and not resume and ours and passes * full > LONG_S
    if asked or (free and multiplies_bf16()):
        # In turns, as a processor's speed changes.
        turns = [(timed(), timed(dtype=torch.bfloat16)) for _ in range(TURNS)]
        full, half = (median(each) / distributed.processes() for each in zip(*turns, strict=True))
    progress.paces = {"train": half if asked else full, "attack": full}
    if not asked and half < WORTH * full:
        say(
            f"precision: float32; with --amp bf16, as on GPUs, a pass would take {half / full:.2f} "
            "times as long on this processor"
        )


def plan_training(progress: Progress, name: str, config: Config, data: Data) -> None:
    """Add the training stage that is announced last, and its validations."""
    method, evaluation, epochs = find_method(config.method), config.eval, config.optim.epochs
    number = len(progress.stages)
    try:
        costs = epoch_costs(config)
    except Exception as error:  # times are no reason to end a run
        warn(f"the cost of a step cannot be counted, so times left are rough: {error!r}")
        costs = [3.0 + 2 * config.attack.attack_steps * method.uses_attack] * epochs
    progress.plan(name, Part("train", costs, len(data.train), number))
    attacks = ["natural"]
    if method.uses_attack:
        attacks.append(f"pgd{evaluation.val_attack_steps}")
    if method.one_step:
        attacks.append("fgsm")
    for network in {"model", result_of(config), *evaluation.networks} - {"raw"}:
        for attack in attacks:
            part = attack_part(parse_attack(attack), len(data.val), number)
            due = [e == epochs or e % evaluation.val_every == 0 for e in range(1, epochs + 1)]
            part.costs = [part.costs[0] * measured for measured in due]
            progress.plan(f"{name}/{network}/{attack}", part)
