"""``cure-fast eval``: attack the model of a run folder, or a file of weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from cure_fast.config import EvalConfig
from cure_fast.config.arguments import EvalArgs
from cure_fast.console import say
from cure_fast.errors import InputError
from cure_fast.evaluation.record import keep_results, model_entry
from cure_fast.evaluation.results import (
    attack_model,
    check_networks,
    measure_run,
    networks_in,
    new_record,
    plan_attacks,
    print_results,
)
from cure_fast.files import file_hash, user_path, write_json
from cure_fast.loaders import read_dataset
from cure_fast.models.building import check_takes, load_model
from cure_fast.models.weights import read_metadata
from cure_fast.progress import Progress
from cure_fast.runs.environment import choose_device
from cure_fast.runs.folder import held, load_config
from cure_fast.signals import StopSignals
from cure_fast.training.saving import keep_last

# What weights.py reads.
WEIGHTS_ENDINGS = (".safetensors", ".pt", ".pth", ".tar")
# Flags that describe a file of weights; a run folder says all this itself.
FILE_FLAGS = ("data", "model", "width", "stem", "normalize", "out")


def evaluate_folder(folder: Path, args: EvalArgs) -> None:
    """Attack the models of a run; its record and report change only where they get no worse.

    The folder is held meanwhile: neither training nor another evaluation may write in it.
    """
    given = [f"--{name}" for name in FILE_FLAGS if getattr(args, name) is not None]
    if given:
        raise InputError(
            f"{', '.join(given)}: only for a file of weights; {folder} is a run folder, which says "
            "this itself. Leave it out, or name the file, such as "
            f"{folder / 'model.safetensors'}."
        )
    own = load_config(folder)
    if not (folder / "model.safetensors").exists():
        raise InputError(f"{folder}: the run has no model.safetensors yet; train it first.")
    seed = own.run.seed if args.seed is None else args.seed
    config = replace(own, eval=changed(own.eval, args), run=replace(own.run, seed=seed))
    check_networks(config.eval.networks, networks_in(folder))
    root = own.data.data_root if args.data_root is None else args.data_root
    test = read_dataset(own.data.data, user_path(root, "--data-root"), "test")
    busy = "Wait for its end, or evaluate a copy of the folder."
    denied = "Change that, or copy the folder and evaluate the copy."
    with StopSignals() as stop, held(folder, busy=busy, denied=denied):
        if "last" in config.eval.evaluate:
            keep_last(folder, config)
        device = choose_device(args.device)
        with Progress() as progress:
            measured, examples = measure_run(folder, config, test, device, stop, progress)
        kept = keep_results(folder, own, measured, examples)
        if kept.aside is not None:
            print_results(measured)
            say(
                "not all of this is in the run's record, which keeps its own radius, step and seed "
                f"and the larger number of images: {kept.aside}"
            )
        if kept.record is not None and (kept.changed or kept.aside is None):
            print_results(kept.record)
        if kept.changed:
            from cure_fast.report import write_report

            say(f"report: {write_report(folder)}")
        else:
            say(f"unchanged: {folder / 'results.json'}")


def changed(settings: EvalConfig, args: EvalArgs) -> EvalConfig:
    """Return the settings of an evaluation with what the arguments say."""
    given = {k: getattr(args, k.removeprefix("eval_"), None) for k in vars(settings)}
    told: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
    return replace(settings, **{k: None if v == "all" else v for k, v in told.items()})


def stated_eps(path: Path, metadata: Mapping[str, str]) -> float:
    """Return the radius that a file of weights says it was trained with, in pixel units."""
    try:
        eps = float(metadata.get("eps", 8 / 255))
    except ValueError:
        eps = -1.0
    if not 0 <= eps <= 1:
        raise InputError(
            f"{path}: expected its eps to be from 0 to 1, got {metadata['eps']!r}. Give --eps."
        )
    return eps


def evaluate_file(path: Path, args: EvalArgs) -> None:
    """Attack the network in a file of weights."""
    if not path.exists():
        raise InputError(f"{path}: expected a run folder or a file of weights; there is none.")
    for name in ("networks", "evaluate"):
        if getattr(args, name) is not None:
            raise InputError(f"--{name}: only for a run folder; {path} holds a single network.")
    if path.suffix not in WEIGHTS_ENDINGS:
        raise InputError(
            f"{path}: expected a file of weights ({', '.join(WEIGHTS_ENDINGS)}), got another kind "
            "of file. Give that, or a run folder; a model exported as ONNX is for other programs."
        )
    metadata = read_metadata(path)
    for name in ("model", "width", "stem", "normalize"):
        if (value := getattr(args, name)) is not None:
            metadata[name] = str(value)
    data = args.data or metadata.get("data")
    if not data:
        raise InputError(f"{path}: the file does not say its data set; name it with --data.")
    test = read_dataset(data, user_path(args.data_root or "data", "--data-root"), "test")
    # The network takes out the mean of the images it was trained on, whatever it is tested on.
    metadata["data"] = metadata.get("data") or data
    metadata.setdefault("num_classes", str(len(test.classes)))
    metadata.setdefault("image_size", str(test.image_size))
    model = load_model(path, metadata, trusted=args.model)
    check_takes(model, test.image_size, str(path))
    eps = args.eps if args.eps is not None else stated_eps(path, metadata)
    settings = changed(EvalConfig(eval_step_size=eps / 10), args)
    seed = args.seed or 0
    out = None if args.out is None else Path(args.out)
    with StopSignals() as stop:
        device = choose_device(args.device)
        with Progress() as progress:
            plan_attacks(progress, path.stem, settings, test)
            attacks = attack_model(
                model.to(device),
                test,
                settings,
                eps=eps,
                device=device,
                seed=seed,
                state_dir=None if out is None else out / "evaluation",
                weights=file_hash(path),
                name=path.stem,
                key=path.stem,
                progress=progress,
                stop=stop,
            )
    told = {name: metadata.get(name, "") for name in ("recipe", "method", "model")}
    results = new_record(
        told | {"data": data},
        test,
        {path.stem: model_entry(path.name, attacks)},
        eps=eps,
        step_size=settings.eval_step_size,
        seed=seed,
    )
    print_results(results)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "results.json", {**results, "arguments": asdict(args)})
        say(f"results: {out / 'results.json'}")
