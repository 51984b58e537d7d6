"""The two training stages of a job: the naturally trained start, and the method itself."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import cure_fast
from cure_fast import distributed
from cure_fast.config import Config, MethodSettings, OptimConfig, PretrainConfig
from cure_fast.config.values import digest, to_dict
from cure_fast.console import say
from cure_fast.engine import engine_asked
from cure_fast.errors import DivergedError, InputError
from cure_fast.evaluation.evaluate import evaluate
from cure_fast.evaluation.results import expect_autoattack
from cure_fast.files import clear_unfinished, file_hash, locked, user_path
from cure_fast.loaders import Loader
from cure_fast.models import ImageClassifier
from cure_fast.models.building import build_for_data
from cure_fast.models.weights import load_into, read_weights, save_weights
from cure_fast.progress import Progress
from cure_fast.runs.checkpoint import has_checkpoints, load_checkpoint, tidy_checkpoints
from cure_fast.runs.environment import choose_dtype
from cure_fast.runs.log import RunLog, drop_rows_from
from cure_fast.runs.sinks import GuardedSink
from cure_fast.signals import StopSignals
from cure_fast.step.random_state import seed_all
from cure_fast.step.state import TrainState
from cure_fast.training.data import Data, open_loader
from cure_fast.training.saving import Saver, weights_metadata
from cure_fast.training.trainer import build_run, fit
from cure_fast.training.watch import in_one_step

# The weights training started from, kept in the run folder: a resumed run needs no other file.
START = "start.safetensors"
# Its checkpoints are of no use to other settings, which have a folder of their own in the cache.
AFRESH = "--resume --override takes such a change, and the natural start begins anew."


@dataclass(frozen=True)
class Stage:
    """One training stage: what it trains on what, and where it keeps its files.

    Attributes:
        name: ``pretrain`` or ``train``, as in ``metrics.jsonl``.
        folder: receives metrics, weights and checkpoints.
        progress: what the job has to do, of which the stage is ``number``.
        begin: called with what is trained, once it is set up and before its first step; may refuse
            with ``InputError``.
        sinks: what the stage opened to receive its numbers, to be closed by the job.
    """

    name: str
    config: Config
    data: Data
    folder: Path
    device: torch.device
    stop: StopSignals
    progress: Progress
    number: int = 1
    begin: Callable[[TrainState], None] = lambda run: None
    teachers: Mapping[str, ImageClassifier] = field(default_factory=dict)
    sinks: list[GuardedSink] = field(default_factory=list)


def new_model(config: Config, num_classes: int, image_size: int | None = None) -> ImageClassifier:
    """Return the configured network with weights drawn from the run's seed, on the CPU.

    ``image_size`` is the height and width of its images in pixels, None where not known yet.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        return build_for_data(
            config.model.model,
            data=config.data.data,
            num_classes=num_classes,
            width=config.model.width,
            stem=config.model.stem,
            normalize=config.model.normalize,
            image_size=image_size,
        )


def take_start(stage: Stage, model: ImageClassifier) -> None:
    """Load the weights training starts from, and keep a copy as ``start.safetensors``."""
    kept, config = stage.folder / START, stage.config
    if distributed.first(kept.exists):
        load_into(model, read_weights(kept), source=str(kept))
        return
    if config.model.init_from is not None:
        # Already loaded, when the input was checked.
        say(f"start: weights of {config.model.init_from}")
    elif config.pretrain.pretrain_epochs:
        weights = pretrain(stage, model)
        load_into(model, read_weights(weights), source=str(weights))
    else:
        return
    distributed.first(lambda: save_weights(model, kept, weights_metadata(config, model)))


def pretrain(stage: Stage, model: ImageClassifier) -> Path:
    """Train naturally, or take the result from the cache; return the file of weights.

    The cache's key is all that decides the weights. The stage's epochs are copied into the run's
    metrics, so that its report shows them whether they ran now or earlier.
    """
    staged, progress = natural_stage(stage.config), stage.progress
    key = pretrain_key(staged, model, stage.data, stage.device)
    cached = user_path(staged.run.cache, "--cache") / "pretrained" / key
    weights, done = cached / "model.safetensors", cached / "done"

    def held() -> AbstractContextManager[None]:
        cached.mkdir(parents=True, exist_ok=True)
        wait = "start: waiting for another run that pre-trains it"
        return locked(cached / "lock", wait=lambda: say(wait))

    def put_down() -> None:
        done.touch()
        # Also where an earlier run had finished and was killed before or while it did this.
        shutil.rmtree(cached / "checkpoints", ignore_errors=True)
        metrics = stage.folder / "metrics.jsonl"
        # A run that was killed right here has some of these rows already.
        drop_rows_from(metrics, "pretrain", 0, 0)
        with metrics.open("a", encoding="utf-8") as target:
            target.write((cached / "metrics.jsonl").read_text(encoding="utf-8"))

    with ExitStack() as stack:
        # A signal ends the wait for another run.
        with stage.stop.at_once():
            stack.enter_context(distributed.first_in(held))
        distributed.first(lambda: clear_unfinished(cached))
        if distributed.first(done.exists):
            say(f"start: naturally pre-trained earlier, {weights}")
        else:
            train = stage.data.train
            fresh = new_model(staged, len(train.classes), train.image_size)
            loader = open_loader(staged, stage.data, stage.device, distributed.place())
            natural = Stage(
                "pretrain", staged, stage.data, cached, stage.device, stage.stop, progress
            )
            train_stage(natural, fresh, loader)
        distributed.first(put_down)
    return weights


