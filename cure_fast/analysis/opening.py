"""Networks from Python: a module, the folder of a run, or a file of weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from cure_fast.config import Norm
from cure_fast.config.arguments import EvalArgs
from cure_fast.config.checks import check, shown
from cure_fast.errors import InputError
from cure_fast.evaluation.given import as_number
from cure_fast.evaluation.record import main_settings, stated_settings
from cure_fast.models.building import load_model
from cure_fast.models.weights import read_metadata
from cure_fast.runs.environment import choose_device
from cure_fast.runs.folder import load_config

# Radius for a network that does not say its own.
EPS = 8 / 255


def load(source: str | os.PathLike[str], *, model: str | None = None) -> nn.Module:
    """Return the network of a run, or in a file of weights, on the CPU and in evaluation mode.

    Args:
        source: folder of a run, whose result is loaded; or a file of weights that cure-fast wrote,
            such as ``runs/x/start.safetensors``.
        model: the function of your own that makes the network of a file, as ``--model`` names it:
            no file by itself decides which code is run.

    Raises:
        InputError: for what is neither, or weights that do not fit.
    """
    path = path_of(source)
    if path.is_dir():
        model = load_config(path).model.model
        path /= "model.safetensors"
    return load_model(path, trusted=model).eval()


def opened(
    model: Any, eps: float | str | None, norm: Norm | None
) -> tuple[nn.Module, dict[str, Any]]:
    """Return the network, where it computes, and the norm and radius to attack it with."""
    own: dict[str, Any] = {"norm": "linf", "eps": EPS}
    if not isinstance(model, nn.Module):
        own = own_ball(path_of(model))
        model = load(model).to(choose_device("auto"))
    if norm not in (None, own["norm"]):
        check(eps is not None, "norm", norm, f"a radius of its own with it, eps; {EPS} is linf's")
    given = {"norm": norm, "eps": as_number("eps", eps)}
    return model, own | {name: value for name, value in given.items() if value is not None}


def path_of(model: Any) -> Path:
    """Return where a run or a file of weights is."""
    if not isinstance(model, str | os.PathLike):
        raise InputError(f"model: expected a module, a run or a file of it, got {shown(model)}.")
    return Path(model)


def own_ball(source: Path) -> dict[str, Any]:
    """Return norm and radius that a run is evaluated with, or that a file was trained with."""
    if source.is_dir():
        config = load_config(source)
    else:
        given = dict.fromkeys(vars(EvalArgs()))
        config = stated_settings(read_metadata(source), given, source)
    found = main_settings(config)
    return {name: found[name] for name in ("norm", "eps")}
