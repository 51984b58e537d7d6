"""What a job will do and what it will cost, known before it begins."""

from __future__ import annotations

from cure_fast.config import Config
from cure_fast.config.attack_names import attack_name, parse_attack
from cure_fast.console import warn
from cure_fast.evaluation.results import attack_part, plan_attacks
from cure_fast.methods import find_method, labels, result_of
from cure_fast.progress import Part, Progress
from cure_fast.training.data import Data
from cure_fast.training.opening import epochs_of
from cure_fast.training.passes import epoch_costs
from cure_fast.training.stages import natural_stage


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
