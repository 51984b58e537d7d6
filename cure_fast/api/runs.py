"""Runs from Python: a configuration by the name of a recipe, and the whole job."""

from __future__ import annotations

import os
from typing import Any

from cure_fast.api.answers import RunFolder
from cure_fast.config import Config
from cure_fast.signals import StopSignals
from cure_fast.training.choices import configure
from cure_fast.training.job import train as run_job


def recipe(start: str | os.PathLike[str] | Config, /, **overrides: Any) -> Config:
    """Return the configuration of a recipe or of a run's folder, with other values of fields.

    Args:
        start: a recipe (``cure-fast list``), the folder of a run, or a configuration to change.
        overrides: fields by name, as the flags of ``cure-fast train`` are: ``epochs=3``,
            ``eps=8 / 255``, ``method="trades"``, ``policies=["piat"]``.

    Raises:
        InputError: a ``ValueError`` with the one line that the command line has for it.
    """
    return configure(start, overrides)


def train(
    start: str | os.PathLike[str] | Config,
    /,
    *,
    resume: bool = False,
    override: bool = False,
    **overrides: Any,
) -> RunFolder:
    """Train, attack and report, as ``cure-fast train`` does, and return the folder of the run.

    In the main thread Ctrl-C and SIGTERM save after the step under way and raise ``StoppedError``;
    the same call with ``resume`` goes on from there. A second Ctrl-C is a ``KeyboardInterrupt``.

    Args:
        start: a recipe, the folder of a run, or a configuration, as :func:`recipe` takes.
        resume: continue the run in ``out``, or the newest of this recipe, method, policies and
            seed.
        override: with ``resume``: continue although fields differ from what the run was made with.
        overrides: fields by name, as :func:`recipe` takes.

    Raises:
        CureFastError: an ``InputError`` before anything is written; ``StoppedError``,
            ``DivergedError`` or ``MemoryExhaustedError`` of what was under way.
    """
    config = configure(start, overrides)
    with StopSignals(leaves=False) as stop:
        return RunFolder(run_job(config, resume=resume, override=override, stop=stop))
