"""The results in full: bars, counts and intervals, the paper's row, each attack's settings."""

from __future__ import annotations

import math
from typing import Any

from cure_fast.config.values import to_dict
from cure_fast.evaluation.attack_result import nrr
from cure_fast.methods import labels
from cure_fast.models import MODELS
from cure_fast.policies import POLICIES
from cure_fast.recipes import RECIPES, published_recipe
from cure_fast.report.record import Record, Results
from cure_fast.report.text import (
    attack_name,
    data_name,
    difference,
    distance,
    interval,
    percent,
    points,
    setting,
    settings,
    wilson,
)
from cure_fast.runs.log import duration

# Two radii of an attack count as one below this difference, in pixel units.
EPS_SLACK = 1e-6
# What decides the trained weights, by group of the configuration, and its name in plain words.
DECISIVE = {
    "data": {
        "train_images": "training images",
        "aux": "generated images",
        "aux_share": "their share of a batch",
        "augment": "augmentation",
        "crop_padding": "padding of the random crop",
        "crop_mode": "border of the random crop",
        "flip": "mirrored training images",
    },
    "model": {
        "width": "width of the network",
        "stem": "first layer",
        "normalize": "normalisation",
        "init_from": "first weights from",
    },
    "pretrain": {
        "pretrain_epochs": "epochs of natural pre-training",
        "pretrain_lr": "its learning rate",
        "pretrain_weight_decay": "its weight decay",
        "pretrain_schedule": "its schedule",
    },
    "attack": {
        "norm": "norm of the training eps",
        "eps": "training eps",
        "step_size": "training attack's step size",
        "attack_steps": "training attack's steps",
        "start": "training attack's start",
        "clamp_start": "clamping of the training attack's start",
        "attack_mode": "BatchNorm in the training attack",
        "attack_ramp": "ramp of the training attack",
    },
    "optim": {"epochs": "epochs", "batch_size": "batch size", "lr": "learning rate"},
}
# What the settings of AutoAttack hold of its result, which the waterfall shows.
OF_THE_NETWORK = {"robust_after", "natural_correct"}
# These words stand for None, which takes all or the published value.
UNSET = {"train_images": "all", "width": "the published one", "init_from": "none"}


def results_section(record: Record) -> dict[str, Any] | None:
    """Return what the section on results shows; None where there are none."""
    results, config = record.results, record.config
    if results is None:
        return None
    held_out = config["data"].get("val_images")
    return {
        "groups": attack_groups(results, record.label),
        "ratios": ratio_groups(results, record.label),
        "networks": [results.models[key].title for key in results.keys],
        "waterfall": waterfalls(results, record.label),
        "radius": results.radius,
        "paper": results.paper and results.paper["row"],
        "obstacles": differences(config, results) if results.paper else [],
        "setting": f"{data_name(config['data']['data'])}, {config['model']['model']}",
        "images": f"{results.test_images:,}",
        "held_out": None if held_out is None else f"{held_out:,}",
        "attacks": attack_rows(results, record.label),
    }


def paper_value(results: Results, attack: str) -> float | None:
    """Return what the paper claims under an attack, in percent."""
    value = (results.paper or {}).get(attack)
    return float(value) if isinstance(value, int | float) else None


def bar(name: str, style: str, value: float, text: str, **further: Any) -> dict[str, Any]:
    """Return a bar of ``value`` percent; what it lacks is empty."""
    empty = {"low": None, "high": None, "lost": 0.0, "detail": "", "difference": ""}
    known = {"name": name, "style": style, "value": value, "text": text, "reliable": True}
    return {**empty, **known, **further}


def paper_bar(value: float | None, digits: int, gap: str) -> dict[str, Any]:
    """Return the bar of what the paper claims, in percent, and how far this run lies from it."""
    text = "not given" if value is None else f"{value:.{digits}f} %"
    return bar(
        "paper\N{RIGHT SINGLE QUOTATION MARK}s claim", "paper", value or 0.0, text, difference=gap
    )


def compared_with(key: str) -> tuple[str, str]:
    """Return the network that a network's difference is taken from, and its words."""
    return ("trained", "the best epoch") if key == "last" else ("start", "the start")


