"""The top of the page: what was trained, on what, and how well it does."""

from __future__ import annotations

import re
from typing import Any

from cure_fast.config.attack_names import parse_attack
from cure_fast.config.checks import format_radius
from cure_fast.evaluation.attack_result import AttackResult
from cure_fast.report.html import Html, bullets, callout, code, element, join, paragraph
from cure_fast.report.record import ModelScores, Record, Results
from cure_fast.report.text import attack_name, data_name, difference, percent
from cure_fast.runs.log import duration


def answer(record: Record) -> Html:
    """Return the head of the page."""
    config = record.config
    title = f"{record.label} on {data_name(config['data']['data'])}"
    parts = [
        element("p", "cure-fast report", class_="eyebrow"),
        element("h1", title),
        element("p", _setting_line(config), class_="meta"),
        element("p", *_lead(record), class_="lead"),
    ]
    if record.results is None:
        parts.append(_unfinished(record))
    else:
        parts += [_tiles(record.results), _warnings(record.results)]
    return element("header", *parts)


def _setting_line(config: dict[str, Any]) -> str:
    model = config["model"]
    width = f", width {model['width']}" if model.get("width") is not None else ""
    seed = config.get("run", {}).get("seed")
    parts = [f"{model['model']}{width}", f"recipe {config['name']}"]
    attack = config["attack"]
    parts.append(f"training {format_radius(attack['eps'], attack.get('norm', 'linf'))}")
    parts += [] if seed is None else [f"seed {seed}"]
    return " \N{MIDDLE DOT} ".join(parts)


def strongest(scores: ModelScores) -> AttackResult | None:
    """Return the score that the first sentence quotes: the longest PGD, else any other attack."""
    others = [name for name in scores.attacks if name != "natural"]
    pgd = [name for name in others if re.fullmatch(r"pgd\d+", name)]
    name = max(pgd, key=lambda name: parse_attack(name).steps, default=others[0] if others else "")
    return scores.attacks.get(name)


def _images(score: AttackResult, results: Results) -> str:
    """Return which test images a score counts."""
    if score.count == results.test_images:
        return f"the {score.count:,} test images"
    return f"{score.count:,} of the {results.test_images:,} test images"


def _lead(record: Record) -> list[str]:
    """Return the answer in a few sentences, as text and markup in order."""
    if record.results is None:
        return _lead_unfinished(record)
    results = record.results
    trained, start = results.models["trained"], results.models.get("start")
    natural, robust = trained.attacks.get("natural"), strongest(trained)
    parts: list[str] = ["The trained model ("]
    parts += [trained.title, ") classifies "]
    if natural:
        parts += [element("strong", percent(natural)), f" of {_images(natural, results)} right"]
    if robust:
        where = f"under {attack_name(robust.attack)} within {results.radius}"
        parts += [" and still " if natural else "", element("strong", percent(robust)), f" {where}"]
    parts.append(". ")
    if start:
        theirs = [start.attacks.get(s.attack) for s in (natural, robust) if s]
        shown = [element("strong", percent(score)) for score in theirs if score]
        if shown:
            parts += [f"Before, the {start.title} had ", Html(" and ".join(shown)), "."]
    else:
        parts.append("There is no naturally trained start to compare with in this run.")
    return parts


def progress_line(record: Record) -> str:
    """Return how far training got, and how long it took."""
    done, planned = len(record.stage("train")), record.config["optim"]["epochs"]
    seconds = sum(row.seconds or 0.0 for row in record.stage("train"))
    took = f" in {duration(seconds)}" if seconds else ""
    return f"{done} of {planned} epochs{took}"


def _lead_unfinished(record: Record) -> list[str]:
    best = record.best
    if best is None or best.natural is None:
        return ["There is no result on test images yet, and no epoch has been validated."]
    parts: list[str] = [
        "There is no result on test images yet. ",
        f"The best epoch so far, {best.epoch}, reaches ",
        element("strong", f"{best.natural:.1f} %"),
        " natural",
    ]
    if best.robust is not None:
        attack = attack_name(best.attack or "the attack")
        parts += [" and ", element("strong", f"{best.robust:.1f} %"), f" {attack} accuracy"]
    else:
        parts.append(" accuracy")
    if best.network is not None:
        parts.append(f" of its {best.network} network")
    held_out = "the" if best.count is None else f"{best.count:,}"
    return [*parts, f" on {held_out} validation images, held out of the training set."]


def _unfinished(record: Record) -> Html:
    done, planned = len(record.stage("train")), record.config["optim"]["epochs"]
    if done < planned:
        title = f"Training is not finished: {progress_line(record)}"
        what, command = "Continue", "cure-fast train RUN --resume"
    else:
        title = f"Training is finished ({progress_line(record)}), but it is not evaluated"
        what, command = "Evaluate", "cure-fast eval RUN"
    text = f"results.json is not in this folder. {what} it with "
    return callout("note", title, paragraph(text, code(command), ", RUN being this folder."))


def _tiles(results: Results) -> Html:
    """Return one tile per attack: the trained model's accuracy and the start's beside it."""
    trained, start = results.models["trained"], results.models.get("start")
    tiles = []
    for name, score in trained.attacks.items():
        before = start.attacks.get(name) if start else None
        parts = [
            element("p", attack_name(name), class_="tile-name"),
            element("p", percent(score), class_="tile-value"),
            element("p", f"{score.correct:,} of {score.count:,} images", class_="tile-note"),
        ]
        if before:
            text = f"start {percent(before)}, {difference(score, before)} points"
            parts.append(element("p", text, class_="tile-note"))
        if not score.reliable:
            parts.append(element("p", "\N{WARNING SIGN} unreliable", class_="flag"))
        tiles.append(element("li", *parts, class_="tile" if score.reliable else "tile doubtful"))
    return element("ul", *tiles, class_="tiles", aria_label="Accuracy of the trained model")


def _warnings(results: Results) -> Html:
    """Return the box of numbers not to trust, and the box of further warnings."""
    doubtful, notes = [], []
    for key, model in results.models.items():
        for score in model.attacks.values():
            name = f"{attack_name(score.attack)}, {results.name(key)}: "
            if not score.reliable:
                reasons = "; ".join(score.warnings) or "no reason was recorded"
                doubtful.append(name + reasons)
            else:
                notes += [name + text for text in score.warnings]
    boxes = []
    if doubtful:
        title = "\N{WARNING SIGN} Unreliable results: do not quote these numbers"
        boxes.append(callout("warning", title, bullets(doubtful)))
    if results.warnings or notes:
        title = "Warnings of the evaluation"
        boxes.append(callout("note", title, bullets([*results.warnings, *notes])))
    return join(boxes)
