"""Configurations that earlier versions wrote, in the layout of this one."""

from __future__ import annotations

from typing import Any

from cure_fast.config.checks import check

SECTIONS = ("settings", "attack", "optim", "eval", "run")
RENAMED = {"piat": "piat_nmse"}
# What --engine-without took once.
GONE = "fold"


def upgraded(values: dict[str, Any]) -> dict[str, Any]:
    """Return a stored configuration in today's layout, which is the first to have policies.

    What no version has written stays as it is, to be refused.
    """
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
