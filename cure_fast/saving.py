"""Saving a run while it trains: what is kept when, and what happens when the disk is full."""

from __future__ import annotations

import copy
import errno
import os
import sys
from pathlib import Path

from torch import nn

from cure_fast.checkpoint import newest_checkpoint, save_checkpoint
from cure_fast.config import Config
from cure_fast.config_json import to_dict
from cure_fast.errors import InputError
from cure_fast.trainer import Run
from cure_fast.weights import save_weights


class Saver:
    """Stores checkpoints, and the best epoch's weights for evaluation.

    Best weights that could not be written are kept in memory and tried again at each later save.

    Args:
        folder: the stage's folder.
        config: its configuration.
        metadata: what files of weights say of themselves.
    """

    def __init__(self, folder: Path, config: Config, metadata: dict[str, str]) -> None:
        self.folder = folder
        self.config = config
        self.metadata = metadata
        self.owed: dict[str, nn.Module] = {}

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.folder / "checkpoints"

    def __call__(self, run: Run, best: bool) -> None:
        """Store the run; with ``best``, its weights as the best ones too.

        Raises:
            InputError: if that fails and ``--on-save-failure`` says stop.
        """
        if best:
            self.owed = {"model": run.model, **run.networks}
        try:
            self._write_owed()
            values = to_dict(self.config)
            save_checkpoint(self.checkpoints, run.step, run.state_dict(), values, best=best)
        except OSError as error:
            if self.config.run.on_save_failure == "stop":
                raise self._failure(error) from error
            print(f"warning: {self._failure(error)} Training goes on.", file=sys.stderr)
            # The next step moves the networks themselves.
            self.owed = {name: copy.deepcopy(net).cpu() for name, net in self.owed.items()}

    def finish(self) -> None:
        """Write what is still owed.

        Raises:
            InputError: if that fails; without the best weights there is nothing to evaluate.
        """
        try:
            self._write_owed()
        except OSError as error:
            raise self._failure(error) from error

    def last_good(self) -> str:
        """Return a sentence on where the last state is from which training can go on."""
        newest = newest_checkpoint(self.checkpoints)
        return (
            f"The last good checkpoint is {newest}." if newest else "No checkpoint was saved yet."
        )

    def _write_owed(self) -> None:
        if not self.folder.is_dir():
            # Made anew it would lack the configuration, and nobody would look for it.
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.folder))
        for name in list(self.owed):
            save_weights(self.owed[name], self.folder / f"{name}.safetensors", self.metadata)
            del self.owed[name]

    def _failure(self, error: OSError) -> InputError:
        return InputError(
            f"cannot save to {self.folder}: {error.strerror or error}. {self.last_good()} Mend "
            "that and continue with --resume."
        )
