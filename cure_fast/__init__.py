"""cure-fast: train image classifiers that stay accurate and resist attacks.

docs/python.md has an example of each function. Nothing is imported before it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cure_fast.analysis.audit import AuditResult, audit
    from cure_fast.analysis.opening import load
    from cure_fast.api.answers import Results, RunFolder
    from cure_fast.api.models import attack, evaluate
    from cure_fast.api.runs import recipe, train
    from cure_fast.config import Config
    from cure_fast.errors import CureFastError, InputError, StoppedError

__version__ = "0.1.0"
__all__ = [
    "AuditResult",
    "Config",
    "CureFastError",
    "InputError",
    "Results",
    "RunFolder",
    "StoppedError",
    "attack",
    "audit",
    "evaluate",
    "load",
    "recipe",
    "train",
]

_PLACES = {
    "api.answers": ("Results", "RunFolder"),
    "api.models": ("attack", "evaluate"),
    "api.runs": ("recipe", "train"),
    "config": ("Config",),
    "errors": ("CureFastError", "InputError", "StoppedError"),
    "analysis.audit": ("AuditResult", "audit"),
    "analysis.opening": ("load",),
}


def __getattr__(name: str) -> Any:
    for place, names in _PLACES.items():
        if name in names:
            return getattr(importlib.import_module(f"cure_fast.{place}"), name)
    if name == "analysis":
        return importlib.import_module("cure_fast.analysis")
    raise AttributeError(f"module 'cure_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
