"""Triton's interpreter, without what it does anew at every call of a function.

Before each call, also of one kernel's function by another, it goes through all members of
``triton.language`` to find those that it replaces: half of its time, for small tensors.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def hastened() -> Iterator[None]:
    """Have the interpreter look once where the members are that it replaces."""
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    @functools.cache
    def names(package: object) -> list[str]:
        return [name for name, member in inspect.getmembers(package) if is_builtin(member)]

    def patch_builtin(package: object, *rest: object) -> None:
        # What is replaced already is no builtin, as in the interpreter's own function.
        for name in names(package):
            member = getattr(package, name)
            if is_builtin(member):
                interpreter._patch_attr(package, name, member, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_builtin", patch_builtin)
        yield
