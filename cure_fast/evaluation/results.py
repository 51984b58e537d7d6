"""The measured result of a run: its models under all attacks, beside the paper's row."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cure_fast.config import Config
from cure_fast.config.checks import format_pixel, format_radius
from cure_fast.config.values import digest
from cure_fast.console import say
from cure_fast.errors import InputError
from cure_fast.evaluation.evaluate import AttackResult, adversarial_examples, evaluate
from cure_fast.evaluation.record import (
    FORMAT,
    main_settings,
    model_entry,
    record_warnings,
    shown_name,
)
from cure_fast.files import file_hash
from cure_fast.loaders import ImageSet
from cure_fast.methods import labels, paper_row, result_of
from cure_fast.models import ImageClassifier
from cure_fast.models.building import load_model
from cure_fast.models.weights import read_metadata

# Pictures in the report: enough to see what an attack does, few enough for one page.
EXAMPLES = 8
# Steps of PGD that make them.
EXAMPLE_STEPS = 20
# The result's weights after the last epoch: name of their file, and of their entry in a record.
LAST = "last"


@dataclass(frozen=True)
class Target:
    """A network of a run that is attacked.

    Attributes:
        network: its name in the run; None where the run did not train it.
        epoch: 1-based epoch that its weights are of; None where that is not told.
    """

    path: Path
    title: str
    network: str | None = None
    epoch: int | None = None


def measure_run(
    folder: Path,
    config: Config,
    test: ImageSet,
    device: torch.device,
    stop: Callable[[], bool],
    on_images: Callable[[str, np.ndarray], None] | None = None,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Attack the run's networks on the test images; return results and the report's pictures.

    The result of the run, which is the entry ``trained``, is that of the best validation epoch; of
    the last one only where ``--evaluate`` has that alone. Finished attacks are kept below
    ``evaluation/`` and not run again by a later call with the same weights, images and settings.
    ``on_images`` is as for :func:`.evaluate.evaluate`, and receives the result's.
    """
    settings, row = main_settings(config), paper_row(config)
    eps = settings["eps"]
    shared: dict[str, Any] = {name: settings[name] for name in ("eps", "norm", "seed")}
    shared |= {"device": device, "stop": stop}
    models: dict[str, Any] = {}
    # The first image of each of the first classes.
    firsts = [np.flatnonzero(test.labels == k)[0] for k in np.unique(test.labels)[:EXAMPLES]]
    examples = test.subset(np.array(firsts))
    pictures = torch.from_numpy(examples.images), torch.from_numpy(examples.labels)
    arrays = {"natural": examples.images.astype(np.float32) / 255, "labels": examples.labels}
    arrays["attack"] = np.array(f"pgd{EXAMPLE_STEPS}")
    for key, target in targets_of(folder, config).items():
        model = load_model(target.path, trusted=config.model.model)
        model.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        weights = file_hash(target.path)
        attacks = attack_model(
            model,
            test,
            config,
            state_dir=folder / "evaluation" / (LAST if target.path.stem == LAST else key),
            weights=weights,
            name=shown_name(key, result_of(config)),
            device=device,
            stop=stop,
            on_images=on_images if key == "trained" else None,
        )
        models[key] = model_entry(target.title, attacks) | {
            "network": target.network,
            "epoch": target.epoch,
            "weights": weights,
        }
        shown = adversarial_examples(
            model, *pictures, step_size=eps / 10, steps=EXAMPLE_STEPS, **shared
        )
        arrays |= {f"{key}_{name}": value for name, value in shown.items()}
    described = {
        "recipe": config.name,
        "method": config.method,
        "policies": list(config.policies),
        "network": result_of(config),
        "model": config.model.model,
        "data": config.data.data,
    }
    paper = asdict(row) if row else None
    return new_record(described, test, models, paper=paper, **settings), arrays


