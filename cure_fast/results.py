"""The measured result of a run: its models under all attacks, beside the paper's row."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cure_fast.config import Config, EvalConfig, format_pixel
from cure_fast.config_json import digest
from cure_fast.errors import InputError
from cure_fast.evaluate import AttackResult, adversarial_examples, evaluate, nrr, trust_warnings
from cure_fast.files import file_hash, replacing, write_json
from cure_fast.loaders import DATASETS, ImageSet
from cure_fast.log import read_rows
from cure_fast.methods import find_method
from cure_fast.models import ImageClassifier, build_model
from cure_fast.recipes import paper_row
from cure_fast.weights import load_into, read_metadata, read_weights

FORMAT = 1
# Pictures in the report: enough to see what an attack does, few enough for one page.
EXAMPLES = 8


def load_model(path: Path, metadata: dict[str, str]) -> ImageClassifier:
    """Return the network in a file of weights, built as ``metadata`` says, on the CPU.

    Raises:
        InputError: if the file or its description is not usable.
    """
    missing = [key for key in ("model", "num_classes") if key not in metadata]
    if missing:
        raise InputError(
            f"{path}: the file does not say its {' and '.join(missing)}; "
            "name the architecture with --model and the data set with --data."
        )
    normalize = None
    if metadata.get("normalize") == "dataset":
        info = DATASETS.get(metadata.get("data", ""))
        normalize = (info.mean, info.std) if info else ((0.5,) * 3, (0.5,) * 3)
    width = metadata.get("width")
    model = build_model(
        metadata["model"],
        num_classes=int(metadata["num_classes"]),
        width=int(width) if width else None,
        stem=metadata.get("stem", "cifar"),
        normalize=normalize,
    )
    load_into(model, read_weights(path), source=str(path))
    return model


def evaluate_run(
    folder: Path,
    config: Config,
    test: ImageSet,
    device: torch.device,
    stop: Callable[[], bool],
) -> dict[str, Any]:
    """Attack the run's models on the test images; write ``results.json`` and ``examples.npz``.

    The trained model is the one of the best validation epoch. Finished attacks are kept below
    ``evaluation/`` and not run again by a later call with the same weights, images and settings.
    """
    eps = config.attack.eps if config.eval.eval_eps is None else config.eval.eval_eps
    results: dict[str, Any] = {
        "format": FORMAT,
        "recipe": config.name,
        "method": config.method,
        "model": config.model.model,
        "data": config.data.data,
        "classes": list(test.classes),
        "test_images": len(test),
        "eps": eps,
        "step_size": config.eval.eval_step_size,
        "paper": None,
        "models": {},
        "warnings": [],
    }
    row = paper_row(config)
    results["paper"] = asdict(row) if row else None
    examples = first_of_each_class(test)
    arrays: dict[str, np.ndarray] = {
        "natural": examples.images.astype(np.float32) / 255,
        "labels": examples.labels,
    }
    for name, path, title in models_of(folder, config):
        model = load_model(path, read_metadata(path))
        model.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        weights = file_hash(path)
        attacks = attack_model(
            model,
            test,
            config.eval,
            eps=eps,
            device=device,
            seed=config.run.seed,
            state_dir=folder / "evaluation" / name,
            weights=weights,
            name=name,
            stop=stop,
        )
        attacks = earlier_attacks(folder, name, weights, eps) | attacks
        results["models"][name] = model_entry(title, attacks) | {"weights": weights}
        results["warnings"] += [f"{name}: {text}" for text in trust_warnings(attacks)]
        shown = attacked_examples(model, examples, eps=eps, device=device, seed=config.run.seed)
        arrays |= {f"{name}_{key}": value for key, value in shown.items()}
    write_json(folder / "results.json", results)
    with replacing(folder / "examples.npz") as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
    return results


def earlier_attacks(folder: Path, name: str, weights: str, eps: float) -> dict[str, AttackResult]:
    """Return what ``results.json`` already holds for the same weights and radius."""
    path = folder / "results.json"
    if not path.exists():
        return {}
    stored = json.loads(path.read_text(encoding="utf-8"))
    entry = stored["models"].get(name, {})
    if stored["eps"] != eps or entry.get("weights") != weights:
        return {}
    return {attack: AttackResult.from_dict(r) for attack, r in entry["attacks"].items()}


def attacked_examples(
    model: ImageClassifier, examples: ImageSet, *, eps: float, device: torch.device, seed: int
) -> dict[str, np.ndarray]:
    """Return PGD-20 images of the examples and the predictions, for the report's pictures."""
    return adversarial_examples(
        model,
        torch.from_numpy(examples.images),
        torch.from_numpy(examples.labels),
        eps=eps,
        step_size=eps / 10,
        steps=20,
        device=device,
        seed=seed,
    )


