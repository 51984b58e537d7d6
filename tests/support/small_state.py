"""A state of a few tensors to save as a checkpoint, and what tells it from others."""

from __future__ import annotations

import torch


def state(value):
    return {
        "model": {"weight": torch.full((50,), float(value))},
        "optimizer": {"momentum": torch.full((50,), -float(value))},
        "step": value,
    }


def is_state(loaded, value):
    weight, momentum = loaded["model"]["weight"], loaded["optimizer"]["momentum"]
    return loaded["step"] == value and bool((weight == value).all() and (momentum == -value).all())
