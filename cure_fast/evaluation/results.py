"""The measured result of a run: its models under all attacks, beside the paper's row."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cure_fast.config import Config, EvalConfig
from cure_fast.config.attack_names import AttackSpec, attack_name, parse_attack
from cure_fast.config.checks import format_pixel, format_radius
from cure_fast.config.values import digest
from cure_fast.console import say
from cure_fast.errors import InputError
from cure_fast.evaluation.attack_result import strongest
from cure_fast.evaluation.autoattack import autoattack_settings, most_passes
from cure_fast.evaluation.evaluate import AttackResult, adversarial_examples, evaluate
from cure_fast.evaluation.record import (
    FORMAT,
    main_settings,
    model_entry,
    model_name,
    record_warnings,
)
from cure_fast.files import file_hash
from cure_fast.loaders import ImageSet
from cure_fast.methods import labels, paper_row, result_of
from cure_fast.models import ImageClassifier
from cure_fast.models.building import load_model
from cure_fast.models.weights import read_metadata
from cure_fast.progress import Part, Progress

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
    progress: Progress | None = None,
    on_images: Callable[[str, np.ndarray], None] | None = None,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Attack the run's networks on the test images; return results and the report's pictures.

    The result of the run, which is the entry ``trained``, is that of the best validation epoch; of
    the last one only where ``--evaluate`` has that alone. Finished attacks are kept below
    ``evaluation/`` and not run again by a later call with the same weights, images and settings.
    ``on_images`` is as for :func:`.evaluate.evaluate`, and receives the result's.
    """
    settings, row = main_settings(config), paper_row(config)
    eps, progress = settings["eps"], progress or Progress()
    shared: dict[str, Any] = {name: settings[name] for name in ("eps", "norm", "seed")}
    shared |= {"device": device, "stop": stop}
    described = {
        "recipe": config.name,
        "method": config.method,
        "policies": list(config.policies),
        "network": result_of(config),
        "model": config.model.model,
        "data": config.data.data,
    }
    models: dict[str, Any] = {}
    # The first image of each of the first classes.
    firsts = [np.flatnonzero(test.labels == k)[0] for k in np.unique(test.labels)[:EXAMPLES]]
    examples = test.subset(np.array(firsts))
    pictures = torch.from_numpy(examples.images), torch.from_numpy(examples.labels)
    arrays = {"natural": examples.images.astype(np.float32) / 255, "labels": examples.labels}
    targets = targets_of(folder, config)
    for key in targets:
        plan_attacks(progress, key, config.eval, test)
    arrays["attack"] = np.array(f"pgd{EXAMPLE_STEPS}")
    for key, target in targets.items():
        model = load_model(target.path, trusted=config.model.model)
        model.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        weights = file_hash(target.path)
        attacks = attack_model(
            model,
            test,
            config,
            state_dir=folder / "evaluation" / (LAST if target.path.stem == LAST else key),
            weights=weights,
            name=model_name(key, described),
            key=key,
            progress=progress,
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
        how = "given weights" if config.model.init_from else "naturally trained"
        found["start"] = Target(start, f"before {label} ({how})")
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
    key: str = "",
    progress: Progress | None = None,
    stop: Callable[[], bool] | None = None,
    on_images: Callable[[str, np.ndarray], None] | None = None,
) -> dict[str, AttackResult]:
    """Run the configured attacks on the first ``--limit`` test images; print a line each.

    ``progress`` has the parts of :func:`plan_attacks` for ``key``.
    States for resuming go into a folder of their own for each combination of weights and settings,
    so that evaluating again with others never meets them.
    """
    settings, main = config.eval, main_settings(config)
    limit = len(test) if settings.limit is None else min(settings.limit, len(test))
    if state_dir is not None:
        names = ("aa_limit", "eval_step_size", "eval_step_share", "eval_batch_size")
        what = [weights, limit, main, *(getattr(settings, name) for name in names)]
        state_dir = state_dir / digest({"evaluated": what})
    progress, found = progress or Progress(), dict[str, AttackResult]()

    def tell(result: AttackResult) -> None:
        found[result.attack] = result
        progress.finish(f"{key}/{result.attack}")
        hit = strongest({n: r for n, r in found.items() if n != "aa"})
        if "natural" in found and hit:
            right, robust = (100 * r.correct / r.count for r in (found["natural"], hit))
            expect_autoattack(progress, key, settings, test, right, robust)
        say(result_line(name, result))

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
        on_result=tell,
        on_images=on_images,
        work=lambda spec: progress.work(f"{key}/{spec.name}", f"{attack_name(spec.name)}, {name}"),
    )


