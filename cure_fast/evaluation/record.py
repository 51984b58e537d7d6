"""The record of a run's results, ``results.json``: what joins it, and what is kept beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cure_fast.config import AttackConfig, Config
from cure_fast.config.attack_names import parse_attack
from cure_fast.config.checks import Bounds, flag_of
from cure_fast.config.steps import SHARED_FROM, evaluation_step
from cure_fast.config.values import BALL, check_norm, digest, with_values
from cure_fast.console import say
from cure_fast.errors import InputError
from cure_fast.evaluation.attack_result import AttackResult, nrr
from cure_fast.evaluation.chance import chance_warnings
from cure_fast.evaluation.trust import trust_warnings
from cure_fast.files import replacing, write_json
from cure_fast.methods import labels

FORMAT = 1
# What files of weights say of the attacks that their run is measured by, and the argument of
# `cure-fast eval` that stands for it.
STATED = {
    "eps": "eps",
    "norm": "norm",
    "eval_eps": "eps",
    "eval_norm": "norm",
    "eval_step_size": "step_size",
    "eval_step_share": "step_size",
    "restarts": "restarts",
    "seed": "seed",
}


@dataclass(frozen=True)
class Kept:
    """Where results went: ``results.json`` as it is now, and the file beside it with all of them.

    There is no record where they are not the run's own, and no file where it took all of them.
    """

    record: dict[str, Any] | None
    changed: bool = False
    aside: Path | None = None


def main_settings(config: Config) -> dict[str, Any]:
    """Return what all results of a record share: ball, step in pixel units, restarts and seed.

    The step is that of 20 steps or more; attacks of fewer may have longer ones.
    """
    eps = config.attack.eps if config.eval.eval_eps is None else config.eval.eval_eps
    size, share = config.eval.eval_step_size, config.eval.eval_step_share
    step = evaluation_step(eps, SHARED_FROM, size=size, share=share)
    norm, seed = config.evaluated_norm, config.run.seed
    own = {"eps": eps, "norm": norm, "step_size": step}
    return own | {"restarts": config.eval.restarts, "seed": seed}


def settings_metadata(config: Config) -> dict[str, str]:
    """Return what a file of weights says of the attacks that its run is measured by."""
    values = vars(config.attack) | vars(config.eval) | vars(config.run)
    return {name: str(values[name]) for name in STATED if values[name] is not None}


def check_ball(given: Mapping[str, Any], own: str) -> None:
    """Raise ``InputError`` unless arguments of ``cure-fast eval`` fit the norm of the attacks.

    ``own`` is the norm of the run or file.
    """
    if given["eps"] is None:
        check_norm(given["norm"], own, "--norm", "--eps")
    for name in ("eps", "step_size"):
        if given[name] is not None and (given["norm"] or own) == "linf":
            Bounds(0, 1).check(name, given[name])


def stated_settings(metadata: Mapping[str, str], given: Mapping[str, Any], file: Path) -> Config:
    """Return a configuration that measures as a file of weights says, where it says so.

    Args:
        metadata: what :func:`settings_metadata` wrote, and anything else.
        given: arguments of ``cure-fast eval``; what they give is not read.
        file: the file, for messages.
    """
    told = {
        k: metadata[k] for k, flag in STATED.items() if k in metadata and given.get(flag) is None
    }
    check_ball(given, metadata.get("eval_norm", metadata.get("norm", AttackConfig.norm)))
    # With them, as a norm and a radius go together.
    ball = {name: given[name] for name in BALL if given[name] is not None}
    kinds = {"seed": int, "restarts": int, "norm": str, "eval_norm": str}
    try:
        values = {k: kinds.get(k, float)(v) for k, v in told.items()}
        return with_values(Config(), values | ball)
    except ValueError as error:
        flags = dict.fromkeys(flag_of(STATED[name]) for name in told)
        raise InputError(
            f"{file}: expected the settings of an attack, got "
            f"{', '.join(f'{name} {value!r}' for name, value in told.items())}. "
            f"Give {', '.join(flags)}."
        ) from error


def same_settings(record: Mapping[str, Any], own: Mapping[str, Any]) -> bool:
    """Return whether a record has these of :func:`main_settings`, up to rounding."""
    # Absent or null in records of earlier versions: the default was taken.
    default = {"norm": "linf", "step_size": own["eps"] / 10, "restarts": 1, "seed": own["seed"]}
    there = default | {key: value for key, value in record.items() if value is not None}
    lengths = [(there.pop(key, math.nan), own[key]) for key in ("eps", "step_size")]
    return all(there.get(key) == own[key] for key in own.keys() & there.keys()) and all(
        math.isclose(a, b, rel_tol=1e-12) for a, b in lengths
    )


def keep_results(
    folder: Path, config: Config, measured: dict[str, Any], examples: dict[str, np.ndarray]
) -> Kept:
    """Write results into ``results.json`` where they leave the record no worse, else beside it.

    Results with the settings of the run go into the record. There a result of the same weights is
    replaced by one of at least as many images. All else goes to ``evaluation/results-*.json``, and
    so does a record that is of other weights or settings than the run has now. ``examples`` are the
    pictures that belong to the results.
    """
    own = main_settings(config)
    if any(measured[key] != value for key, value in own.items()):
        return Kept(None, aside=write_aside(folder, measured))
    path, pictures = folder / "results.json", folder / "examples.npz"
    stored = stored_record(path)
    if stored is not None and not same_record(stored, measured, own):
        say(f"earlier results of other weights or settings: {write_aside(folder, stored)}")
        stored = None
    merged, complete = merge_results(stored, measured)
    record = json.loads(json.dumps(merged))
    changed = record != stored
    if changed:
        write_json(path, record)
    if changed or not pictures.exists():
        with replacing(pictures) as temporary, temporary.open("wb") as file:
            np.savez(file, **examples)  # pyright: ignore[reportArgumentType]
    return Kept(record, changed, None if complete else write_aside(folder, measured))


def stored_record(path: Path) -> dict[str, Any] | None:
    """Return the record in ``results.json``, or None where there is none; refuse a damaged one."""
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        model_warnings(record)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{path}: expected the results of a run, and it is damaged "
            f"({type(error).__name__}: {error}); move it away and repeat the command, "
            "which keeps the attacks that are finished."
        ) from error
    return record


def same_record(stored: dict[str, Any], measured: dict[str, Any], own: dict[str, Any]) -> bool:
    """Return whether stored results are of the weights just measured and of the run's settings."""
    before, now = stored["models"], measured["models"]
    return same_settings(stored, own) and all(
        before[name].get("weights") == now[name]["weights"] for name in before.keys() & now.keys()
    )


