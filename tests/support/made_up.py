"""Folders of finished runs with made-up results: as training leaves them, but for the training."""

from __future__ import annotations

import json
from dataclasses import replace

from cure_fast.cli.configure import read_config
from cure_fast.config.values import to_dict
from cure_fast.evaluation.attack_result import AttackResult
from cure_fast.evaluation.record import main_settings
from cure_fast.files import file_hash


def made_up_run(folder, recipe, words=(), *, seed=0, right, last=None, rows=(), **more):
    """Write a run of a recipe with flags: right images of attacks, and of the last epoch.

    ``rows`` are rows of metrics.jsonl; ``more`` is passed on to :func:`attacked`.
    """
    folder.mkdir(parents=True)
    config = read_config(recipe, list(words), "x", {})[0]
    config = replace(config, run=replace(config.run, seed=seed))
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    weights = folder / "model.safetensors"
    weights.write_bytes(folder.name.encode())
    models = {"trained": attacked(config, right, **more) | {"weights": file_hash(weights)}}
    if last is not None:
        models["last"] = attacked(config, last, **more)
    record = {
        **{"format": 1, "classes": list("ab"), "test_images": 10000, "warnings": []},
        **main_settings(config),
        "models": models,
    }
    (folder / "results.json").write_text(json.dumps(record))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def attacked(config, right, *, count=10000, counts=None, reliable=True):
    """Return a network of results.json with these numbers of right images."""
    step = main_settings(config)["step_size"]
    attacks = {
        name: AttackResult(
            name,
            correct,
            (counts or {}).get(name, count),
            1.0,
            {} if name == "natural" else {"step_size": step, "seed": config.run.seed},
            reliable=reliable,
        ).to_dict()
        for name, correct in right.items()
    }
    return {"title": "result", "nrr_cw": None, "nrr_aa": None, "attacks": attacks}


def epoch_row(epoch, *, natural=None, robust=None, stage="train", terms=None, **more):
    """Return a row of an epoch in metrics.jsonl, with a validation where there is an accuracy."""
    validation = {"natural": natural, "robust": robust, "attack": "pgd10", "count": 100}
    return {
        **{"event": "epoch", "stage": stage, "epoch": epoch, "step": 10 * epoch, "lr": 0.1},
        "terms": {"total": 1.0, **(terms or {})},
        "engine": "eager",
        **more,
        "validation": None if natural is None else validation,
    }