def attack_groups(results: Results, label: str) -> list[dict[str, Any]]:
    """Return a group of bars for each attack: each network's, and the paper's."""
    groups = []
    for attack in results.attacks:
        scores = {key: results.models[key].attacks.get(attack) for key in results.keys}
        counts = {score.count for score in scores.values() if score}
        bars = []
        for key, score in scores.items():
            if score is None:
                continue
            low, high = wilson(score.correct, score.count)
            base, other = compared_with(key)
            gap = "" if key == base else difference(score, scores.get(base))
            bars.append(
                bar(
                    results.name(key, label),
                    key,
                    score.accuracy,
                    percent(score),
                    low=low,
                    high=high,
                    reliable=score.reliable,
                    detail=f"{score.correct:,} of {score.count:,}; 95 %: {interval(score)}",
                    difference=gap and f"{gap} from {other}",
                )
            )
        if results.paper:
            paper = paper_value(results, attack)
            gap = difference(scores["trained"], paper)
            bars.append(paper_bar(paper, 2, gap and f"{label}: {gap}"))
        part = counts != {results.test_images}
        note = f"first {' or '.join(f'{c:,}' for c in sorted(counts))} of the " if part else ""
        note += f"{results.test_images:,} test images"
        groups.append({"title": attack_name(attack), "note": note, "bars": bars})
    return groups


def ratio_groups(results: Results, label: str) -> list[dict[str, Any]]:
    """Return a group of bars for each harmonic mean of natural and robust accuracy."""
    groups = []
    for name in dict.fromkeys(n for key in results.keys for n in results.models[key].nrr):
        values = {key: results.models[key].nrr.get(name) for key in results.keys}
        bars = []
        for key, value in values.items():
            if value is not None:
                base, other = compared_with(key)
                theirs = values.get(base) if key != base else None
                gap = "" if theirs is None else f"{points(value - theirs)} from {other}"
                text = f"{value:.1f} %"
                bars.append(bar(results.name(key, label), key, value, text, difference=gap))
        if results.paper:
            paper, ours = paper_nrr(results, name), values["trained"]
            gap = "" if ours is None or paper is None else f"{label}: {points(ours - paper)}"
            bars.append(paper_bar(paper, 1, gap))
        score = results.models["trained"].attacks.get({"AA": "aa"}.get(name, "natural"))
        part = score is not None and score.count != results.test_images
        note = f"on the first {score.count:,} images" if score is not None and part else ""
        groups.append({"title": f"NRR ({name})", "note": note, "bars": bars})
    return groups


def paper_nrr(results: Results, name: str) -> float | None:
    """Return the harmonic mean of the paper's natural and robust accuracy."""
    natural = paper_value(results, "natural")
    robust = paper_value(results, {"C&W": "cw20", "AA": "aa"}[name])
    return None if natural is None or robust is None else nrr(natural, robust)


def waterfalls(results: Results, label: str) -> list[dict[str, Any]]:
    """Return for each network the bars of what natural accuracy is left after each sub-attack."""
    groups = []
    for key in results.keys:
        score = results.models[key].attacks.get("aa")
        after = score.settings.get("robust_after") if score else None
        natural = score.settings.get("natural_correct") if score else None
        if score is None or not isinstance(after, dict) or not isinstance(natural, int):
            continue
        bars, before = [], natural
        for name, left in {"natural": natural, **after}.items():
            if not isinstance(left, int) or not 0 <= left <= before <= score.count:
                bars = []
                break
            share, fell = 100 * left / score.count, before - left
            bars.append(
                bar(
                    f"after {attack_name(name)}" if bars else "Natural",
                    key,
                    share,
                    f"{left:,}",
                    lost=100 * fell / score.count,
                    difference=f"\N{MINUS SIGN}{fell:,}" if fell else "",
                )
            )
            before = left
        if bars:
            note = f"of {score.count:,} images"
            groups.append({"title": results.name(key, label), "note": note, "bars": bars})
    return groups


def differences(config: dict[str, Any], results: Results) -> list[str]:
    """Return what makes a run another experiment than the recipe for its row of the paper.

    There is one entry per difference in plain words, with the run's value and the recipe's. What an
    older configuration lacks is not compared. Without a recipe for the data set and model, only
    attacks on fewer images are listed.
    """
    recipe = _recipe(config)
    found = [] if recipe is None else _other_settings(config, recipe)
    eps = None if recipe is None else recipe["eval"]["eval_eps"] or recipe["attack"]["eps"]
    if eps is not None and abs(results.eps - eps) > EPS_SLACK:
        found.append(f"eps of the evaluation {distance(results.eps)} instead of {distance(eps)}")
    for score in results.models["trained"].attacks.values():
        if score.count != results.test_images:
            found.append(f"{attack_name(score.attack)} on {score.count:,} test images only")
    return found


