"""The first line of a job: what its configuration alone says, before anything slow is loaded."""

from __future__ import annotations

import cure_fast
from cure_fast.config import Config
from cure_fast.config.attack_names import attack_name
from cure_fast.config.checks import format_pixel


def opening(config: Config) -> str:
    """Return what a job will do, in a line; it needs neither torch nor any data."""
    model, name = config.model, "+".join((config.method, *config.policies))
    eps = format_pixel(config.attack.eps)
    steps = [f"{epochs_of(config.optim.epochs)} of {name} within eps {eps}"]
    if model.init_from is not None:
        steps.insert(0, f"weights of {model.init_from}")
    elif config.pretrain.pretrain_epochs:
        steps.insert(0, f"{epochs_of(config.pretrain.pretrain_epochs)} of natural training")
    attacks = [attack_name(attack) for attack in config.eval.attacks if attack != "natural"]
    steps += [f"attacks by {', '.join(attacks)}"] if attacks else []
    return (
        f"cure-fast {cure_fast.__version__}: {model.model} on {config.data.data}: "
        f"{', then '.join(steps)}; loading PyTorch"
    )


def epochs_of(count: int) -> str:
    """Return a number of epochs in words."""
    return f"{count} epoch{'s' if count != 1 else ''}"