def pretrain_key(staged: Config, model: ImageClassifier, data: Data, device: torch.device) -> str:
    """Return the name of the cache folder: a digest of all that decides the stage's weights."""
    values, several = to_dict(staged), {}
    if (number := distributed.processes()) > 1 and not staged.run.sync_batchnorm:
        several = {"processes": number}
    return digest(
        {
            **several,
            "model": values["model"],
            "tensors": {n: [str(t.dtype), *t.shape] for n, t in model.state_dict().items()},
            "layers": repr(model),
            "sources": model_sources(model),
            "optim": values["optim"],
            "seed": staged.run.seed,
            "deterministic": staged.run.deterministic,
            "val_every": staged.eval.val_every,
            "dtype": str(choose_dtype(staged.run.amp, device)),
            "engine": engine_asked(staged, device),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "images": data.train.checksum() + data.val.checksum(),
            "augment": staged.data.augment,
            "crop_padding": staged.data.crop_padding,
            "crop_mode": staged.data.crop_mode,
            "flip": staged.data.flip,
            "versions": [torch.__version__, cure_fast.__version__],
        }
    )


def model_sources(model: ImageClassifier) -> dict[str, str]:
    """Return the SHA-256 of each file of code that makes the network, by the name of its module.

    These are the files of its layers' classes and, for ``package.module:function``, that of the
    function; torch's are left to its version. A class of a notebook has none, and nothing says
    whether it still is the same: in its place are random digits.
    """
    names = {part.__module__ for layer in model.modules() for part in type(layer).__mro__}
    names |= {"cure_fast.models", model.description["model"].partition(":")[0]} & sys.modules.keys()
    found = {}
    for name in names - set(sys.builtin_module_names):
        file = Path(getattr(sys.modules.get(name), "__file__", None) or "")
        if not name.startswith("torch."):
            found[name] = file_hash(file) if file.is_file() else os.urandom(16).hex()
    return found


def natural_stage(config: Config) -> Config:
    """Return the configuration of the natural pre-training stage.

    Of the method's schedule and of what goes with it the stage has nothing: it has its own. It has
    no generated images either, so that runs with and without them begin from the same start.
    """
    stage, plain = config.pretrain, OptimConfig()
    return replace(
        config,
        method="natural",
        settings=MethodSettings(),
        policies={},
        data=replace(config.data, aux=None, aux_hash=None),
        model=replace(config.model, teacher=()),
        pretrain=PretrainConfig(),
        eval=replace(config.eval, networks=(), evaluate=("best",)),
        optim=replace(
            config.optim,
            epochs=stage.pretrain_epochs,
            lr=stage.pretrain_lr,
            weight_decay=stage.pretrain_weight_decay,
            schedule=stage.pretrain_schedule,
            milestones=plain.milestones,
            lr_factors=plain.lr_factors,
            clip_grad=plain.clip_grad,
        ),
        # What is logged elsewhere belongs to a run, and the cache to none.
        run=replace(config.run, tensorboard=False, wandb=None, trackio=None),
    )