def _recipe(config: dict[str, Any]) -> dict[str, Any] | None:
    """Return the recipe for the configuration's data set and model as plain values."""
    pair = (config["data"]["data"], config["model"]["model"])
    if own := published_recipe("-".join((config["method"].replace("_", "-"), *pair))):
        return to_dict(own.config)
    recipes = (to_dict(recipe.config) for recipe in RECIPES.values())
    return next((r for r in recipes if (r["data"]["data"], r["model"]["model"]) == pair), None)


def _with_steps(*attacks: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """Return attacks with the lengths of their steps, unless they are the same share of eps."""
    shares = {a.get("step_share") if a.get("step_size") is None else None for a in attacks}
    if len(shares) == 1 and None not in shares:
        return attacks
    return tuple(
        {**a, "step_size": a["eps"] * a["step_share"]}
        if a.get("step_size") is None and "step_share" in a
        else a
        for a in attacks
    )


def _other_settings(config: dict[str, Any], recipe: dict[str, Any]) -> list[str]:
    """Return each decisive setting in which the configuration differs from the recipe."""
    method, usual = config["method"], recipe["method"]
    found = []
    if method != usual:
        found.append(f"method {labels(method)} instead of {labels(usual)}")
    ours, theirs = config.get("policies") or {}, recipe["policies"]
    if ours != theirs:
        found.append(f"policies {_policies(ours)} instead of {_policies(theirs)}")
    for group in ("settings", "model", "attack", "pretrain", "optim", "data"):
        ours, theirs, words = config.get(group, {}), recipe[group], DECISIVE.get(group, {})
        if group == "attack":
            ours, theirs = _with_steps(ours, theirs)
        # All of a method's and the optimiser's settings decide; of data, not how it is fed.
        whole = group in ("settings", "optim")
        if group == "settings" and not method.startswith(usual):
            continue
        if group == "pretrain" and config["model"].get("init_from") is not None:
            continue
        for name in [n for n in (theirs if whole else words) if n in ours]:
            if name == "width" and ours[name] == MODELS[config["model"]["model"]].default_width:
                continue  # The published width, written out.
            pair = (ours[name], theirs[name])
            numbers = all(isinstance(value, int | float) for value in pair)
            # A number is stored with some rounding.
            same = math.isclose(*pair, rel_tol=1e-9) if numbers else pair[0] == pair[1]
            if not same:
                values = (_value(name, value) for value in pair)
                found.append(
                    f"{words.get(name, name.replace('_', ' '))} {' instead of '.join(values)}"
                )
            if name == "pretrain_epochs" and not ours[name]:
                break  # A stage that was skipped has no rate or schedule.
    return found


def _policies(chosen: dict[str, dict[str, Any]]) -> str:
    """Return policies with those of their settings that are not the default."""
    told = []
    for name, values in chosen.items():
        usual = to_dict(POLICIES[name].settings) if name in POLICIES else {}
        other = {key: value for key, value in values.items() if value != usual.get(key)}
        label = POLICIES[name].label if name in POLICIES else name
        told.append(f"{label} ({settings(other)})" if other else label)
    return ", ".join(told) or "none"


def _value(name: str, value: Any) -> str:
    """Return a setting's value; of a path its last part, for a count its thousands."""
    if value is None:
        return UNSET.get(name, "none")
    if name in ("init_from", "aux"):
        return str(value).rstrip("/").rsplit("/", 1)[-1]
    return f"{value:,}" if name == "train_images" else setting(name, value)


def attack_rows(results: Results, label: str) -> list[dict[str, Any]]:
    """Return how each attack was run; networks share a row where their settings are equal."""
    rows = []
    for attack in results.attacks:
        groups: dict[tuple[str, str], list[str]] = {}
        for key in results.keys:
            if score := results.models[key].attacks.get(attack):
                own = {k: v for k, v in score.settings.items() if k not in OF_THE_NETWORK}
                shown = (settings(own), score.precision)
                took = f"{results.name(key, label)} {duration(score.seconds)}"
                groups.setdefault(shown, []).append(took)
        rows += [
            {"attack": attack_name(attack), "settings": shown, "precision": precision}
            | {"times": ", ".join(times)}
            for (shown, precision), times in groups.items()
        ]
    return rows
