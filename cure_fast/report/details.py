"""The end of the page: settings, machine, command line and files."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cure_fast.config.checks import flag_of
from cure_fast.report.answer import progress_line
from cure_fast.report.record import Record
from cure_fast.report.results import bar
from cure_fast.report.text import attack_name, setting, size
from cure_fast.runs.log import duration

SECTIONS = {
    "data": "Data",
    "model": "Model",
    "pretrain": "Natural pre-training",
    "attack": "Attack in training",
    "optim": "Optimiser",
    "eval": "Evaluation",
    "run": "Run",
}
# What is not called as its entry.
ENVIRONMENT = {
    "cure_fast": "cure-fast",
    "torch": "PyTorch",
    "numpy": "NumPy",
    "ffcv": "FFCV",
    "cpu": "Processor",
    "gpu": "GPU",
    "driver": "GPU driver",
    "precision": "Training precision",
}
FILES = {
    "config.json": "the resolved configuration",
    "environment.json": "versions, machine, commit and command line",
    "metrics.jsonl": "one row per logged step and per epoch",
    "results.json": "the attacks on test images",
    "examples.npz": "the pictures above, as arrays",
    "model.safetensors": "weights of the best epoch",
    "last.safetensors": "weights after the last epoch",
    "start.safetensors": "weights that training started from",
    "checkpoints": "what --resume continues from",
    "tensorboard": "the same metrics for TensorBoard",
    "evaluation": "finished parts of the evaluation",
}


def details(record: Record) -> dict[str, Any]:
    """Return what the sections on the run, its settings, machine and files show."""
    command = (record.environment or {}).get("command")
    words = [str(word) for word in command] if isinstance(command, list) else []
    return {
        "command": shlex.join(words) or None,
        "progress": progress_line(record),
        "pretrain": len(record.stage("pretrain")),
        "times": time_bars(record),
        # In order, each once: a run may have gone on by another engine than it began with.
        "engines": list(dict.fromkeys(r.engine for r in record.stage("train") if r.engine)),
        "cut_off": record.cut_off,
        "settings": setting_groups(record.config),
        "environment": environment_rows(record.environment),
        "files": file_rows(record.folder),
    }


def time_bars(record: Record) -> list[dict[str, Any]]:
    """Return a group of bars: how long each part of the run took."""
    spent: dict[str, float] = {}
    for stage, name in (("pretrain", "natural pre-training"), ("train", record.label)):
        rows = record.stage(stage)
        spent[name] = sum(row.seconds or 0.0 for row in rows)
        spent["validation"] = spent.get("validation", 0.0) + sum(
            row.validation_seconds or 0.0 for row in rows
        )
    models = record.results.models.values() if record.results else ()
    for attack in record.results.attacks if record.results else ():
        scores = (model.attacks.get(attack) for model in models)
        name = "natural test images" if attack == "natural" else attack_name(attack)
        spent[name] = sum(score.seconds for score in scores if score)
    whole = sum(spent.values())
    bars = [
        bar(name, "time", 100 * seconds / whole, duration(seconds))
        for name, seconds in spent.items()
        if seconds
    ]
    note = f"{duration(whole)} in all" if whole else ""
    return [{"title": "Time", "note": note, "bars": bars}] if bars else []


def setting_groups(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Return every field of the configuration, by section."""
    found = {f"Method: {config['method']}": config.get("settings")}
    found |= {f"Policy: {name}": v for name, v in (config.get("policies") or {}).items()}
    found |= {title: config.get(name) for name, title in SECTIONS.items()}
    groups = []
    for title, values in found.items():
        if isinstance(values, Mapping) and values:
            rows = [(flag_of(k), setting(k, v)) for k, v in values.items()]
            groups.append({"title": title, "rows": rows})
    return groups


def environment_rows(environment: dict[str, Any] | None) -> list[tuple[str, str]] | None:
    """Return what the run ran on; None where that is not known."""
    if environment is None:
        return None
    known = dict(environment)
    dirty = known.pop("dirty", None)
    known.pop("command", None)
    if known.get("commit") and dirty:
        known["commit"] = f"{known['commit']}, with changes that are not committed"
    return [
        (ENVIRONMENT.get(k, k.capitalize()), "none" if v is None else setting(k, v))
        for k, v in known.items()
    ]


def file_rows(folder: Path) -> list[tuple[str, str, str]]:
    """Return the entries of the run folder with what they hold and their sizes."""
    rows = []
    for path in sorted(folder.iterdir()):
        if path.name == "report.html" or path.name.startswith("."):
            continue
        inside = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
        total = size(sum(p.stat().st_size for p in inside))
        label = f"{path.name}/" if path.is_dir() else path.name
        within = f" in {len(inside)}" if path.is_dir() else ""
        rows.append((label, _content(path), f"{total}{within}"))
    return rows


def _content(path: Path) -> str:
    """Return what an entry of the run folder holds; nothing for one that is not the run's."""
    if path.name in FILES or path.suffix != ".safetensors":
        return FILES.get(path.name, "")
    if path.stem.startswith("teacher-"):
        return "weights of a teacher"
    return f"weights of the {path.stem} network at the best epoch"
