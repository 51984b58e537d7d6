"""What a training stage moves, and the loop over its epochs; ``step.py`` has one step."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from cure_fast.attacks import pgd
from cure_fast.config import Config, OptimConfig
from cure_fast.engine import Engine, open_engine
from cure_fast.errors import DivergedError, StoppedError
from cure_fast.loaders import Loader
from cure_fast.methods import find_method
from cure_fast.models import ImageClassifier, protect_pointwise
from cure_fast.progress import track
from cure_fast.runs.log import RunLog
from cure_fast.runs.random_state import random_state, restore_random_state
from cure_fast.step.method import Method, Policy, Terms
from cure_fast.step.train_step import Undo
from cure_fast.training.schedules import lr_at

P = TypeVar("P", bound=Policy)


@dataclass
class Run:
    """Everything one training stage moves; what a checkpoint stores is in :meth:`state_dict`.

    Attributes:
        config: the whole configuration.
        method: the training method.
        model: the network that is trained.
        optimizer: moves the model's parameters.
        loader: feeds the training images.
        device: where all of it lives.
        scaler: loss scaling for fp16; passes everything through in other precisions.
        generators: sources of random numbers by use: ``attack``. Policies draw by (seed, step).
        networks: further networks by name, such as CURE's revision model.
        policies: what else touches weights or gradients, in order.
        epoch: 0-based epoch under way.
        batch: 0-based batch of the epoch that comes next, or is under way.
        step: 0-based step of the run that comes next, or is under way.
        sums: sums of the terms over the epoch under way, and in ``counted`` of how many steps.
        skipped: steps of the epoch under way that moved nothing, as something was not finite.
        skipped_in_row: how many of the last steps that holds for.
        micro_batch_size: images per pass; None for the whole batch.
        gradients: sets of gradients of the step under way beside ``.grad``, by name.
        undo: copies of what a step's passes move, made at the first step.
        pending: row of an epoch that is trained but not yet validated.
        best: validation accuracy in percent of the best epoch so far: (selected, natural), and
            its 1-based number.
        engine: computes the steps.
    """

    config: Config
    method: Method
    model: ImageClassifier
    optimizer: torch.optim.Optimizer
    loader: Loader
    device: torch.device
    scaler: torch.amp.GradScaler  # pyright: ignore[reportPrivateImportUsage]
    generators: dict[str, torch.Generator]
    networks: dict[str, nn.Module] = field(default_factory=dict)
    policies: tuple[Policy, ...] = ()
    epoch: int = 0
    batch: int = 0
    step: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    counted: int = 0
    skipped: int = 0
    skipped_in_row: int = 0
    micro_batch_size: int | None = None
    gradients: dict[str, list[Tensor]] = field(default_factory=dict)
    undo: Undo | None = None
    pending: dict[str, Any] | None = None
    best: tuple[float, float, int] | None = None
    engine: Engine = field(init=False)

    @property
    def settings(self) -> Any:
        """The method's settings, of the type its file defines."""
        return self.config.settings

    @property
    def all_networks(self) -> dict[str, nn.Module]:
        """The trained network, as ``model``, and the further ones, by name."""
        return {"model": self.model, **self.networks}

    @property
    def total_steps(self) -> int:
        """Number of steps of the whole run."""
        return self.loader.batches_per_epoch * self.config.optim.epochs

    @property
    def position(self) -> int:
        """0-based place of the step among :attr:`total_steps`."""
        return self.epoch * self.loader.batches_per_epoch + self.batch

    @property
    def progress(self) -> float:
        """Share of the run's steps that is done, in [0, 1).

        Of the epochs and not of ``step``, which counts steps of another size too where
        ``--override`` changed the batches of a resumed run.
        """
        return self.position / self.total_steps

    @property
    def attack_steps(self) -> int:
        """Number of steps of the attack in this training step."""
        attack = self.config.attack
        if self.progress >= attack.attack_ramp:
            return attack.attack_steps
        grown = attack.attack_steps * self.progress / attack.attack_ramp
        return min(attack.attack_steps, 1 + int(grown))

    def scale(self, loss: Tensor) -> Tensor:
        """Return the loss times fp16's scale (itself in other precisions)."""
        return self.scaler.scale(loss)

    def backward(
        self,
        total: Tensor,
        further: Mapping[str, Tensor] | None = None,
        parameters: Sequence[Tensor] = (),
    ) -> None:
        """Add the gradients of a pass; see :meth:`cure_fast.engine.Engine.backward`."""
        self.engine.backward(total, further or {}, parameters)

    def add_gradients(self, name: str, grads: list[Tensor]) -> None:
        """Add a pass's part to the set of gradients ``name``."""
        if name in self.gradients:
            torch._foreach_add_(self.gradients[name], grads)  # pyright: ignore[reportPrivateImportUsage]
        else:
            self.gradients[name] = grads

    def policy(self, kind: type[P]) -> P:
        """Return the run's policy of type ``kind``."""
        return next(policy for policy in self.policies if isinstance(policy, kind))

    def pgd(self, x: Tensor, objective: Callable[[Tensor], Tensor]) -> Tensor:
        """Return PGD images [N, C, H, W] that raise ``objective``, by the configured attack."""
        attack = self.config.attack
        return pgd(
            self.model,
            x,
            objective,
            eps=attack.eps,
            step_size=attack.step_size,
            steps=self.attack_steps,
            start=attack.start,
            clamp_start=attack.clamp_start,
            generator=self.generators["attack"],
        )

    def state_dict(self) -> dict[str, Any]:
        """Return all that :meth:`load_state_dict` needs to continue: tensors and plain values."""
        self.engine.flush()
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "generators": {name: g.get_state() for name, g in self.generators.items()},
            "networks": {name: net.state_dict() for name, net in self.networks.items()},
            "policies": [policy.state_dict() for policy in self.policies],
            "epoch": self.epoch,
            "batch": self.batch,
            "step": self.step,
            "sums": self.sums,
            "counted": self.counted,
            "skipped": self.skipped,
            "skipped_in_row": self.skipped_in_row,
            "micro_batch_size": self.micro_batch_size,
            "micro_batch_asked": self.config.optim.micro_batch_size,
            "pending": self.pending,
            "best": self.best,
            "random": random_state(),
            # Its name alone, to say so where another one goes on.
            "engine": self.engine.name,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned."""
        groups = self.optimizer.param_groups
        self.engine.forget()
        self.model.load_state_dict(state["model"])
        # The configuration decides, which --override may have changed; the rate is set each step.
        own = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, settings in zip(self.optimizer.param_groups, own, strict=True):
            group.update(settings)
        self.scaler.load_state_dict(state["scaler"])
        for name, generator in self.generators.items():
            generator.set_state(state["generators"][name].cpu())
        for name, network in self.networks.items():
            network.load_state_dict(state["networks"][name])
        for policy, policy_state in zip(self.policies, state["policies"], strict=True):
            policy.load_state_dict(policy_state)
        self.epoch, self.batch, self.step = state["epoch"], state["batch"], state["step"]
        self.sums = {name: value.to(self.device) for name, value in state["sums"].items()}
        for name in ("counted", "skipped", "skipped_in_row", "pending"):
            setattr(self, name, state[name])
        if state["micro_batch_asked"] == self.config.optim.micro_batch_size:
            self.micro_batch_size = state["micro_batch_size"]
        self.best = None if state["best"] is None else tuple(state["best"])
        restore_random_state(state["random"])


def build_run(config: Config, model: ImageClassifier, loader: Loader, device: torch.device) -> Run:
    """Return a run at its first step: optimiser, random sources, further networks and policies."""
    model.train()
    # A network of the user's own has not come through build_model.
    protect_pointwise(model)
    fp16 = model.compute_dtype is torch.float16
    run = Run(
        config=config,
        micro_batch_size=config.optim.micro_batch_size,
        method=find_method(config.method),
        model=model,
        optimizer=build_optimizer(config.optim, model),
        loader=loader,
        device=device,
        scaler=torch.amp.GradScaler(device.type, enabled=fp16),  # pyright: ignore[reportPrivateImportUsage]
        generators={"attack": torch.Generator(device).manual_seed(config.run.seed * 2)},
    )
    run.networks = {name: net.to(device) for name, net in run.method.networks(run).items()}
    run.engine = open_engine(run)
    run.policies = run.method.policies(run)
    return run


def build_optimizer(optim: OptimConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimiser over all parameters; weight decay acts on every one of them."""
    if optim.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), lr=optim.lr, weight_decay=optim.weight_decay)
    return torch.optim.SGD(
        model.parameters(),
        lr=optim.lr,
        momentum=optim.momentum,
        weight_decay=optim.weight_decay,
        nesterov=optim.nesterov,
    )


