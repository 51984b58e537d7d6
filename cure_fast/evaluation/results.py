"""The measured result of a run: its models under all attacks, beside the paper's row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cure_fast.config import Config, EvalConfig
from cure_fast.config.checks import format_pixel
from cure_fast.config.values import digest
from cure_fast.console import say
from cure_fast.errors import InputError
from cure_fast.evaluation.attack_result import AttackResult
from cure_fast.evaluation.evaluate import adversarial_examples, evaluate
from cure_fast.evaluation.record import (
    FORMAT,
    keep_results,
    main_settings,
    model_entry,
    model_warnings,
)
from cure_fast.files import file_hash
from cure_fast.loaders import ImageSet
from cure_fast.methods import find_method
from cure_fast.models import ImageClassifier
from cure_fast.models.building import build_for_data
from cure_fast.models.weights import load_into, read_metadata, read_weights
from cure_fast.recipes import paper_row

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
    numbers: dict[str, int | None] = {}
    for key in ("num_classes", "width"):
        text = metadata.get(key, "")
        if text and not text.isdecimal():
            raise InputError(f"{path}: expected {key} as a whole number, the file says {text!r}.")
        numbers[key] = int(text) if text else None
    model = build_for_data(
        metadata["model"],
        data=metadata.get("data", ""),
        num_classes=numbers["num_classes"] or 0,
        width=numbers["width"],
        stem=metadata.get("stem", "cifar"),
        normalize=metadata.get("normalize", "none"),
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
    """Attack the run's models as its configuration says and return its record, ``results.json``."""
    measured, examples = measure_run(folder, config, test, device, stop)
    return keep_results(folder, config, measured, examples).record or measured


def measure_run(
    folder: Path,
    config: Config,
    test: ImageSet,
    device: torch.device,
    stop: Callable[[], bool],
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Attack the run's models on the test images; return the results and the report's pictures.

    The trained model is the one of the best validation epoch. Finished attacks are kept below
    ``evaluation/`` and not run again by a later call with the same weights, images and settings.
    """
    settings, row = main_settings(config), paper_row(config)
    eps, seed = settings["eps"], settings["seed"]
    results: dict[str, Any] = {
        "format": FORMAT,
        "recipe": config.name,
        "method": config.method,
        "model": config.model.model,
        "data": config.data.data,
        "classes": list(test.classes),
        "test_images": len(test),
        **settings,
        "paper": asdict(row) if row else None,
        "models": {},
        "warnings": [],
    }
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
            seed=seed,
            state_dir=folder / "evaluation" / name,
            weights=weights,
            name=name,
            stop=stop,
        )
        results["models"][name] = model_entry(title, attacks) | {"weights": weights}
        shown = attacked_examples(model, examples, eps=eps, device=device, seed=seed, stop=stop)
        arrays |= {f"{name}_{key}": value for key, value in shown.items()}
    results["warnings"] = model_warnings(results["models"])
    return results, arrays


def attacked_examples(
    model: ImageClassifier,
    examples: ImageSet,
    *,
    eps: float,
    device: torch.device,
    seed: int,
    stop: Callable[[], bool] | None,
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
        stop=stop,
    )


def models_of(folder: Path, config: Config) -> list[tuple[str, Path, str]]:
    """Return name, file and title of the run's models: trained, start, and revision if wanted."""
    trained = folder / "model.safetensors"
    epoch = read_metadata(trained).get("epoch")
    which = f", best epoch {epoch} of {config.optim.epochs}" if epoch else ""
    found = [("trained", trained, find_method(config.method).label + which)]
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
        on_result=lambda result: say(result_line(name, result)),
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


def first_of_each_class(test: ImageSet) -> ImageSet:
    """Return the first test image of each of the first classes, for the report's pictures."""
    firsts = [int(np.flatnonzero(test.labels == k)[0]) for k in np.unique(test.labels)[:EXAMPLES]]
    return test.subset(np.array(firsts))


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
    # Captured, because rich ends the program where the reader of its output has gone.
    with console.capture() as captured:
        console.print(table)
        for text in results["warnings"]:
            console.print(f"warning: {text}", markup=False)
    say(captured.get().rstrip("\n"))


def _cell(attack: dict[str, Any] | None) -> str:
    if attack is None:
        return "-"
    mark = "" if attack["reliable"] else " unreliable"
    return f"{attack['accuracy']:.1f} ({attack['correct']}/{attack['count']}){mark}"