def merge_results(
    stored: dict[str, Any] | None, measured: dict[str, Any]
) -> tuple[dict[str, Any], bool]:
    """Return the record so far with new results of the same models, and whether it took all."""
    models = dict(stored["models"]) if stored else {}
    complete = True
    for name, entry in measured["models"].items():
        attacks = dict(models.get(name, {}).get("attacks", {}))
        for attack, result in entry["attacks"].items():
            if attack in attacks and result["count"] < attacks[attack]["count"]:
                complete = False
            else:
                attacks[attack] = result
        results = {attack: AttackResult.from_dict(result) for attack, result in attacks.items()}
        of = {key: value for key, value in entry.items() if key in ("network", "epoch", "weights")}
        models[name] = model_entry(entry["title"], results) | of
    record = measured | {"models": models}
    return record | {"warnings": record_warnings(record)}, complete


def write_aside(folder: Path, results: dict[str, Any]) -> Path:
    """Write results that are not the run's record to a file of their own, and return it."""
    path = folder / "evaluation" / f"results-{digest(results)}.json"
    path.parent.mkdir(exist_ok=True)
    write_json(path, results)
    return path


def model_name(key: str, record: Mapping[str, Any]) -> str:
    """Return what people read instead of a model's key in a record, such as ``before CURE``.

    Of the record are needed ``method``, ``policies`` and ``network``, which a run's has.
    """
    label = labels(record.get("method") or "", record.get("policies") or ())
    # A record of a file of weights has no network, and the file's name for a key.
    return network_name(key, label, record.get("network")) if "network" in record else key


def network_name(key: str, label: str, network: str | None) -> str:
    """Return the same from the method's label and the name of the network that is the result."""
    names = {
        "trained": label if network in (None, "model") else f"{label}, {network} network",
        "start": f"before {label}",
        "last": f"{label} after the last epoch",
    }
    return names.get(key, f"{label}, {key} network")


def record_warnings(record: dict[str, Any]) -> list[str]:
    """Return what speaks against the results of a record, or against its networks."""
    return model_warnings(record) + [
        f"{model_name(key, record)}: {text}"
        for key, found in chance_warnings(record).items()
        for text in found
    ]


def model_warnings(record: Mapping[str, Any]) -> list[str]:
    """Return what speaks against the results of each model, with its name before it."""
    found = []
    for key, entry in record["models"].items():
        attacks = {a: AttackResult.from_dict(result) for a, result in entry["attacks"].items()}
        found += [f"{model_name(key, record)}: {text}" for text in trust_warnings(attacks)]
    return found


def model_entry(title: str, attacks: dict[str, AttackResult]) -> dict[str, Any]:
    """Return a model's part of ``results.json``: its attacks and the two ratios."""
    entry: dict[str, Any] = {"title": title, "nrr_cw": None, "nrr_aa": None}
    entry["attacks"] = {name: result.to_dict() for name, result in attacks.items()}
    natural, autoattack = attacks.get("natural"), attacks.get("aa")
    # A ratio of accuracies on different images would mean nothing.
    same = [r for r in attacks.values() if natural and r.count == natural.count]
    margin = [r for r in same if parse_attack(r.attack).family == "cw"]
    if natural and margin:
        longest = max(margin, key=lambda r: parse_attack(r.attack).steps)
        entry["nrr_cw"] = nrr(natural.accuracy, longest.accuracy)
    if autoattack and "natural_correct" in autoattack.settings:
        right = 100 * autoattack.settings["natural_correct"] / autoattack.count
        entry["nrr_aa"] = nrr(right, autoattack.accuracy)
    elif natural and autoattack in same:
        entry["nrr_aa"] = nrr(natural.accuracy, autoattack.accuracy)
    return entry
