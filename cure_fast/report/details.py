"""The end of the page: settings, machine, command line and files."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cure_fast.report.answer import progress_line
from cure_fast.report.html import Html, code, element, fold, paragraph, section, table
from cure_fast.report.record import Record
from cure_fast.report.text import setting, size
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
FIELDS = "Every field is a flag of cure-fast train"
# What is not called as its entry.
ENVIRONMENT = {
    "cure_fast": "cure-fast",
    "torch": "PyTorch",
    "numpy": "NumPy",
    "ffcv": "FFCV",
    "cpu": "Processor",
    "gpu": "GPU",
    "driver": "GPU driver",
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


def details(record: Record) -> Html:
    """Return the sections on settings, machine and files."""
    parts = (_run(record), _settings(record), _environment(record), _files(record.folder))
    return element("div", *parts)


def _run(record: Record) -> Html:
    """Return how to make this run again, and how long it took."""
    parts = []
    command = (record.environment or {}).get("command")
    if isinstance(command, list) and command:
        parts.append(paragraph("This command made the run:"))
        line = code(shlex.join(map(str, command)))
        parts.append(element("pre", line, tabindex="0", aria_label="Command line"))
    else:
        reason = "The command line is not known: environment.json is not in this folder."
        parts.append(paragraph(reason, class_="absent"))
    pretrain = record.stage("pretrain")
    text = f"Training: {progress_line(record)}, validation not counted."
    if pretrain:
        seconds = sum(row.seconds or 0.0 for row in pretrain)
        text += (
            f" Natural pre-training before it: {len(pretrain)} epochs in {duration(seconds)}, "
            "in this run or in an earlier one with the same settings."
        )
    parts.append(paragraph(text))
    # In order, each once: a run may have gone on by another engine than it began with.
    if engines := dict.fromkeys(row.engine for row in record.stage("train") if row.engine):
        parts.append(paragraph(f"Engine of its steps: {'; then '.join(engines)}."))
    if record.cut_off:
        text = "The last line of metrics.jsonl was cut off and is left out."
        parts.append(paragraph(text, class_="absent"))
    return section("This run", *parts, anchor="run")


def _settings(record: Record) -> Html:
    """Return every field of the configuration, folded by section."""
    config = record.config
    found = {f"Method: {config['method']}": config.get("settings")}
    found |= {f"Policy: {name}": v for name, v in (config.get("policies") or {}).items()}
    found |= {title: config.get(name) for name, title in SECTIONS.items()}
    folds = []
    for title, values in found.items():
        if isinstance(values, Mapping) and values:
            rows: list[list[str]] = [
                [code(f"--{key.replace('_', '-')}"), setting(key, value)]
                for key, value in values.items()
            ]
            listing = table(["Flag", "Value"], rows, caption=FIELDS, class_="texts")
            folds.append(fold(title, listing))
    return section("Settings", *folds, anchor="settings")


def _environment(record: Record) -> Html:
    title, anchor = "Machine and versions", "environment"
    if record.environment is None:
        reason = "Versions and machine are not known: environment.json is not in this folder."
        return section(title, paragraph(reason, class_="absent"), anchor=anchor)
    known: dict[str, Any] = dict(record.environment)
    dirty = known.pop("dirty", None)
    known.pop("command", None)
    if known.get("commit") and dirty:
        known["commit"] = f"{known['commit']}, with changes that are not committed"
    rows: list[list[str]] = [
        [
            ENVIRONMENT.get(name, name.capitalize()),
            "none" if value is None else setting(name, value),
        ]
        for name, value in known.items()
    ]
    caption = "As they were when training was last started"
    listing = table(["What", "Value"], rows, caption=caption, class_="texts")
    return section(title, listing, anchor=anchor)


def _files(folder: Path) -> Html:
    """Return the entries of the run folder with their sizes."""
    rows: list[list[str]] = []
    for path in sorted(folder.iterdir()):
        if path.name == "report.html" or path.name.startswith("."):
            continue
        inside = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
        total = size(sum(p.stat().st_size for p in inside))
        label = f"{path.name}/" if path.is_dir() else path.name
        within = f" in {len(inside)}" if path.is_dir() else ""
        rows.append([code(label), _content(path), f"{total}{within}"])
    header, caption = ["Name", "What it holds", "Size (in files)"], "When this page was written"
    listing = table(header, rows, caption=caption, class_="texts")
    return section("Files in this folder", listing, anchor="files")


def _content(path: Path) -> str:
    """Return what an entry of the run folder holds; nothing for one that is not the run's."""
    if path.name in FILES or path.suffix != ".safetensors":
        return FILES.get(path.name, "")
    if path.stem.startswith("teacher-"):
        return "weights of a teacher"
    return f"weights of the {path.stem} network at the best epoch"