def train_stage(stage: Stage, model: ImageClassifier, loader: Loader) -> None:
    """Train ``model`` to the end, from the newest checkpoint in the folder where there is one."""
    config, device = stage.config, stage.device
    # What draws from the global generators, such as dropout, draws the same whatever ran before.
    seed_all(config.run.seed)
    model.compute_dtype = choose_dtype(config.run.amp, device)
    model.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    run = build_run(config, model, loader, device, stage.teachers)
    if run.engine.reason is not None:
        say(f"engine: eager, as the fast one cannot take this run: {run.engine.reason}")
    elif run.engine.name == "fast":
        say("engine: fast")
    stage.progress.begin(stage.number)
    checkpoints = stage.folder / "checkpoints"
    # A folder without a single finished checkpoint is of a run that was killed before its first.
    resumed = distributed.first(lambda: has_checkpoints(checkpoints))
    if resumed:
        continue_from(run, checkpoints)
        say(f"{stage.name}: resumed after step {run.step}")
    stage.begin(run)
    if resumed:
        # Not before: where the run is refused its folder stays as it was.
        distributed.first(lambda: tidy_checkpoints(checkpoints, run.step))
    log = RunLog(
        stage.folder,
        stage.name,
        epochs=config.optim.epochs,
        tensorboard=config.run.tensorboard,
        wandb=config.run.wandb,
        trackio=config.run.trackio,
        upto_step=run.step,
        upto_epoch=run.epoch - (run.pending is not None),
        progress=stage.progress,
        writes=distributed.writes(),
    )
    stage.sinks.extend(log.sinks)
    save = Saver(stage.folder, config)
    try:
        fit(
            run,
            log,
            validate=lambda run, network: validate(run, network, stage),
            save=save,
            stop=stage.stop,
        )
        save.finish(run)
    except DivergedError as error:
        way_on = AFRESH if stage.name == "pretrain" else save.way_on()
        raise DivergedError(f"{error} {advice(stage)} {way_on}") from error
    finally:
        log.rows.close()
        # Engine and run hold one another, and graphs hold the memory of a step.
        run.engine.forget()


def advice(stage: Stage) -> str:
    """Return what to try after a divergence in the stage."""
    config = stage.config
    rate = "--pretrain-lr" if stage.name == "pretrain" else "--lr"
    half = choose_dtype(config.run.amp, stage.device) is not None
    return f"Try a lower {rate} than {config.optim.lr:g}{', or --amp off' if half else ''}."


def continue_from(run: TrainState, checkpoints: Path) -> None:
    """Set the run to its newest valid checkpoint; say which were skipped.

    Raises:
        InputError: if none is valid, or it belongs to another run.
    """
    state, skipped = load_checkpoint(checkpoints)
    for reason in skipped:
        say(f"warning: skipped {reason}")
    try:
        run.load_state_dict(state)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        # torch lists every tensor that differs, in lines of their own.
        detail = " ".join(str(error).split())[:200]
        raise InputError(
            f"{checkpoints}: the newest checkpoint is of another run or version "
            f"({type(error).__name__}: {detail}). "
            "Start anew with another --out, or delete the folder."
        ) from error
    former = state.get("engine", run.engine.name)
    if former != run.engine.name:
        say(
            f"engine: {former} until step {run.step}, {run.engine.name} from here on: the weights "
            "will differ in rounding from those of a run that was never stopped"
        )


def validate(run: TrainState, network: str, stage: Stage) -> dict[str, Any]:
    """Return a network's natural and robust accuracy in percent on the validation split.

    ``robust_by_class`` has an entry for each class that the split has images of. ``fgsm`` is there
    where the training attack has one step; PGD's steps are a quarter of eps there at most, as the
    long one of such an attack leads from corner to corner of the ball.
    """
    robust = f"pgd{run.config.eval.val_attack_steps}" if run.method.uses_attack else None
    attack, one_step = run.config.attack, in_one_step(run)
    val, progress = stage.data.val, stage.progress
    title = f"{stage.name} epoch {run.epoch}/{run.config.optim.epochs}, validation"
    step = attack.step_length
    try:
        results = evaluate(
            run.all_networks[network],
            torch.from_numpy(val.images),
            torch.from_numpy(val.labels),
            num_classes=len(val.classes),
            attacks=["natural", *([robust] if robust else []), *(["fgsm"] if one_step else [])],
            eps=attack.eps,
            norm=attack.norm,
            step_size=min(step, attack.eps / 4) if one_step else step,
            batch_size=run.config.eval.eval_batch_size,
            device=run.device,
            seed=run.config.run.seed,
            stop=stage.stop,
            work=lambda spec: progress.work(
                f"{stage.name}/{network}/{spec.name}", title, round=run.epoch - 1
            ),
        )
    except DivergedError as error:
        raise DivergedError(f"after epoch {run.epoch}: {error}") from error
    if robust and network == run.result:
        # AutoAttack on the test images will meet about as many that are robust.
        shares = results["natural"].accuracy, results[robust].accuracy
        expect_autoattack(progress, "trained", run.config.eval, stage.data.test, *shares)
    by_class = [p for p in results[robust or "natural"].by_class if p is not None]
    return {
        "natural": results["natural"].accuracy,
        "robust": results[robust].accuracy if robust else None,
        "attack": robust,
        "count": results["natural"].count,
        "robust_by_class": by_class if robust else None,
        **({"fgsm": results["fgsm"].accuracy} if one_step else {}),
    }
