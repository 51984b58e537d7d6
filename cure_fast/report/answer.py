"""The top of the page: what was trained, on what, and how well it does."""

from __future__ import annotations

from typing import Any

from cure_fast.config.checks import format_radius
from cure_fast.evaluation.attack_result import AttackResult, strongest
from cure_fast.methods import METHODS
from cure_fast.policies import POLICIES
from cure_fast.report.record import ModelScores, Record, Results
from cure_fast.report.text import attack_name, data_name, distance, percent
from cure_fast.runs.log import duration
from cure_fast.step.policy import Choice


def answer(record: Record) -> dict[str, Any]:
    """Return what the head of the page shows."""
    config, results = record.config, record.results
    model, seed = config["model"], config.get("run", {}).get("seed")
    attack = config["attack"]
    trained = (attack["eps"], attack.get("norm", "linf"))
    eps, norm = trained if results is None else (results.eps, results.norm)
    found = {
        "label": record.label,
        "data": data_name(config["data"]["data"]),
        "model": model["model"],
        "width": model.get("width"),
        "recipe": config["name"],
        "eps": distance(eps),
        "radius": format_radius(eps, norm),
        "norm": norm,
        "seed": seed,
        "about": [
            {"label": choice.label, "title": choice.title, "paper": choice.paper}
            | {"arxiv": choice.arxiv, "cure": choice.name.startswith("cure")}
            for choice in chosen(config)
        ],
        "has_start": bool(record.stage("pretrain"))
        or "start" in (results.models if results else ()),
        "doubtful": [],
        "warnings": [],
    }
    if results is None:
        return {**found, "finished": None, "unfinished": unfinished(record)}
    found["doubtful"], found["warnings"] = warnings(results, record)
    return {**found, "finished": headline(record, results), "unfinished": None}


def chosen(config: dict[str, Any]) -> list[Choice]:
    """Return the method and the policies of a run, as far as this version knows them."""
    method = METHODS.get(config["method"])
    policies = (POLICIES.get(name) for name in config.get("policies") or {})
    return [choice for choice in (method, *policies) if choice is not None]


def headline(record: Record, results: Results) -> dict[str, Any]:
    """Return the accuracies of the first sentence, of the result and of the start."""
    trained, start = results.models["trained"], results.models.get("start")
    natural, robust = trained.attacks.get("natural"), strongest(trained.attacks)

    def shown(scores: ModelScores | None, which: AttackResult | None) -> str | None:
        score = scores.attacks.get(which.attack) if scores and which else None
        return None if score is None else percent(score)

    return {
        "name": results.name("trained", record.label),
        "natural": shown(trained, natural),
        "robust": shown(trained, robust),
        "attack": robust and attack_name(robust.attack),
        "start_natural": shown(start, natural),
        "start_robust": shown(start, robust),
        "images": f"{results.test_images:,}",
        "natural_on": natural and part_of(natural, results),
        "robust_on": robust and part_of(robust, results),
    }


def part_of(score: AttackResult, results: Results) -> str | None:
    """Return how many images a score counts where these are not all; None where they are."""
    return None if score.count == results.test_images else f"{score.count:,}"


def warnings(results: Results, record: Record) -> tuple[list[str], list[str]]:
    """Return what makes scores unreliable, and the other warnings, each once."""
    label = record.label
    doubtful, notes = [], [*results.warnings]
    for key, model in results.models.items():
        for score in model.attacks.values():
            name = f"{attack_name(score.attack)}, {results.name(key, label)}: "
            if not score.reliable:
                doubtful.append(name + ("; ".join(score.warnings) or "no reason was recorded"))
            else:
                notes += [name + text for text in score.warnings]
    return doubtful, list(dict.fromkeys(notes))


def progress_line(record: Record) -> str:
    """Return how far training got, and how long it took."""
    done, planned = len(record.stage("train")), record.config["optim"]["epochs"]
    seconds = sum(row.seconds or 0.0 for row in record.stage("train"))
    took = f" in {duration(seconds)}" if seconds else ""
    return f"{done} of {planned} epochs{took}"


def unfinished(record: Record) -> dict[str, Any]:
    """Return how far a run is that has no result yet, and its best epoch."""
    best = record.best
    done, planned = len(record.stage("train")), record.config["optim"]["epochs"]
    return {
        "trained": done >= planned,
        "progress": progress_line(record),
        "epoch": best and best.epoch,
        "natural": best and f"{best.natural:.1f} %",
        "robust": best and best.robust is not None and f"{best.robust:.1f} %",
        "attack": attack_name((best and best.attack) or "the attack"),
        "network": best and best.network,
        "count": best and best.count and f"{best.count:,}",
    }