def models_of(folder: Path, config: Config) -> list[tuple[str, Path, str]]:
    """Return name, file and title of the run's models: trained, start, and revision if wanted."""
    rows = [r for r in read_rows(folder / "metrics.jsonl") if r["stage"] == "train"]
    judged = "robust" if find_method(config.method).uses_attack else "natural"
    epochs = [r for r in rows if r["event"] == "epoch" and r["validation"]]
    best = max(
        epochs,
        key=lambda r: (r["validation"][judged], r["validation"]["natural"], -r["epoch"]),
        default=None,
    )
    which = f", best epoch {best['epoch']} of {config.optim.epochs}" if best else ""
    found = [("trained", folder / "model.safetensors", find_method(config.method).label + which)]
    start = folder / "start.safetensors"
    if start.exists():
        told = "given start" if config.model.init_from else "naturally trained start"
        found.append(("start", start, told))
    if getattr(config.settings, "evaluate_revision", False):
        found.append(("revision", folder / "revision.safetensors", "revision model" + which))
    return found


def attack_model(
    model: ImageClassifier,
    test: ImageSet,
    settings: EvalConfig,
    *,
    eps: float,
    device: torch.device,
    seed: int,
    state_dir: Path | None,
    weights: str,
    name: str,
    stop: Callable[[], bool] | None = None,
) -> dict[str, AttackResult]:
    """Run the configured attacks on the first ``settings.limit`` test images; print a line each.

    States for resuming go into a folder of their own for each combination of weights and settings,
    so that evaluating again with others never meets them.
    """
    limit = len(test) if settings.limit is None else min(settings.limit, len(test))
    if state_dir is not None:
        what = [weights, eps, seed, limit, settings.aa_limit]
        what += [settings.eval_step_size, settings.eval_batch_size]
        state_dir = state_dir / digest({"evaluated": what})
    return evaluate(
        model,
        torch.from_numpy(test.images[:limit]),
        torch.from_numpy(test.labels[:limit]),
        num_classes=len(test.classes),
        attacks=settings.attacks,
        eps=eps,
        step_size=settings.eval_step_size,
        batch_size=settings.eval_batch_size,
        device=device,
        seed=seed,
        aa_limit=settings.aa_limit,
        state_dir=state_dir,
        model_name=name,
        stop=stop,
        on_result=lambda result: print(result_line(name, result), flush=True),
    )


def result_line(name: str, result: AttackResult) -> str:
    """Return the plain line of a finished attack: its count, its settings, its time."""
    shown = [result.precision]
    for key, word in (("eps", "eps"), ("step_size", "step"), ("seed", "seed")):
        if key in result.settings:
            value = result.settings[key]
            shown.append(f"{word} {format_pixel(value) if key != 'seed' else value}")
    return (
        f"{name} {result.attack}: {result.accuracy:.1f} % ({result.correct} of {result.count}; "
        f"{', '.join(shown)}), {result.seconds:.1f} s{'' if result.reliable else ', unreliable'}"
    )


def model_entry(title: str, attacks: dict[str, AttackResult]) -> dict[str, Any]:
    """Return a model's part of ``results.json``: its attacks and the two ratios."""
    entry: dict[str, Any] = {"title": title, "nrr_cw": None, "nrr_aa": None}
    entry["attacks"] = {name: result.to_dict() for name, result in attacks.items()}
    natural = attacks.get("natural")
    for ratio, prefix in (("nrr_cw", "cw"), ("nrr_aa", "aa")):
        robust = next((r for name, r in attacks.items() if name.startswith(prefix)), None)
        # A ratio of accuracies on different images would mean nothing.
        if natural and robust and natural.count == robust.count:
            entry[ratio] = nrr(natural.accuracy, robust.accuracy)
    return entry


def first_of_each_class(test: ImageSet) -> ImageSet:
    """Return the first test image of each of the first classes, for the report's pictures."""
    firsts = [int(np.flatnonzero(test.labels == k)[0]) for k in np.unique(test.labels)[:EXAMPLES]]
    return test.subset(np.array(firsts))


def read_results(folder: Path) -> dict[str, Any]:
    """Return ``results.json`` of a run.

    Raises:
        InputError: if the run has none.
    """
    path = folder / "results.json"
    if not path.exists():
        raise InputError(f"{path}: no results yet; run `cure-fast eval {folder}`.")
    return json.loads(path.read_text(encoding="utf-8"))


def print_results(results: dict[str, Any]) -> None:
    """Print the accuracies as a table, beside the paper's row, and the warnings."""
    from rich.console import Console
    from rich.table import Table

    models, paper = results["models"], results["paper"]
    names = list(dict.fromkeys(a for m in models.values() for a in m["attacks"]))
    title = f"{results['data']}, {results['model']}, attacks at eps {format_pixel(results['eps'])}"
    table = Table(title=title)
    table.add_column("accuracy in %")
    for entry in models.values():
        table.add_column(entry["title"], justify="right")
    if paper:
        table.add_column(f"paper: {paper['row']}", justify="right")
    for name in names:
        cells = [_cell(entry["attacks"].get(name)) for entry in models.values()]
        published = paper.get(name) if paper else None
        if paper:
            cells.append("-" if published is None else f"{published:.2f}")
        table.add_row(name, *cells)
    console = Console()
    console.print(table)
    for text in results["warnings"]:
        console.print(f"warning: {text}", markup=False)


def _cell(attack: dict[str, Any] | None) -> str:
    if attack is None:
        return "-"
    mark = "" if attack["reliable"] else " unreliable"
    return f"{attack['accuracy']:.1f} ({attack['correct']}/{attack['count']}){mark}"
