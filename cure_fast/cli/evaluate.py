"""``cure-fast eval``: attack the model of a run folder, or a file of weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from cure_fast.config import Config, EvalConfig
from cure_fast.config.arguments import EvalArgs
from cure_fast.console import say
from cure_fast.errors import InputError
from cure_fast.evaluation.record import FORMAT, keep_results, model_entry
from cure_fast.evaluation.results import attack_model, load_model, measure_run, print_results
from cure_fast.evaluation.trust import trust_warnings
from cure_fast.files import file_hash, user_path, write_json
from cure_fast.loaders import read_dataset
from cure_fast.models.weights import read_metadata
from cure_fast.runs.environment import choose_device
from cure_fast.runs.folder import held, load_config
from cure_fast.signals import StopSignals

DEFAULT_EPS = 8 / 255
# What weights.py reads.
WEIGHTS_ENDINGS = (".safetensors", ".pt", ".pth", ".tar")
# Flags that describe a file of weights; a run folder says all this itself.
FILE_FLAGS = ("data", "model", "width", "stem", "normalize", "out")


def evaluate_folder(folder: Path, args: EvalArgs) -> None:
    """Attack the models of a run; its record and report change only where they get no worse.

    The folder is held meanwhile: neither training nor another evaluation may write in it.

    Raises:
        InputError: if another process runs in the folder, it cannot be written to, or it holds no
            finished model.
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
    config = changed_config(own, args)
    root = own.data.data_root if args.data_root is None else args.data_root
    test = read_dataset(own.data.data, user_path(root, "--data-root"), "test")
    with (
        StopSignals() as stop,
        held(
            folder,
            busy="Wait for its end, or evaluate a copy of the folder.",
            denied="Change that, or copy the folder and evaluate the copy.",
        ),
    ):
        measured, examples = measure_run(folder, config, test, choose_device(args.device), stop)
        keep_and_report(folder, own, measured, examples)


def keep_and_report(
    folder: Path, own: Config, measured: dict[str, Any], examples: dict[str, np.ndarray]
) -> None:
    """Put what was measured into the record, as far as it belongs there, and print it.

    Args:
        folder: of the run, held by the caller.
        own: the run's configuration.
        measured: what :func:`measure_run` returned, and
        examples: the pictures that belong to it.
    """
    kept = keep_results(folder, own, measured, examples)
    if kept.aside is not None:
        print_results(measured)
        say(
            "not all of this is in the run's record, which keeps its own radius, step and seed and "
            f"the larger number of images: {kept.aside}"
        )
    if kept.record is not None and (kept.changed or kept.aside is None):
        print_results(kept.record)
    if not kept.changed:
        say(f"unchanged: {folder / 'results.json'}")
        return
    from cure_fast.report import write_report

    say(f"report: {write_report(folder)}")


def changed_config(config: Config, args: EvalArgs) -> Config:
    """Return the run's configuration with what the arguments say of the evaluation."""
    settings = config.eval
    changed = replace(
        settings,
        attacks=args.attacks or settings.attacks,
        limit=_count(args.limit, settings.limit),
        aa_limit=_count(args.aa_limit, settings.aa_limit),
        eval_eps=settings.eval_eps if args.eps is None else args.eps,
        eval_step_size=settings.eval_step_size if args.step_size is None else args.step_size,
        eval_batch_size=settings.eval_batch_size if args.batch_size is None else args.batch_size,
    )
    seed = config.run.seed if args.seed is None else args.seed
    return replace(config, eval=changed, run=replace(config.run, seed=seed))


def _count(given: int | str | None, own: int | None) -> int | None:
    """Return a number of images, None for all, from a flag that may hold the word all."""
    if given is None:
        return own
    return given if isinstance(given, int) else None


def described(path: Path, args: EvalArgs) -> tuple[dict[str, str], str]:
    """Return what file and flags say of the network in a file, and the data set to test it on."""
    metadata = read_metadata(path)
    told = metadata.get("data")
    for name in ("model", "width", "stem", "normalize"):
        value = getattr(args, name)
        if value is not None:
            metadata[name] = str(value)
    data = args.data or told
    if not data:
        raise InputError(f"{path}: the file does not say its data set; name it with --data.")
    # The network takes out the mean of the images it was trained on, whatever it is tested on.
    return metadata | {"data": told or data}, data


def stated_eps(path: Path, metadata: Mapping[str, str]) -> float:
    """Return the radius that a file of weights says it was trained with, in pixel units."""
    try:
        eps = float(metadata.get("eps", DEFAULT_EPS))
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
    if path.suffix not in WEIGHTS_ENDINGS:
        raise InputError(
            f"{path}: expected a file of weights ({', '.join(WEIGHTS_ENDINGS)}), got another kind "
            "of file. Give that, or a run folder; a model exported as ONNX is for other programs."
        )
    metadata, data = described(path, args)
    root = "data" if args.data_root is None else args.data_root
    test = read_dataset(data, user_path(root, "--data-root"), "test")
    metadata.setdefault("num_classes", str(len(test.classes)))
    model = load_model(path, metadata)
    eps = args.eps if args.eps is not None else stated_eps(path, metadata)
    step_size = eps / 10 if args.step_size is None else args.step_size
    settings = EvalConfig(
        attacks=args.attacks or ("natural", "pgd20", "cw20"),
        limit=_count(args.limit, None),
        aa_limit=_count(args.aa_limit, None),
        eval_step_size=step_size,
        eval_batch_size=EvalConfig.eval_batch_size if args.batch_size is None else args.batch_size,
    )
    seed = 0 if args.seed is None else args.seed
    out = None if args.out is None else Path(args.out)
    with StopSignals() as stop:
        device = choose_device(args.device)
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
            stop=stop,
        )
    results = {
        "format": FORMAT,
        "recipe": metadata.get("recipe", ""),
        "method": metadata.get("method", ""),
        "model": metadata["model"],
        "data": data,
        "classes": list(test.classes),
        "test_images": len(test),
        "eps": eps,
        "step_size": step_size,
        "seed": seed,
        "paper": None,
        "models": {path.stem: model_entry(path.name, attacks)},
        "warnings": list(trust_warnings(attacks)),
    }
    print_results(results)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "results.json", {**results, "arguments": asdict(args)})
        say(f"results: {out / 'results.json'}")
