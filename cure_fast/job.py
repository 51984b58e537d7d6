"""The main job: data, natural start, training, attacks, report, each from where it stands."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import cure_fast
from cure_fast.checkpoint import has_checkpoints, load_checkpoint, save_checkpoint
from cure_fast.config import Config, MethodSettings, PretrainConfig
from cure_fast.config_json import digest, to_dict
from cure_fast.environment import choose_device, choose_dtype
from cure_fast.errors import DivergedError, InputError, StoppedError
from cure_fast.evaluate import evaluate
from cure_fast.files import locked
from cure_fast.loaders import ImageSet, Loader, make_loader, read_dataset, split_train
from cure_fast.log import RunLog, drop_rows_from
from cure_fast.methods import find_method
from cure_fast.model_build import build_for_data
from cure_fast.models import MODELS, ImageClassifier
from cure_fast.results import evaluate_run, print_results
from cure_fast.runs import check_same_run, own_folder, run_folder, start_record
from cure_fast.signals import stop_on_signal
from cure_fast.trainer import Run, advice, build_run, fit
from cure_fast.weights import load_into, read_weights, save_weights

# The weights training started from, kept in the run folder: a resumed run needs no other file.
START = "start.safetensors"


@dataclass(frozen=True)
class Data:
    """The images of a run: training, the validation split held out of it, and test."""

    train: ImageSet
    val: ImageSet
    test: ImageSet


def read_data(config: Config) -> Data:
    """Read the data set and hold out the validation split."""
    options = {"download": config.data.download}
    name, root = config.data.data, Path(config.data.data_root).expanduser()
    whole = read_dataset(name, root, "train", **options)
    train, val = split_train(
        whole,
        train_images=config.data.train_images,
        val_images=config.data.val_images,
        seed=config.data.split_seed,
    )
    return Data(train=train, val=val, test=read_dataset(name, root, "test", **options))


def new_model(config: Config, num_classes: int) -> ImageClassifier:
    """Return the configured network with weights drawn from the run's seed, on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        return build_for_data(
            config.model.model,
            data=config.data.data,
            num_classes=num_classes,
            width=config.model.width,
            stem=config.model.stem,
            normalize=config.model.normalize,
        )


def train(config: Config, *, resume: bool = False) -> Path:
    """Run the whole job and return its folder.

    Args:
        config: what to train, on what, and how.
        resume: continue the run in its folder from the newest valid checkpoint.

    Raises:
        CureFastError: with the exit code that the command line documents.
    """
    device = choose_device(config.run.device)
    set_determinism(config.run.deterministic)
    find_method(config.method).check(config)
    check_model(config)
    named = run_folder(config, resume=resume)
    if resume:
        check_same_run(named, config)
    with stop_on_signal() as stop:
        data = read_data(config)
        print(
            f"data: {config.data.data}, {len(data.train):,} training, {len(data.val):,} validation "
            f"and {len(data.test):,} test images, {len(data.train.classes)} classes"
        )
        loader = open_loader(config, data, device)
        print(f"loader: {loader.reason}")
        model = new_model(config, len(data.train.classes))
        if config.model.init_from is not None and not (named / START).exists():
            given = Path(config.model.init_from).expanduser()
            load_into(model, read_weights(given), source=str(given))
        if stop():
            raise StoppedError("stopped before training began; nothing is to be continued.")
        # Everything that can be wrong with the input has been seen; only now is anything written.
        with (
            own_folder(config, resume=resume) as folder,
            careful_convolutions(data, config, device),
        ):
            start_record(folder, config, loader.reason)
            try:
                results = run_stages(config, data, model, loader, folder, device, stop)
            except StoppedError as error:
                remedy = f"continue with: cure-fast train {folder} --resume"
                raise StoppedError(f"{error}; {remedy}") from error
    print_results(results)
    from cure_fast.report import write_report

    print(f"report: {write_report(folder)}")
    return folder


def run_stages(
    config: Config,
    data: Data,
    model: ImageClassifier,
    loader: Loader,
    folder: Path,
    device: torch.device,
    stop: Callable[[], bool],
) -> dict[str, Any]:
    """Take the start, train and evaluate, each from where an earlier call left it."""
    take_start(config, data, model, folder, device, stop)
    train_stage(config, data, model, loader, folder, "train", device, stop)
    return evaluate_run(folder, config, data.test, device, stop)