def set_lr(run: Run) -> float:
    """Set and return the learning rate of the step that comes next."""
    lr = lr_at(run.config.optim, run.progress)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    return lr


def next_step(run: Run, x: Tensor, y: Tensor) -> tuple[float, Terms | None]:
    """Train on one batch and advance; return the learning rate and what the engine returns."""
    lr = set_lr(run)
    terms = run.engine.step(x, y)
    run.batch += 1
    run.step += 1
    return lr, terms


def train_epoch(run: Run, log: RunLog, stop: Callable[[], bool]) -> dict[str, Any]:
    """Train to the end of the epoch under way; return its row of metrics.

    Raises:
        DivergedError: when too many steps in a row, or all of the epoch, are not finite.
        StoppedError: when ``stop()`` says so, after the step under way.
    """
    config = run.config
    started, images = time.monotonic(), 0
    total = run.loader.num_images
    title = f"{log.stage} epoch {run.epoch + 1}/{config.optim.epochs}"
    with (
        track(title, total) as advance,
        run.loader.epoch(run.epoch, start_batch=run.batch) as batches,
    ):
        advance(run.batch * config.optim.batch_size)
        for x, y in batches:
            lr, terms = next_step(run, x, y)
            done = run.step - 1
            if terms is not None and done % config.run.log_every == 0:
                epoch = (run.position - 1) / run.loader.batches_per_epoch
                log.step(done, epoch, lr, terms, skipped=run.skipped)
            images += len(y)
            advance(len(y))
            if stop():
                raise StoppedError("stopped by a signal")
    run.engine.flush()
    if not run.counted:
        raise DivergedError(f"no step of epoch {run.epoch + 1} had a finite loss.")
    means = {name: float(value / run.counted) for name, value in run.sums.items()}
    seconds = time.monotonic() - started
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
        **policy_metrics(run),
    }
    run.epoch, run.batch = run.epoch + 1, 0
    run.engine.reset_sums()
    return row


