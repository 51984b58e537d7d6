"""The end of the page: settings, machine, command line and files."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cure_fast.report.answer import progress_line
from cure_fast.report.html import Html, code, element, fold, paragraph, section, table
from cure_fast.report.record import Record
from cure_fast.report.text import duration, setting, size

SECTIONS = {
    "settings": "Method",
    "data": "Data",
    "model": "Model",
    "pretrain": "Natural pre-training",
    "attack": "Attack in training",
    "optim": "Optimiser",
    "eval": "Evaluation",
    "run": "Run",
}
FIELDS = "Every field is a flag of cure-fast train"
ENVIRONMENT = {
    "started": "Started",
    "cure_fast": "cure-fast",
    "commit": "Commit",
    "python": "Python",
    "torch": "PyTorch",
    "torchvision": "torchvision",
    "triton": "Triton",
    "numpy": "NumPy",
    "ffcv": "FFCV",
    "pyautoattack": "pyautoattack",
    "platform": "Platform",
    "cpu": "Processor",
    "threads": "Threads",
    "gpu": "GPU",
    "driver": "GPU driver",
    "loader": "Loader",
}
FILES = {
    "config.json": "the resolved configuration",
    "environment.json": "versions, machine, commit and command line",
    "metrics.jsonl": "one row per logged step and per epoch",
    "results.json": "the attacks on test images",
    "examples.npz": "the pictures above, as arrays",
    "model.safetensors": "weights of the best epoch",
    "start.safetensors": "weights that training started from",
    "revision.safetensors": "weights of the revision model at the best epoch",
    "checkpoints": "what --resume continues from",
    "tensorboard": "the same metrics for TensorBoard",
    "evaluation": "finished parts of the evaluation",
}


def details(record: Record) -> Html:
    """Return the sections on settings, machine and files."""
    return element(
        "div", _run(record), _settings(record), _environment(record), _files(record.folder)
    )


def _run(record: Record) -> Html:
    """Return how to make this run again, and how long it took."""
    parts = []
    command = (record.environment or {}).get("command")
    if isinstance(command, list) and command:
        parts.append(paragraph("This command made the run:"))
        line = shlex.join(str(word) for word in command)
        parts.append(element("pre", code(line), tabindex="0", aria_label="Command line"))
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
    moves = [row.moves for row in record.stage("train") if row.moves is not None]
    if moves:
        parts.append(paragraph(f"The revision model was updated {sum(moves):,} times."))
    if record.cut_off:
        text = "The last line of metrics.jsonl was cut off and is left out."
        parts.append(paragraph(text, class_="absent"))
    return section("This run", *parts, anchor="run")


def _settings(record: Record) -> Html:
    """Return every field of the configuration, folded by section."""
    config = record.config
    method = f"Method: {config['method']}"
    folds = []
    for name, title in SECTIONS.items():
        values = config.get(name)
        if isinstance(values, Mapping) and values:
            rows: list[list[str]] = [
                [code(f"--{key.replace('_', '-')}"), setting(key, value)]
                for key, value in values.items()
            ]
            heading = method if name == "settings" else title
            listing = table(["Flag", "Value"], rows, caption=FIELDS, class_="texts")
            folds.append(fold(heading, listing))
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
    names = [n for n in ENVIRONMENT if n in known] + [n for n in known if n not in ENVIRONMENT]
    rows: list[list[str]] = [
        [ENVIRONMENT.get(name, name), "none" if known[name] is None else setting(name, known[name])]
        for name in names
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
        rows.append([code(label), FILES.get(path.name, ""), f"{total}{within}"])
    listing = table(
        ["Name", "What it holds", "Size (in files)"],
        rows,
        caption="When this page was written",
        class_="texts",
    )
    return section("Files in this folder", listing, anchor="files")
