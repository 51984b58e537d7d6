"""The loop over the epochs of a training stage, and what it moves at first."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from cure_fast import distributed
from cure_fast.batch import Batch
from cure_fast.config import Config, OptimConfig
from cure_fast.engine import open_engine
from cure_fast.errors import DivergedError, InputError, StoppedError
from cure_fast.loaders import Loader
from cure_fast.methods import find_method, result_of
from cure_fast.models import ImageClassifier, protect_pointwise
from cure_fast.models.synchronised import synchronise
from cure_fast.policies import find_policy
from cure_fast.runs.log import RunLog
from cure_fast.step.gradients import LastGradients
from cure_fast.step.run import Terms
from cure_fast.step.state import TrainState
from cure_fast.step.train_step import running_statistics
from cure_fast.training.schedules import lr_at, momentum_at
from cure_fast.training.watch import collapsed, watch_step


def build_run(
    config: Config,
    model: ImageClassifier,
    loader: Loader,
    device: torch.device,
    teachers: Mapping[str, ImageClassifier] | None = None,
) -> TrainState:
    """Return a run at its first step: optimiser, random sources, further networks and policies.

    Teachers are moved to the device, where ``model`` is, get its precision, and are frozen.
    """
    model.train()
    # A network of the user's own has not come through build_model.
    protect_pointwise(model)
    for teacher in (teachers or {}).values():
        teacher.compute_dtype = model.compute_dtype
        teacher.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        teacher.eval().requires_grad_(False)
    fp16 = model.compute_dtype is torch.float16
    run = TrainState(
        config=config,
        micro_batch_size=config.optim.micro_batch_size,
        result=result_of(config),
        teachers=teachers or {},
        method=find_method(config.method),
        model=model,
        loader=loader,
        device=device,
        scaler=torch.amp.GradScaler(device.type, enabled=fp16),  # pyright: ignore[reportPrivateImportUsage]
        generators={"attack": torch.Generator(device).manual_seed(config.run.seed * 2)},
    )
    run.networks = {name: net.to(device) for name, net in run.method.networks(run).items()}
    synchronised = config.run.sync_batchnorm and distributed.processes() > 1
    # Before policies copy networks; those that they make themselves below.
    for network in run.all_networks.values() if synchronised else ():
        synchronise(network)
    # Before the policies, whose networks no optimiser moves.
    taking_gradients = (net.parameters() for net in run.all_networks.values())
    trained = [p for parameters in taking_gradients for p in parameters if p.requires_grad]
    run.optimizer = build_optimizer(config.optim, trained)
    run.last_gradients = LastGradients(run)
    chosen = (find_policy(name).build(run, s) for name, s in config.policies.items())
    run.policies = (*run.method.policies(run), *chosen)
    for policy in run.policies:
        # A method may hand its own network to a policy.
        own = policy.networks.items()
        if twice := [name for name, net in own if run.networks.get(name, net) is not net]:
            raise InputError(
                f"--policies: expected networks of other names than the method's, got a second "
                f"{', '.join(twice)}. Leave out the policy that has it."
            )
        run.networks |= {name: net.to(device) for name, net in policy.networks.items()}
        for network in policy.networks.values() if synchronised else ():
            synchronise(network)
    assert run.result in run.all_networks, f"the run has no network {run.result}"
    taken = {"model", "raw", "start", "last"} & run.networks.keys()
    assert not taken, f"files of the run folder have the names of its networks {taken}"
    run.engine = open_engine(run)
    return run


def build_optimizer(optim: OptimConfig, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """Return the optimiser over all parameters; weight decay acts on every one of them."""
    if optim.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=optim.lr, weight_decay=optim.weight_decay)
    return torch.optim.SGD(
        parameters,
        lr=optim.lr,
        momentum=optim.momentum,
        weight_decay=optim.weight_decay,
        nesterov=optim.nesterov,
    )


def next_step(run: TrainState, batch: Batch) -> tuple[float, Terms | None]:
    """Train on one batch and advance; return the learning rate and what the engine returns."""
    optim, place = run.config.optim, (run.progress, 1 / run.total_steps)
    lr = run.lr = lr_at(optim, *place)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
        if "momentum" in group:
            group["momentum"] = momentum_at(optim, *place)
    run.part = batch.part
    for policy in run.policies:
        other = policy.before(run, batch)
        batch = batch if other is None else other
    terms = run.engine.step(batch)
    run.part = None
    run.batch += 1
    run.step += 1
    return lr, terms


def train_epoch(run: TrainState, log: RunLog, stop: Callable[[], bool]) -> dict[str, Any]:
    """Train to the end of the epoch under way; return its row of metrics.

    Raises:
        DivergedError: when too many steps in a row, or all of the epoch, are not finite.
        StoppedError: when ``stop()`` says so, after the step under way.
    """
    config = run.config
    started, images = time.monotonic(), 0
    title = f"{log.stage} epoch {run.epoch + 1}/{config.optim.epochs}"
    with (
        log.progress.work(log.stage, title, round=run.epoch) as work,
        run.loader.epoch(run.epoch, start_batch=run.batch) as batches,
    ):
        work.advance(run.batch * config.optim.batch_size, skip=True)
        for batch in batches:
            lr, terms = next_step(run, batch)
            watch_step(run, batch, stage=log.stage)
            done = run.step - 1
            if terms is not None and done % config.run.log_every == 0:
                epoch = (run.position - 1) / run.loader.batches_per_epoch
                log.step(done, epoch, lr, terms, skipped=run.skipped)
            images += batch.whole
            work.advance(batch.whole)
            if distributed.any_true(stop()):
                raise StoppedError("stopped by a signal")
    run.engine.flush()
    if not run.counted:
        raise DivergedError(f"no step of epoch {run.epoch + 1} had a finite loss.")
    means = {name: float(value / run.counted) for name, value in run.sums.items()}
    seconds = time.monotonic() - started
    for policy in run.policies:
        policy.on_epoch_end(run)
    average_statistics(run)
    run.engine.weights_moved()
    row = {
        "epoch": run.epoch + 1,
        "step": run.step,
        # The last step's, also where a run was stopped after it and goes on from here.
        "lr": run.optimizer.param_groups[0]["lr"],
        "terms": means,
        "skipped": run.skipped,
        "micro_batch_size": run.micro_batch_size,
        "images": images,
        "seconds": seconds,
        "images_per_s": images / seconds,
        "engine": run.engine.description,
    }
    if gradients := run.last_gradients.statistics(run):
        row["gradients"] = gradients
    for policy in run.policies:
        row |= policy.epoch_metrics(run)
    run.epoch, run.batch = run.epoch + 1, 0
    run.engine.reset_sums()
    return row


def average_statistics(run: TrainState) -> None:
    """Take the mean over the processes of statistics that each has estimated from its images."""
    if distributed.processes() > 1 and not run.config.run.sync_batchnorm:
        kept = running_statistics(run.all_networks)
        for tensor in kept:
            tensor.div_(distributed.processes())
        distributed.sum_(kept)


def fit(
    run: TrainState,
    log: RunLog,
    *,
    validate: Callable[[TrainState, str], dict[str, Any]],
    save: Callable[[TrainState, Collection[str]], None],
    stop: Callable[[], bool],
) -> None:
    """Train to the last epoch: per epoch, train, validate, note the best networks, save, log.

    Args:
        run: what is moved.
        log: receives one row per epoch and one per logging step.
        validate: measures the network of that name (see :func:`.stages.validate`); may raise
            ``StoppedError``, after which a resumed run validates anew.
        save: stores the run, with the files of those networks that are better than ever before.
        stop: polled after each step.

    Raises:
        StoppedError: when ``stop()`` says so, once the run is saved.
    """
    epochs, config = run.config.optim.epochs, run.config
    while run.epoch < epochs or run.pending is not None:
        try:
            if run.pending is None:
                run.pending = train_epoch(run, log, stop)
            last = run.epoch == epochs
            due = last or run.epoch % config.eval.val_every == 0
            started = time.monotonic()
            validation = validated(run, validate) if due else None
        except StoppedError:
            save(run, ())
            raise
        row, run.pending = {**run.pending, "validation": validation}, None
        row["validation_seconds"] = time.monotonic() - started
        best: set[str] = set()
        if validation is not None and collapsed(run, validation):
            row["collapsed"] = True
        elif validation is not None:
            best = note_best(run, validation)
        # The row goes first: a run killed between the two writes it again after --resume.
        log.epoch(row)
        if best or last or run.epoch % config.run.checkpoint_every == 0:
            save(run, best)


def validated(
    run: TrainState, validate: Callable[[TrainState, str], dict[str, Any]]
) -> dict[str, Any]:
    """Return what the run's result reaches on the validation images.

    Where that is another network than the trained one, its name is under ``network``. What other
    candidates reach is under ``networks``, by the name of the file of their weights. Policies act
    on what the trained network reaches, before the others are measured.
    """
    assert run.pending is not None
    if "validation" not in run.pending:
        found = validate(run, "model")
        for policy in run.policies:
            policy.on_validation(run, found)
        run.engine.weights_moved()
        # Kept, as a run that is stopped from here on must not act on it again.
        run.pending["validation"] = found
    found = {
        file: run.pending["validation"] if network == "model" else validate(run, network)
        for file, network in run.candidates.items()
    }
    result = found.pop("model")
    if run.result != "model":
        result = {**result, "network": run.result}
    return {**result, "networks": found} if found else result


def note_best(run: TrainState, validation: dict[str, Any]) -> set[str]:
    """Return the files of the networks for which this epoch beats all before, and remember that.

    The robust accuracy decides, and the natural one where it is equal; natural training is judged
    by natural accuracy alone.
    """
    better = set()
    for file, found in {"model": validation, **validation.get("networks", {})}.items():
        selected = found["robust"] if run.method.uses_attack else found["natural"]
        score = (selected, found["natural"])
        if file not in run.best or score > run.best[file][:2]:
            run.best[file] = (*score, run.epoch)
            better.add(file)
    return better
