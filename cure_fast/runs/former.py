"""Configurations that earlier versions wrote, in the layout of this one."""

from __future__ import annotations

from typing import Any

from cure_fast.config import AttackConfig
from cure_fast.config.checks import check

SECTIONS = ("settings", "attack", "optim", "eval", "run")
RENAMED = {"piat": "piat_nmse"}
# What --engine-without took once.
GONE = "fold"


def upgraded(values: dict[str, Any]) -> dict[str, Any]:
    """Return a stored configuration in today's layout.

    What no version has written stays as it is, to be refused.
    """
    return steps_as_shares(with_policies(values))


def steps_as_shares(values: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration in which the steps that recipes set are shares of the radius."""
    attack, evaluation = values.get("attack"), values.get("eval")
    if not isinstance(attack, dict) or not isinstance(evaluation, dict) or "step_share" in attack:
        return values
    # The default of those versions was the step for their default of eps.
    eps = attack.get("eps", AttackConfig.eps)
    if attack.get("step_size", 2 / 255) == eps * AttackConfig.step_share:
        attack = {**attack, "step_size": None}
    else:
        attack = {"step_size": 2 / 255, **attack}
    if evaluation.get("eval_step_size") == 0.003 and (evaluation.get("eval_eps") or eps) == 8 / 255:
        evaluation = {**evaluation, "eval_step_size": None, "eval_step_share": 0.003 / (8 / 255)}
    return {**values, "attack": attack, "eval": evaluation}


def with_policies(values: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration in the layout of the first version to have policies."""
    # The name of a policy once was a method's too.
    values = {**values, "method": RENAMED.get(values.get("method", ""), values.get("method"))}
    parts = {name: values.get(name) for name in SECTIONS}
    if "policies" in values or not all(isinstance(part, dict) for part in parts.values()):
        return {"policies": {}, **values}
    settings, attack, optim, evaluation, run = (dict(values[name]) for name in SECTIONS)
    decay, milestones = optim.pop("lr_decay", 0.1), optim.get("milestones", ())
    if decay != 0.1:  # Which is what is taken now too.
        check(isinstance(decay, int | float), "lr_decay", decay, "a number")
        check(isinstance(milestones, list), "milestones", milestones, "a list")
        optim["lr_factors"] = [decay ** (place + 1) for place in range(len(milestones))]
    if settings.pop("evaluate_revision", False):
        evaluation["networks"] = ["revision"]
    attack.setdefault("clamp_start", True)
    run.pop("joint_forward", None)
    if isinstance(run.get("engine_without"), list):
        run["engine_without"] = [part for part in run["engine_without"] if part != GONE]
    parts = zip(SECTIONS, (settings, attack, optim, evaluation, run), strict=True)
    return {**values, **dict(parts), "policies": {}}
