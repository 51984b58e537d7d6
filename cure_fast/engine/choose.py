"""Which engine computes a run's steps, and why."""

from __future__ import annotations

import torch

from cure_fast.config import Config
from cure_fast.console import warn
from cure_fast.step.state import TrainState

from .eager import Engine
from .fast import FastEngine


def open_engine(run: TrainState) -> Engine:
    """Return the engine of ``--engine``, or the eager one where the fast one cannot take the run.

    ``reason`` of what is returned says in one line why it is not the fast one, where that was
    asked for or is the default.
    """
    if engine_asked(run.config, run.device) == "eager":
        engine = Engine(run)
    else:
        obstacle = obstacle_of(run)
        engine = FastEngine(run) if obstacle is None else Engine(run, reason=obstacle)
    if run.config.run.engine_without and not isinstance(engine, FastEngine):
        warn("--engine-without has no effect on the eager engine")
    return engine


def engine_asked(config: Config, device: torch.device) -> str:
    """Return the engine that the configuration asks for on this device: ``eager`` or ``fast``."""
    if config.run.engine == "auto":
        return "fast" if device.type == "cuda" else "eager"
    return config.run.engine


def obstacle_of(run: TrainState) -> str | None:
    """Return why the fast engine cannot compute the run's steps, or None if it can."""
    optim = run.config.optim
    if optim.optimizer != "sgd":
        return f"its update is SGD's, and --optimizer is {optim.optimizer}"
    if optim.micro_batch_size is not None:
        return "it takes whole batches, and --micro-batch-size cuts them"
    if run.scaler.is_enabled():
        return "it has no loss scaling, which fp16 needs; --amp bf16 goes without"
    if any(parameter.dtype != torch.float32 for parameter in run.trained_parameters):
        return "it keeps float32 weights, and the network's are of another type"
    return None