def set_determinism(deterministic: bool) -> None:
    """Choose between the fastest GPU algorithms and those that give the same result each time."""
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.deterministic = deterministic
    if deterministic:
        # cuBLAS reads it when it is first used.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic, warn_only=True)


def check_model(config: Config) -> None:
    """Raise ``InputError`` for a model that cannot be built, before any data is read."""
    with torch.device("meta"):
        new_model(config, num_classes=2)


@contextmanager
def careful_convolutions(data: Data, config: Config, device: torch.device) -> Iterator[None]:
    """Switch oneDNN off where its weight gradients were seen to corrupt memory.

    Convolutions with fewer than ten channels on images above 40 pixels crashed with torch 2.11 on
    a CPU with AVX-512, and never without oneDNN (docs/log.md).
    """
    size = data.train.images.shape[1]
    width = MODELS[config.model.model].default_width
    width = config.model.width if config.model.width is not None else width
    wide = config.model.model.startswith("wrn")
    risky = device.type == "cpu" and size > 40 and width < 16 and not wide
    if risky:
        print(f"oneDNN is off: it is not safe for width {width} on {size}-pixel images; slower")
    former = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = former and not risky
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = former


def open_loader(config: Config, data: Data, device: torch.device) -> Loader:
    """Return the loader of the training images."""
    return make_loader(
        config.data.loader,
        data.train,
        batch_size=config.optim.batch_size,
        device=device,
        seed=config.run.seed,
        crop_padding=config.data.crop_padding,
        flip=config.data.flip,
        workers=config.data.workers,
        cache=Path(config.run.cache).expanduser(),
    )


def take_start(
    config: Config,
    data: Data,
    model: ImageClassifier,
    folder: Path,
    device: torch.device,
    stop: Callable[[], bool],
) -> None:
    """Load the weights training starts from, and keep a copy as ``start.safetensors``."""
    kept = folder / START
    if kept.exists():
        load_into(model, read_weights(kept), source=str(kept))
        return
    if config.model.init_from is not None:
        # Already loaded, when the input was checked.
        print(f"start: weights of {config.model.init_from}")
    elif config.pretrain.pretrain_epochs:
        weights = pretrain(config, data, folder, device, stop)
        load_into(model, read_weights(weights), source=str(weights))
    else:
        return
    save_weights(model, kept, weights_metadata(config, data))


def pretrain(
    config: Config, data: Data, folder: Path, device: torch.device, stop: Callable[[], bool]
) -> Path:
    """Train naturally, or take the result from the cache; return the file of weights.

    The cache's key is all that decides the weights. The stage's epochs are copied into the run's
    metrics, so that its report shows them whether they ran now or earlier.
    """
    staged = natural_stage(config)
    cached = Path(config.run.cache).expanduser() / "pretrained" / pretrain_key(staged, data, device)
    cached.mkdir(parents=True, exist_ok=True)
    weights, done = cached / "model.safetensors", cached / "done"
    with locked(
        cached / "lock", wait=lambda: print("start: waiting for another run that pre-trains it")
    ):
        if done.exists():
            print(f"start: naturally pre-trained earlier, {weights}")
        else:
            model = new_model(staged, len(data.train.classes))
            loader = open_loader(staged, data, device)
            train_stage(staged, data, model, loader, cached, "pretrain", device, stop)
            done.touch()
            shutil.rmtree(cached / "checkpoints")
        metrics = folder / "metrics.jsonl"
        # A run that was killed right here has some of these rows already.
        drop_rows_from(metrics, "pretrain", 0)
        with metrics.open("a", encoding="utf-8") as target:
            target.write((cached / "metrics.jsonl").read_text(encoding="utf-8"))
    return weights


def pretrain_key(staged: Config, data: Data, device: torch.device) -> str:
    """Return the name of the cache folder: a digest of all that decides the stage's weights."""
    values = to_dict(staged)
    return digest(
        {
            "model": values["model"],
            "optim": values["optim"],
            "seed": staged.run.seed,
            "deterministic": staged.run.deterministic,
            "val_every": staged.eval.val_every,
            "dtype": str(choose_dtype(staged.run.amp, device)),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "images": data.train.checksum() + data.val.checksum(),
            "crop_padding": staged.data.crop_padding,
            "flip": staged.data.flip,
            "versions": [torch.__version__, cure_fast.__version__],
        }
    )


