"""Answers before torch is there: help, lists, and what is wrong with the words.

Importing torch takes seconds. No module of this package computes at its import, so that all of
them, with every method and its settings, can be imported while stand-ins take the places of torch
and NumPy. That is done in a child process, so that nothing of it remains.
"""

from __future__ import annotations

import importlib.machinery
import os
import sys
import types
from collections.abc import Sequence
from typing import Any, NoReturn

from cure_fast.errors import NeedsTorchError

SLOW = ("torch", "triton", "torchvision", "numpy", "safetensors")
# Exit codes of the child where something is left to do, and where it has to begin anew.
GO_ON, REPEAT = 64, 65


class _Kind(type):
    """Of classes whose attributes, items, unions and instances are all :class:`_Anything`."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything

    def __getitem__(cls, item: Any) -> Any:
        return _Anything

    def __or__(cls, other: Any) -> Any:
        return _Anything

    __ror__ = __or__

    def __call__(cls, *given: Any, **named: Any) -> Any:
        if cls is not _Anything:
            return super().__call__(*given, **named)
        # As a decorator it returns what it is given.
        return given[0] if len(given) == 1 and callable(given[0]) and not named else _Anything


class _Anything(metaclass=_Kind):
    """What stands for every class, function and value of a slow module."""

    def __init_subclass__(cls, **named: Any) -> None:
        """Take whatever a class is made with."""


class _Module(types.ModuleType):
    """A stand-in for a slow module or one of its own."""

    # What is raised where the module itself is needed.
    stands_in = NeedsTorchError

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything


class _StandIns:
    """Finds a stand-in for each slow module."""

    def find_spec(self, name: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] not in SLOW:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)  # pyright: ignore[reportArgumentType]

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Leave it empty."""


def answered(words: Sequence[str]) -> int:
    """Answer what needs no tensors; return the exit code, or :data:`GO_ON` or :data:`REPEAT`."""
    if any(name in sys.modules for name in SLOW):
        return REPEAT
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        _answer(words)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def _answer(words: Sequence[str]) -> NoReturn:
    """Answer and end this process."""
    code = REPEAT
    try:
        sys.meta_path.insert(0, _StandIns())  # pyright: ignore[reportArgumentType]
        from cure_fast.cli.main import main

        code = main(words, turn="first")
    except NeedsTorchError:
        code = GO_ON
    finally:
        # What else there was to raise comes again where torch is torch.
        os._exit(code)
