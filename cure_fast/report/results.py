"""The results in full: bars, counts and intervals, the paper's row, each attack's settings."""

from __future__ import annotations

import math
from typing import Any

from cure_fast.config.checks import format_pixel
from cure_fast.config.values import to_dict
from cure_fast.evaluation.attack_result import AttackResult, nrr
from cure_fast.methods import labels
from cure_fast.models import MODELS
from cure_fast.policies import POLICIES
from cure_fast.recipes import RECIPES, published_recipe
from cure_fast.report.html import Html, code, element, figure, join, paragraph, section, table
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
        "eps": "training eps",
        "norm": "norm of the training eps",
        "step_size": "training attack's step size",
        "attack_steps": "training attack's steps",
        "start": "training attack's start",
        "clamp_start": "clamping of the training attack's start",
        "attack_mode": "BatchNorm in the training attack",
        "attack_ramp": "ramp of the training attack",
    },
    "optim": {"epochs": "epochs", "batch_size": "batch size", "lr": "learning rate"},
}
# These words stand for None, which takes all or the published value.
UNSET = {"train_images": "all", "width": "the published one", "init_from": "none"}


def results_section(record: Record) -> Html:
    """Return the section with all results on test images."""
    title, anchor = "Results on test images", "results"
    results = record.results
    if results is None:
        reason = "results.json is not in this folder: no evaluation on test images has finished. "
        advice = paragraph(reason, code("cure-fast eval"), " does that.", class_="absent")
        return section(title, advice, anchor=anchor)
    parts = [_bars(results), _table(results), *_paper_note(record, results), _attacks(results)]
    return section(title, *parts, anchor=anchor)


def _paper_value(results: Results, attack: str) -> float | None:
    value = (results.paper or {}).get(attack)
    return float(value) if isinstance(value, int | float) else None


def _bars(results: Results) -> Html:
    """Return one group of bars per attack: each model's, and the paper's."""
    groups = []
    for attack in results.attacks:
        bars = []
        for key in results.keys:
            score = results.models[key].attacks.get(attack)
            if score:
                low, high = wilson(score.correct, score.count)
                text = [percent(score), *([] if score.reliable else [_doubt()])]
                bars.append(_bar(results.name(key), key, score.accuracy, text, (low, high)))
        paper = _paper_value(results, attack)
        if paper is not None:
            bars.append(_bar("paper", "paper", paper, [f"{paper:.2f} %"], None))
        heading = element("h4", attack_name(attack))
        groups.append(element("div", heading, *bars, class_="bar-group"))
    paper_text = ", the paper's claim hatched" if results.paper else ""
    caption = (
        f"Accuracy in percent{paper_text}. The thin line on a bar is the 95 % interval that the "
        "number of test images leaves open."
    )
    body = element("div", *groups, class_="bars")
    return figure("Accuracy by attack", caption, body, class_="wide")


def _doubt() -> Html:
    """Return the warning sign that marks a number, and its word for those who hear the page."""
    sign = element("span", " \N{WARNING SIGN}", class_="flag", title="unreliable")
    return join([sign, element("span", " unreliable", class_="spoken")])


def _bar(
    name: str, style: str, value: float, text: list[str], spread: tuple[float, float] | None
) -> Html:
    parts = [element("span", class_=f"fill {style}", style=f"width:{value:.2f}%")]
    if spread:
        width = spread[1] - spread[0]
        place = f"left:{spread[0]:.2f}%;width:{width:.2f}%"
        parts.append(element("span", class_="spread", style=place))
    return element(
        "div",
        element("span", name, class_="bar-name"),
        element("span", *parts, class_="track", aria_hidden="true"),
        element("span", *text, class_="bar-value"),
        class_="bar",
    )


def _table(results: Results) -> Html:
    """Return the table of accuracies: a row per attack, a column per model, and the paper's."""
    start, last = results.models.get("start"), results.models.get("last")
    keys, ours = results.keys, results.name("trained").capitalize()
    header = ["Attack", *(results.models[k].title for k in keys)]
    if last:
        # Negative where training went on for too long: robust overfitting.
        header.append("Last \N{MINUS SIGN} best epoch")
    if start:
        header.append(f"{ours} \N{MINUS SIGN} start")
    if results.paper:
        header += [results.paper["row"], f"{ours} \N{MINUS SIGN} paper"]
    rows: list[list[str]] = []

    def add(cells: list[str], over_best: str, over_start: str, paper: str, over_paper: str) -> None:
        row = cells + ([over_best] if last else []) + ([over_start] if start else [])
        rows.append(row + ([paper, over_paper] if results.paper else []))

    for attack in results.attacks:
        scores = {k: results.models[k].attacks.get(attack) for k in keys}
        cells = [_score_cell(score, results.test_images) for score in scores.values()]
        paper = _paper_value(results, attack)
        add(
            [attack_name(attack), *cells],
            difference(scores.get("last"), scores["trained"]),
            difference(scores["trained"], scores.get("start")),
            "not given" if paper is None else f"{paper:.2f} %",
            difference(scores["trained"], paper),
        )
    for name in dict.fromkeys(n for k in keys for n in results.models[k].nrr):
        values = {k: results.models[k].nrr.get(name) for k in keys}
        attack = {"AA": "aa"}.get(name, "natural")
        cells = [
            _nrr_cell(values[k], results.models[k].attacks.get(attack), results.test_images)
            for k in keys
        ]
        paper = _paper_nrr(results, name)
        add(
            [f"NRR ({name})", *cells],
            _between(values.get("last"), values["trained"]),
            _between(values["trained"], values.get("start")),
            "not given" if paper is None else f"{paper:.1f} %",
            _between(values["trained"], paper),
        )
    caption = (
        f"Accuracy on test images within {results.radius}: right images of all, "
        "and the 95 % interval (Wilson) in percent; differences in points"
    )
    return table(header, rows, caption=caption, class_="results")