def natural_stage(config: Config) -> Config:
    """Return the configuration of the natural pre-training stage."""
    stage = config.pretrain
    return replace(
        config,
        method="natural",
        settings=MethodSettings(),
        pretrain=PretrainConfig(),
        optim=replace(
            config.optim,
            epochs=stage.pretrain_epochs,
            lr=stage.pretrain_lr,
            weight_decay=stage.pretrain_weight_decay,
            schedule=stage.pretrain_schedule,
        ),
    )


def train_stage(
    config: Config,
    data: Data,
    model: ImageClassifier,
    loader: Loader,
    folder: Path,
    stage: str,
    device: torch.device,
    stop: Callable[[], bool],
) -> None:
    """Train ``model`` to the end, from the newest checkpoint in ``folder`` where there is one."""
    model.compute_dtype = choose_dtype(config.run.amp, device)
    model.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    run = build_run(config, model, loader, device)
    checkpoints = folder / "checkpoints"
    # A folder without a single finished checkpoint is of a run that was killed before its first.
    if has_checkpoints(checkpoints):
        continue_from(run, checkpoints)
        print(f"{stage}: resumed after step {run.step}")
    log = RunLog(
        folder,
        stage,
        epochs=config.optim.epochs,
        tensorboard=config.run.tensorboard,
        upto_step=run.step,
    )
    metadata = weights_metadata(config, data)

    def save(run: Run, best: bool) -> None:
        if best:
            save_weights(run.model, folder / "model.safetensors", metadata)
            for name, network in run.networks.items():
                save_weights(network, folder / f"{name}.safetensors", metadata)
        save_checkpoint(checkpoints, run.step, run.state_dict(), to_dict(config))

    try:
        fit(run, log, validate=lambda run: validate(run, data.val), save=save, stop=stop)
    finally:
        log.close()


def continue_from(run: Run, checkpoints: Path) -> None:
    """Set the run to its newest valid checkpoint; say which were skipped.

    Raises:
        InputError: if none is valid, or it belongs to another run.
    """
    state, skipped = load_checkpoint(checkpoints)
    for reason in skipped:
        print(f"warning: skipped {reason}")
    try:
        run.load_state_dict(state)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"{checkpoints}: the newest checkpoint is of another run or version "
            f"({type(error).__name__}: {error}). "
            "Start anew with another --out, or delete the folder."
        ) from error


def validate(run: Run, val: ImageSet) -> dict[str, Any]:
    """Return natural and robust accuracy in percent on the validation split.

    Raises:
        DivergedError: if the model's logits are not finite.
    """
    robust = f"pgd{run.config.eval.val_attack_steps}" if run.method.uses_attack else None
    attack = run.config.attack
    try:
        results = evaluate(
            run.model,
            torch.from_numpy(val.images),
            torch.from_numpy(val.labels),
            num_classes=len(val.classes),
            attacks=["natural", *([robust] if robust else [])],
            eps=attack.eps,
            step_size=attack.step_size,
            batch_size=run.config.eval.eval_batch_size,
            device=run.device,
            seed=run.config.run.seed,
        )
    except DivergedError as error:
        raise DivergedError(f"after epoch {run.epoch}: {error} {advice(run)}") from error
    return {
        "natural": results["natural"].accuracy,
        "robust": results[robust].accuracy if robust else None,
        "attack": robust,
        "count": results["natural"].count,
    }


def weights_metadata(config: Config, data: Data) -> dict[str, str]:
    """Return what a file of weights says of itself: enough to rebuild the model and its data."""
    return {
        "recipe": config.name,
        "method": config.method,
        "data": config.data.data,
        "model": config.model.model,
        "width": "" if config.model.width is None else str(config.model.width),
        "stem": config.model.stem,
        "normalize": config.model.normalize,
        "eps": repr(config.attack.eps),
        "num_classes": str(len(data.train.classes)),
    }
