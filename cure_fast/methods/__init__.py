"""All training methods, one file per paper; ``--method`` chooses from ``METHODS``."""

from __future__ import annotations

import difflib
from dataclasses import replace

from cure_fast.config import Config
from cure_fast.errors import InputError
from cure_fast.methods.cure import CURE, CURE_EFF, CURE_EFF_OFFICIAL, CURE_OFFICIAL, CURE_PAPER
from cure_fast.methods.natural import NATURAL
from cure_fast.methods.pgd_at import PGD_AT
from cure_fast.methods.trades import TRADES
from cure_fast.step.method import Method

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        CURE,
        CURE_PAPER,
        CURE_OFFICIAL,
        CURE_EFF,
        CURE_EFF_OFFICIAL,
        TRADES,
        PGD_AT,
        NATURAL,
    )
}


def find_method(name: str) -> Method:
    """Return the method called ``name``.

    Raises:
        InputError: for an unknown name; lists the valid ones.
    """
    if name in METHODS:
        return METHODS[name]
    near = difflib.get_close_matches(name, METHODS, n=1)
    hint = f" Perhaps you meant {near[0]}." if near else ""
    raise InputError(
        f"--method: unknown method {name!r}; the methods are {', '.join(METHODS)}.{hint}"
    )


def select_method(config: Config, name: str) -> Config:
    """Return ``config`` with the method ``name`` and its preset.

    Settings that the recipe chose stay where the method has the same ones; a method with other
    settings starts from its own defaults.
    """
    method = find_method(name)
    same = type(method.settings) is type(config.settings)
    settings = config.settings if same else method.settings
    return method.preset(replace(config, method=name, settings=settings))