def _score_cell(score: AttackResult | None, test_images: int) -> Html | str:
    if score is None:
        return "not run"
    part = "" if score.count == test_images else ", a part of the test images"
    lines = [
        element("strong", percent(score)),
        element("span", f"{score.correct:,} of {score.count:,}{part}", class_="small"),
        element("span", f"95 %: {interval(score)}", class_="small"),
    ]
    if not score.reliable:
        lines.append(element("span", "\N{WARNING SIGN} unreliable", class_="flag"))
    return join(lines)


def _nrr_cell(value: float | None, score: AttackResult | None, test_images: int) -> str:
    """Return a ratio, and on which images it was taken where these are not all."""
    if value is None:
        return ""
    if score is None or score.count == test_images:
        return f"{value:.1f} %"
    return f"{value:.1f} % on the first {score.count:,} images"


def _between(ours: float | None, theirs: float | None) -> str:
    return "" if ours is None or theirs is None else points(ours - theirs)


def _paper_nrr(results: Results, name: str) -> float | None:
    """Return the harmonic mean of the paper's natural and robust accuracy."""
    natural = _paper_value(results, "natural")
    robust = _paper_value(results, {"C&W": "cw20", "AA": "aa"}[name])
    return None if natural is None or robust is None else nrr(natural, robust)


def _paper_note(record: Record, results: Results) -> list[Html]:
    """Return what stands between this run and the paper's row."""
    if results.paper is None:
        text = "The paper gives no result for this combination of data set and model."
        return [paragraph(text, class_="remark")]
    config = record.config
    setting = f"{data_name(config['data']['data'])}, {config['model']['model']}"
    text = (
        "The paper's row is its own claim, not measured here. It can only be compared where data "
        f"set, model and all test images are the same. This run: {setting}, "
        f"{results.test_images:,} test images, {results.radius}."
    )
    obstacles = differences(config, results)
    if obstacles:
        text += f" Not comparable as it stands: {'; '.join(obstacles)}."
    held_out = config["data"].get("val_images")
    if held_out is not None:
        text += f" {held_out:,} training images were held out to pick the best epoch."
    return [paragraph(text, class_="remark")]


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
    if name == "init_from":
        return str(value).rstrip("/").rsplit("/", 1)[-1]
    return f"{value:,}" if name == "train_images" else setting(name, value)


def _attacks(results: Results) -> Html:
    """Return how each attack was run; models share a row where their settings are equal."""
    rows: list[list[str]] = []
    for attack in results.attacks:
        groups: dict[tuple[str, str], list[str]] = {}
        for key, model in results.models.items():
            score = model.attacks.get(attack)
            if score:
                shown = (settings(score.settings), score.precision)
                groups.setdefault(shown, []).append(
                    f"{results.name(key)} {duration(score.seconds)}"
                )
        rows += [
            [attack_name(attack), shown, precision, ", ".join(models)]
            for (shown, precision), models in groups.items()
        ]
    header = ["Attack", "Settings", "Precision", "Time"]
    return table(header, rows, caption="How each attack was run", class_="texts")


def how_to_read(record: Record) -> Html:
    """Return the paragraph for readers who meet these numbers for the first time."""
    eps = record.results.eps if record.results else record.config["attack"]["eps"]
    ball = (
        f"the image by up to eps = {format_pixel(eps)} in L2, the root of the sum of the squared "
        "changes of all its pixels, each from 0 to 1"
        if record.results and record.results.norm == "l2"
        else f"every pixel by up to eps = {format_pixel(eps)} of the full range from 0 to 1 (an "
        "L-inf ball)"
    )
    items = {
        "Natural": "the share of unchanged test images that the model classifies right.",
        "Under attack": "an image counts as right only if the model is right on the natural image "
        f"and on the attacked one. The attack may change {ball}, and it sees the model's weights.",
        "PGD-k, C&W-k": "k steps uphill on the cross-entropy, or on the margin between the best "
        "wrong class and the right one.",
        "AutoAttack": "four attacks in a row, one of them without gradients. It is the strictest "
        "test here; where it was run on fewer images, compare its count.",
        "NRR": "the harmonic mean of natural and robust accuracy: high only if both are.",
        "Intervals": "say how far a share moves by the choice of test images alone. Another seed "
        "moves it too; one run does not show by how much.",
    }
    entries = [part for k, v in items.items() for part in (element("dt", k), element("dd", v))]
    return section("How to read this", element("dl", *entries), anchor="how-to-read")