def policy_metrics(run: Run) -> dict[str, Any]:
    """Return what the policies report of the epoch; these two keys are always there."""
    row: dict[str, Any] = {"updated": None, "revision": None}
    for policy in run.policies:
        row |= policy.epoch_metrics(run)
    return row


def fit(
    run: Run,
    log: RunLog,
    *,
    validate: Callable[[Run], dict[str, Any]],
    save: Callable[[Run, bool], None],
    stop: Callable[[], bool],
) -> None:
    """Train to the last epoch: per epoch, train, validate, note the best, save, log.

    Args:
        run: what is moved.
        log: receives one row per epoch and one per logging step.
        validate: from the run to ``{"natural", "robust", "attack", "count"}``, percent and counts;
            may raise ``StoppedError``, after which a resumed run validates anew.
        save: stores the run; the second argument tells whether this epoch is the best so far.
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
            validation = validate(run) if due else None
        except StoppedError:
            save(run, False)
            raise
        row, run.pending = {**run.pending, "validation": validation}, None
        best = validation is not None and note_best(run, validation)
        # The row goes first: a run killed between the two writes it again after --resume.
        log.epoch(row)
        if best or last or run.epoch % config.run.checkpoint_every == 0:
            save(run, best)


def note_best(run: Run, validation: dict[str, Any]) -> bool:
    """Return whether this epoch beats all before it, and remember it if so.

    The robust accuracy decides, and the natural one where it is equal; natural training is judged
    by natural accuracy alone.
    """
    selected = validation["robust"] if run.method.uses_attack else validation["natural"]
    score = (selected, validation["natural"])
    if run.best is not None and score <= run.best[:2]:
        return False
    run.best = (*score, run.epoch)
    return True
