"""The main job: data, natural start, training, attacks, report, each from where it stands."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cure_fast import distributed
from cure_fast.config import Config
from cure_fast.console import Transcript, command, keep, say, transcript, warn
from cure_fast.errors import InputError, StoppedError
from cure_fast.evaluation.record import keep_results
from cure_fast.evaluation.results import check_networks, measure_run, print_results
from cure_fast.files import user_path
from cure_fast.loaders import DATASETS, Loader
from cure_fast.methods import check_config, find_method
from cure_fast.models import MODELS, ImageClassifier
from cure_fast.models.building import check_logits, check_takes
from cure_fast.models.weights import load_into, read_weights
from cure_fast.plugins.lookup import is_outside
from cure_fast.progress import Progress, duration
from cure_fast.runs.checkpoint import has_checkpoints
from cure_fast.runs.environment import choose_device, precision, warn_of_emulation
from cure_fast.runs.folder import (
    check_device,
    check_position,
    check_same_run,
    identified,
    own_folder,
    recorded_threads,
    run_folder,
    start_record,
)
from cure_fast.runs.sinks import final_results
from cure_fast.runs.threads import choose_threads, threads
from cure_fast.signals import Interrupted, StopSignals
from cure_fast.step.state import TrainState
from cure_fast.training.data import Data, open_loader, read_data
from cure_fast.training.opening import opening
from cure_fast.training.plan import plan_job, time_passes
from cure_fast.training.stages import START, Stage, new_model, take_start, train_stage
from cure_fast.training.teachers import check_sources, copy_name, keep_teachers, read_teachers
from cure_fast.training.trainer import build_run
from cure_fast.training.watch import step_alarm


def train(
    config: Config,
    *,
    resume: bool = False,
    override: bool = False,
    stop: StopSignals | None = None,
) -> Path:
    """Run the whole job and return its folder.

    Args:
        config: what to train, on what, and how.
        resume: continue the run in its folder from the newest valid checkpoint.
        override: continue it although the configuration differs from the run's.
        stop: signals that are caught already; None catches them for the call.

    Raises:
        CureFastError: with the exit code that the command line documents.
    """
    if stop is None:
        with StopSignals() as stop:
            return train(config, resume=resume, override=override, stop=stop)
    if override and not resume:
        raise InputError(
            "--override: expected --resume with it, got --override alone. "
            "Add --resume to continue a run, or leave --override out."
        )
    check_processes(config)
    with transcript() as printed:
        keep(opening(config))
        try:
            with distributed.joined(timeout_s=config.run.rank_timeout):
                return run_job(config, resume, override, stop, printed)
        except distributed.LostError as error:
            raise StoppedError(f"{error}; {way_on(config)}") from error


def run_job(
    config: Config, resume: bool, override: bool, stop: StopSignals, printed: Transcript
) -> Path:
    """Run the job of :func:`train`, whose text is kept in the run folder."""
    progress, device = Progress(), choose_device(distributed.device_name(config.run.device))
    set_determinism(config.run.deterministic)
    check_config(config)
    check_network(config)
    config = identified(config)
    if distributed.restarts() and config.run.out is not None:
        # The launcher's second try, after a process has failed, has the words of the first.
        resume = resume or distributed.first(lambda: has_run(config))
    named = distributed.first(lambda: run_folder(config, resume=resume))
    changes = check_same_run(named, config, override=override) if resume else {}
    check_sources(config, named)
    try:
        with stop.at_once():
            prepared = distributed.in_turn(lambda: prepare(config, device, named))
            data, loader, model, teachers = prepared
            number = choose_threads(
                config.run.threads,
                model,
                device,
                image_size=data.train.image_size,
                batch_size=config.optim.batch_size,
                recorded=recorded_threads(named) if resume else None,
            )
            plan_job(progress, config, data)
            if device.type == "cpu":
                time_passes(progress, config, model, number, data.train.image_size, resume)
    except Interrupted as error:
        again = (
            f"continue with: {command('train', named, '--resume')}" if resume else "start it again"
        )
        raise StoppedError(f"stopped before training; {again}.") from error
    # Everything that can be wrong with the input has been seen; only now is anything written.
    held = distributed.first_in(lambda: own_folder(config, resume=resume))
    with held as folder, threads(number):
        say(f"run folder: {folder}")
        kept = {"device": device, "changes": list(changes.values())}

        def record() -> None:
            distributed.first(lambda: start_record(folder, config, loader.reason, **kept))
            if distributed.writes():
                printed.write_to(folder / "console.log")
            warn_of_emulation(config.run.amp, device)
            if alarm := step_alarm(config):
                warn(alarm)

        # A run without a checkpoint is recorded at once, to be resumed wherever it ends; one with a
        # checkpoint when that has been read and fits: a folder that is refused stays as it was, and
        # can be resumed with its own configuration.
        resumed = distributed.first(lambda: has_checkpoints(folder / "checkpoints"))
        if resumed:
            check_device(folder, device)
        else:
            record()

        def begin(run: TrainState) -> None:
            if resumed:
                check_position(changes, batch=run.batch)
                check_unfinished(run, changes)
                forget_best(run, changes)
                record()

        number = len(progress.stages) - 1
        stage = Stage(
            "train", config, data, folder, device, stop, progress, number, begin, teachers
        )
        try:
            with progress:
                results, examples = run_stages(stage, model, loader)
            with stop.at_once():
                distributed.first(lambda: tell_end(stage, results, examples))
        except (StoppedError, Interrupted) as error:
            why = error if isinstance(error, StoppedError) else "stopped by a signal"
            remedy = f"continue with: {command('train', folder, '--resume')}"
            raise StoppedError(f"{why}; {remedy}") from error
        finally:
            for sink in stage.sinks:
                sink.close()
    return folder


def check_processes(config: Config) -> None:
    """Refuse what several processes cannot do, before anything is written."""
    number, micro = distributed.started(), config.optim.micro_batch_size
    if number == 1:
        return
    if micro is not None:
        raise InputError(
            f"--micro-batch-size: expected none with {number} processes, which share each batch "
            f"already, got {micro}. Leave it out, or start one process."
        )


def has_run(config: Config) -> bool:
    """Return whether there is a run in the folder of --out."""
    return (user_path(config.run.out or "", "--out") / "config.json").exists()


def way_on(config: Config) -> str:
    """Return how a run goes on whose processes lost one another."""
    if config.run.out is not None and has_run(config):
        return f"continue with: {command('train', config.run.out, '--resume')}"
    return "start it again, with --resume where it had begun"


def tell_end(stage: Stage, results: dict[str, Any], examples: dict[str, np.ndarray]) -> None:
    """Print the results and what can be done next; write the report, and send all that."""
    # Drawing the page takes what training does not.
    from cure_fast.report import write_report

    folder = stage.folder
    print_results(results)
    report = write_report(folder)
    say(f"report: {report}")
    for sink in stage.sinks:
        sink.results(final_results(results, examples, report))
    say(f"took {duration(stage.progress.elapsed)}; next:")
    count, attacks = results["test_images"], results["models"]["trained"]["attacks"]
    if attacks.get("aa", {}).get("count") != count:
        limit = [] if stage.config.eval.limit is None else ["--limit", "all"]
        whole = command("eval", folder, "--attacks", "aa", *limit, "--aa-limit", "all")
        say(f"  {whole}  # AutoAttack, {count:,} images")
    say(f"  {command('export', folder, '--format', 'onnx')}  # the network for other programs")
    say(f"  {command('report', folder)}  # writes the report again")


def check_network(config: Config) -> None:
    """Refuse a network that cannot be built or attacked so, before any data is read.

    A function of the user's own is called only with the number of classes that the data will have.
    """
    info = DATASETS.get(config.data.data)
    if (
        info is None
        and config.model.model not in MODELS
        and is_outside("models", config.model.model)
    ):
        return
    with torch.device("meta"):
        check_attention(config, new_model(config, info.num_classes if info else 2))


def check_attention(config: Config, model: ImageClassifier) -> None:
    """Refuse a network without attention for a method of transformers."""
    if find_method(config.method).needs_attention and not model.attention_branches:
        sized = ", ".join(name for name, info in MODELS.items() if info.sized)
        raise InputError(
            f"--method {config.method}: expected a vision transformer ({sized}), got "
            f"{config.model.model}. Choose another --model."
        )


def prepare(
    config: Config, device: torch.device, folder: Path
) -> tuple[Data, Loader, ImageClassifier, dict[str, ImageClassifier]]:
    """Return images, loader, the network with its first weights, and teachers, all checked."""
    data = read_data(config)
    say(
        f"data: {config.data.data}, {len(data.train):,} training, {len(data.val):,} validation "
        f"and {len(data.test):,} test images, {len(data.train.classes)} classes"
    )
    if data.generated is not None:
        say(f"data: {len(data.generated):,} generated images, {config.data.aux}")
    loader = open_loader(config, data, device, distributed.place())
    say(f"loader: {loader.reason}")
    model = new_model(config, len(data.train.classes), data.train.image_size)
    check_attention(config, model)
    check_logits(model, data.train, config.model.model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    computed = precision(config.run.amp, device)
    say(
        f"network: {config.model.model}, {parameters:,} parameters, on {device_name(device)}"
        f"{'' if computed == 'float32' else f', trained in {computed}'}"
    )
    if config.model.init_from is not None and not (folder / START).exists():
        given = user_path(config.model.init_from, "--init-from")
        load_into(model, model.adapted(read_weights(given)), source=str(given))
    teachers = read_teachers(config, len(data.train.classes), folder)
    for name, teacher in teachers.items():
        check_takes(teacher, data.train.image_size, f"teacher {name}")
    check_trial(config, model, loader, teachers)
    return data, loader, model, teachers


def check_trial(
    config: Config, model: ImageClassifier, loader: Loader, teachers: Mapping[str, ImageClassifier]
) -> None:
    """Refuse what method and policies cannot take, and to attack networks that the run lacks.

    A trial run on the CPU tells, before there is a folder.
    """
    trial = replace(config, run=replace(config.run, engine="eager"))
    # Not a copy: a network of the user's own may not be one that can be copied.
    fresh = new_model(config, loader.num_classes, model.image_size)
    run = build_run(trial, fresh, loader, torch.device("cpu"), teachers)
    nets = run.all_networks
    names = {file for file, name in run.files.items() if isinstance(nets[name], ImageClassifier)}
    names |= {copy_name(name) for name in teachers}
    check_networks(config.eval.networks, names - {"model"}, run.result)


def check_unfinished(run: TrainState, changes: Iterable[str]) -> None:
    """Refuse other settings for a run that has no epoch left to train with them."""
    if changes and run.epoch >= run.config.optim.epochs and run.pending is None:
        raise InputError(
            f"--override: the run is at the end of epoch {run.epoch}, and --epochs is "
            f"{run.config.optim.epochs}: nothing is left to train with {', '.join(changes)}. Raise "
            "--epochs as well, or start a new run from its weights with --init-from."
        )


def forget_best(run: TrainState, changes: Iterable[str]) -> None:
    """Choose the best epoch anew where validation no longer measures what it did."""
    measured = ("attack.", "eval.val_", "data.val_images", "data.split_seed", "data.data")
    measured += ("data.image_size",)
    found = [name for name in changes if name.startswith(measured)]
    if found and run.best:
        run.best = {}
        say(f"--override: the best epoch is chosen anew from here, as {', '.join(found)} changed")


def run_stages(
    stage: Stage, model: ImageClassifier, loader: Loader
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Take the start, train and evaluate, each from where an earlier call left it."""
    distributed.first(lambda: keep_teachers(stage.config, stage.teachers, stage.folder))
    take_start(stage, model)
    train_stage(stage, model, loader)
    stage.progress.begin(stage.number + 1)
    measured, examples = measure_run(
        stage.folder, stage.config, stage.data.test, stage.device, stage.stop, stage.progress
    )
    kept = distributed.first(
        lambda: keep_results(stage.folder, stage.config, measured, examples).record
    )
    return kept or measured, examples


def device_name(device: torch.device) -> str:
    """Return what a device is, in words."""
    if device.type == "cuda":
        return f"{device}, {torch.cuda.get_device_name(device)}"
    # How many threads it takes is measured later, and said then.
    return "the CPU"


def set_determinism(deterministic: bool) -> None:
    """Choose between the fastest GPU algorithms and those that give the same result each time."""
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.deterministic = deterministic
    if deterministic:
        # cuBLAS reads it when it is first used.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if torch.are_deterministic_algorithms_enabled() != deterministic:
        # Imports torch's compiler, which takes seconds.
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        # Else torch also fills each tensor that it makes without values, at one more kernel each.
        fills: Any = torch.utils.deterministic
        fills.fill_uninitialized_memory = not deterministic