def new_record(
    described: Mapping[str, Any],
    test: ImageSet,
    models: dict[str, Any],
    *,
    paper: dict[str, Any] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Return a record of entries of :func:`model_entry` and settings of :func:`main_settings`."""
    record = {
        "format": FORMAT,
        **described,
        "classes": list(test.classes),
        "test_images": len(test),
        **settings,
        "paper": paper,
        "models": models,
    }
    return record | {"warnings": record_warnings(record)}


def targets_of(folder: Path, config: Config) -> dict[str, Target]:
    """Return the run's result, its start, and those networks asked for, by record key."""
    check_networks(config.eval.networks, networks_in(folder))

    def target(file: str, title: str) -> Target:
        path = folder / f"{file}.safetensors"
        metadata = read_metadata(path)
        epoch = metadata.get("epoch")
        if epoch is None:
            return Target(path, title)
        if file == LAST:
            word = "last epoch"
        # Earlier versions kept all networks at the result's best epoch.
        elif metadata.get("chosen_by", "model") == file:
            word = "best epoch"
        else:
            word = "the result's best epoch"
        network = metadata.get("network", result if file in ("model", LAST) else file)
        title += f", {word} {epoch} of {config.optim.epochs}"
        return Target(path, title, network, int(epoch))

    result, label = result_of(config), labels(config.method, config.policies)
    told = label if result == "model" else f"{label}, {result} network"
    asked = config.eval.evaluate
    found = {"trained": target("model" if "best" in asked else LAST, told)}
    start = folder / "start.safetensors"
    if start.exists():
        given = config.model.init_from
        found["start"] = Target(start, "given start" if given else "naturally trained start")
    if {"best", "last"} <= set(asked):
        found[LAST] = target(LAST, told)
    return found | {name: target(name, f"{name} network") for name in config.eval.networks}


def networks_in(folder: Path) -> set[str]:
    """Return the names of the networks that a trained run has beside its result and its start."""
    return {path.stem for path in folder.glob("*.safetensors")} - {"model", "start", LAST}


def check_networks(wanted: Iterable[str], having: Collection[str], result: str = "model") -> None:
    """Raise ``InputError`` for a network in ``wanted`` that is not in ``having``.

    ``result`` is the one that the run is evaluated by anyway.
    """
    for name in wanted:
        if name == result:
            raise InputError(
                f"--networks: {name} is the run's result, which is attacked anyway; leave it out."
            )
        if name not in having:
            known = f"it has {', '.join(sorted(having))}" if having else "it has no further one"
            raise InputError(f"--networks: this run has no network {name!r}; {known}.")


def attack_model(
    model: ImageClassifier,
    test: ImageSet,
    config: Config,
    *,
    device: torch.device,
    state_dir: Path | None,
    weights: str,
    name: str,
    stop: Callable[[], bool] | None = None,
    on_images: Callable[[str, np.ndarray], None] | None = None,
) -> dict[str, AttackResult]:
    """Run the configured attacks on the first ``--limit`` test images; print a line each.

    States for resuming go into a folder of their own for each combination of weights and settings,
    so that evaluating again with others never meets them.
    """
    settings, main = config.eval, main_settings(config)
    limit = len(test) if settings.limit is None else min(settings.limit, len(test))
    if state_dir is not None:
        names = ("aa_limit", "eval_step_size", "eval_step_share", "eval_batch_size")
        what = [weights, limit, main, *(getattr(settings, name) for name in names)]
        state_dir = state_dir / digest({"evaluated": what})
    return evaluate(
        model,
        torch.from_numpy(test.images[:limit]),
        torch.from_numpy(test.labels[:limit]),
        num_classes=len(test.classes),
        attacks=settings.attacks,
        eps=main["eps"],
        norm=main["norm"],
        step_size=settings.eval_step_size,
        step_share=settings.eval_step_share,
        restarts=settings.restarts,
        batch_size=settings.eval_batch_size,
        device=device,
        seed=main["seed"],
        aa_limit=settings.aa_limit,
        state_dir=state_dir,
        model_name=name,
        stop=stop,
        on_result=lambda result: say(result_line(name, result)),
        on_images=on_images,
    )


def result_line(name: str, result: AttackResult) -> str:
    """Return the plain line of a finished attack: its count, its settings, its time."""
    shown, settings = [result.precision], result.settings
    if "eps" in settings:
        shown.append(format_radius(settings["eps"], settings["norm"].lower()))
    if "step_size" in settings:
        shown.append(f"step {format_pixel(settings['step_size'])}")
    if settings.get("restarts", 1) > 1:
        shown.append(f"{settings['restarts']} restarts")
    if "seed" in settings:
        shown.append(f"seed {settings['seed']}")
    return (
        f"{name} {result.attack}: {result.accuracy:.1f} % ({result.correct} of {result.count}; "
        f"{', '.join(shown)}), {result.seconds:.1f} s{'' if result.reliable else ', unreliable'}"
    )


def print_results(results: dict[str, Any]) -> None:
    """Print the accuracies as a table, beside the paper's row, and the warnings."""
    from rich.console import Console
    from rich.table import Table

    models, paper = results["models"], results["paper"]
    radius = format_radius(results["eps"], results.get("norm", "linf"))
    title = f"{results['data']}, {results['model']}, attacks at {radius}"
    table = Table(title=title)
    table.add_column("accuracy in %")
    for entry in models.values():
        table.add_column(entry["title"], justify="right")
    overfitted = {"trained", LAST} <= models.keys()
    if overfitted:
        table.add_column("last - best", justify="right")
    if paper:
        table.add_column(f"paper: {paper['row']}", justify="right")
    for name in dict.fromkeys(a for entry in models.values() for a in entry["attacks"]):
        cells = [_cell(entry["attacks"].get(name)) for entry in models.values()]
        if overfitted:
            best, last = (models[key]["attacks"].get(name) for key in ("trained", LAST))
            lost = last and best and f"{last['accuracy'] - best['accuracy']:+.1f}"
            cells.append(lost or "-")
        if paper:
            cells.append("-" if paper.get(name) is None else f"{paper[name]:.2f}")
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