def plan_attacks(
    progress: Progress, key: str, settings: EvalConfig, test: ImageSet, *, falls: bool = False
) -> None:
    """Add the attacks on a network to the last stage of a job, where they are not there yet.

    ``falls`` says that the network is naturally trained, and hardly outlives AutoAttack's first.
    """
    images = len(test) if settings.limit is None else min(settings.limit, len(test))
    stage = max(1, len(progress.stages))
    for spec in map(parse_attack, settings.attacks):
        progress.plan(f"{key}/{spec.name}", attack_part(spec, images, stage))
        if spec.family == "aa" and not progress.parts[f"{key}/aa"].images:
            expect_autoattack(progress, key, settings, test, 100, 0 if falls else 100)


def attack_part(spec: AttackSpec, images: int, stage: int) -> Part:
    """Return a part of a job that is an attack on so many images; AutoAttack's without its cost."""
    if spec.family == "aa":
        return Part("autoattack", (1.0,), 0, stage, bound=True)
    # A pass and a gradient for each step, and a look at what comes out.
    kind = "natural" if spec.family == "natural" else "attack"
    return Part(kind, (2.0 * spec.steps + 1,), images, stage)


def expect_autoattack(
    progress: Progress,
    key: str,
    settings: EvalConfig,
    test: ImageSet,
    right: float,
    robust: float,
) -> None:
    """Say what AutoAttack on a network takes at most, by percentages that another attack found."""
    limits = [n for n in (settings.limit, settings.aa_limit) if n is not None]
    share = min([len(test), *limits]) / 100
    told = autoattack_settings(
        eps=0, num_classes=len(test.classes), batch_size=settings.eval_batch_size, seed=0
    )
    progress.expect(f"{key}/aa", most_passes(right * share, robust * share, told))


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
        f"{name}: {result.accuracy:.1f} % {seen(result.attack)} ({result.correct} of "
        f"{result.count}; {', '.join(shown)}), {result.seconds:.1f} s"
        f"{'' if result.reliable else ', unreliable'}"
    )


def seen(attack: str) -> str:
    """Return what an accuracy is of, such as ``under PGD-20``."""
    return "of natural images" if attack == "natural" else f"under {attack_name(attack)}"


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
        table.add_row(attack_name(name), *cells)
    console = Console()
    # Captured, because rich ends the program where the reader of its output has gone.
    with console.capture() as captured:
        console.print(table)
        for text in results["warnings"]:
            console.print(f"warning: {text}", markup=False)
    say(captured.get().rstrip("\n"))
    # Networks are told by the one attack that leaves the result least, also where others tie.
    quoted = strongest(_results(models["trained"]["attacks"])) if "trained" in models else None
    for key, entry in models.items():
        attack = quoted.attack if quoted and quoted.attack in entry["attacks"] else None
        name = model_name(key, results)
        if line := headline(name, entry["attacks"], results["test_images"], attack):
            say(line)


def headline(name: str, attacks: Mapping[str, Any], images: int, attack: str | None = None) -> str:
    """Return a model's natural accuracy and that under ``attack``, or the strongest, in a line."""
    found = _results(attacks)
    robust = strongest(found) if attack is None else found[attack]
    quoted = [result for result in (found.get("natural"), robust) if result]
    told = []
    for result in quoted:
        of = "" if result.count == images else f" (first {result.count:,} of {images:,} images)"
        doubt = "" if result.reliable else ", unreliable"
        told.append(f"{result.accuracy:.1f} % {seen(result.attack)}{of}{doubt}")
    return f"{name}: {', '.join(told)}" if told else ""


def _results(attacks: Mapping[str, Any]) -> dict[str, AttackResult]:
    return {attack: AttackResult.from_dict(result) for attack, result in attacks.items()}


def _cell(attack: dict[str, Any] | None) -> str:
    if attack is None:
        return "-"
    mark = "" if attack["reliable"] else " unreliable"
    return f"{attack['accuracy']:.1f} ({attack['correct']}/{attack['count']}){mark}"
