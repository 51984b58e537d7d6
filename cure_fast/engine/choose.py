"""Which engine computes a run's steps, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import fx, nn

from cure_fast.config import Config
from cure_fast.console import warn

from .eager import Engine
from .fast import FastEngine
from .trace import UnsupportedNetworkError, reaching, trace

if TYPE_CHECKING:
    from cure_fast.training.trainer import Run


def open_engine(run: Run) -> Engine:
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
    if run.config.run.joint_forward and run.method.uses_attack:
        missing = missing_for_joint_forward(engine)
        if missing is not None:
            warn(f"--joint-forward has no effect {missing}")
    return engine


def missing_for_joint_forward(engine: Engine) -> str | None:
    """Return where ``--joint-forward`` has no effect, or None where it has one."""
    if not isinstance(engine, FastEngine):
        return "on the eager engine"
    if not engine.has("stack"):
        return "with --engine-without stack"
    if engine.run.model.compute_dtype is not None and not engine.has("copies"):
        return "with --engine-without copies in half precision"
    return None


def engine_asked(config: Config, device: torch.device) -> str:
    """Return the engine that the configuration asks for on this device: ``eager`` or ``fast``."""
    if config.run.engine == "auto":
        return "fast" if device.type == "cuda" else "eager"
    return config.run.engine


def obstacle_of(run: Run) -> str | None:
    """Return why the fast engine cannot compute the run's steps, or None if it can."""
    optim = run.config.optim
    if optim.optimizer != "sgd":
        return f"its update is SGD's, and --optimizer is {optim.optimizer}"
    if optim.micro_batch_size is not None:
        return "it takes whole batches, and --micro-batch-size cuts them"
    if run.scaler.is_enabled():
        return "it has no loss scaling, which fp16 needs; --amp bf16 goes without"
    if any(parameter.dtype != torch.float32 for parameter in run.model.parameters()):
        return "it keeps float32 weights, and the network's are of another type"
    try:
        graph = trace(run.model)
    except UnsupportedNetworkError as error:
        return str(error)
    idle = set(dict(run.model.named_parameters())) - taking_part(graph, run.model)
    if idle:
        return f"it updates every weight, and {min(idle)} takes no part in the network's logits"
    return None


def taking_part(graph: fx.Graph, model: nn.Module) -> set[str]:
    """Return the names of the parameters that the graph's output depends on."""
    return {
        f"{node.target}.{name}"
        for node in reaching(graph.output_node())
        if node.op == "call_module"
        for name, _ in model.get_submodule(str(node.target)).named_parameters()
    }
