"""What a word names outside of the package: ``package.module:name``, or an installed plug-in.

A plug-in is an entry point of the group ``cure_fast.methods``, ``cure_fast.policies``,
``cure_fast.models`` or ``cure_fast.data``. None is imported before it is asked for.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import entry_points
from operator import attrgetter
from typing import Any, Literal

Kind = Literal["methods", "policies", "models", "data"]


@functools.cache
def installed(kind: Kind) -> Mapping[str, str]:
    """Return the references of installed plug-ins of a kind, by name."""
    return {entry.name: entry.value for entry in entry_points(group=f"cure_fast.{kind}")}


def is_reference(word: str) -> bool:
    """Return whether a word names code itself, as ``package.module:name`` does."""
    return ":" in word


def is_outside(kind: Kind, word: str) -> bool:
    """Return whether a word is a reference or the name of an installed plug-in."""
    return is_reference(word) or word in installed(kind)


def short(word: str) -> str:
    """Return the last part of a reference, for names of folders and labels; others as they are."""
    return word.rpartition(":")[2]


def load(kind: Kind, word: str) -> tuple[Any, str]:
    """Return what a word of :func:`is_outside` names, and "" or why it cannot be had.

    A module may also lie in the working folder, which is searched last: nothing in it stands before
    what is installed.
    """
    reference = word if is_reference(word) else installed(kind)[word]
    # A user's own code is not made to run with what stands in for torch.
    if needs_torch := getattr(sys.modules.get("torch"), "stands_in", None):
        raise needs_torch(reference)
    module, _, name = reference.partition(":")
    with suppress(FileNotFoundError):  # the working folder is gone
        if (here := os.getcwd()) not in sys.path:
            sys.path.append(here)
    try:
        return attrgetter(name)(importlib.import_module(module)), ""
    # Code of the user's own: whatever it throws is told in one line; a script ends by SystemExit.
    except (Exception, SystemExit) as error:
        return None, (
            f"cannot be imported ({first_line(error)}). Expected package.module:name of what is "
            "installed, in a folder of PYTHONPATH, or in this folder."
        )


def loaded(word: str) -> Any:
    """Return what the name of a method or policy from outside names, None unless it is imported."""
    reference = installed("methods").get(word) or installed("policies").get(word) or word
    module, _, name = reference.partition(":")
    return getattr(sys.modules.get(module), name, None)


def first_line(error: BaseException) -> str:
    """Return the type of an error and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).strip().split(chr(10))[0]}"
