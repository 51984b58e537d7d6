"""Saving a run while it trains: what is kept when, and what happens when the disk is full."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from cure_fast.config import Config
from cure_fast.config.values import to_dict
from cure_fast.console import warn
from cure_fast.errors import DivergedError, InputError
from cure_fast.models import ImageClassifier
from cure_fast.models.weights import save_weights
from cure_fast.runs.checkpoint import newest_checkpoint, save_checkpoint
from cure_fast.step.state import TrainState

# Names of files of weights: the run's result, and the trained network where that is another.
RESULT, RAW = "model", "raw"


def weights_metadata(config: Config, network: nn.Module) -> dict[str, str]:
    """Return what a file of weights says of itself: enough to rebuild the network and its data."""
    told = {"recipe": config.name, "method": config.method, "eps": repr(config.attack.eps)}
    if config.policies:
        told["policies"] = ",".join(config.policies)
    return told | (network.description if isinstance(network, ImageClassifier) else {})


class Saver:
    """Stores checkpoints, and the best epoch's weights for evaluation.

    Best weights that could not be written are kept in memory and tried again at each later save;
    the checkpoint marked as best is then the newest best one that could be written.
    """

    def __init__(self, folder: Path, config: Config) -> None:
        self.folder, self.checkpoints = folder, folder / "checkpoints"
        self.config = config
        # Tensors and metadata, by name of the file.
        self.owed: dict[str, tuple[dict[str, Tensor], dict[str, str]]] = {}

    def __call__(self, run: TrainState, best: bool) -> None:
        """Store the run; with ``best``, its weights as the best ones too.

        Raises:
            DivergedError: if a weight is not finite; nothing is stored.
            InputError: if storing fails and ``--on-save-failure`` says stop.
        """
        check_weights(run)
        if best:
            # The result is always in model.safetensors, which every other command reads.
            files, self.owed = {"model": RAW, run.result: RESULT}, {}
            for name, network in run.all_networks.items():
                metadata = weights_metadata(self.config, network) | {"epoch": str(run.epoch)}
                self.owed[files.get(name, name)] = network.state_dict(), metadata
        try:
            self._write_owed()
            values = to_dict(self.config)
            save_checkpoint(self.checkpoints, run.step, run.state_dict(), values, best=best)
        except OSError as error:
            # The next step moves the networks' own tensors.
            self.owed = {
                name: ({key: t.to("cpu", copy=True) for key, t in state.items()}, metadata)
                for name, (state, metadata) in self.owed.items()
            }
            if self.config.run.on_save_failure == "stop":
                raise self._failure(error) from error
            warn(f"{self._failure(error)} Training goes on.")

    def finish(self) -> None:
        """Write what is still owed.

        Raises:
            InputError: if that fails; without the best weights there is nothing to evaluate.
        """
        try:
            self._write_owed()
        except OSError as error:
            raise self._failure(error) from error

    def last(self) -> str:
        """Return a sentence on where the last state is from which training can go on."""
        newest = newest_checkpoint(self.checkpoints)
        return f"The last checkpoint is {newest}." if newest else "No checkpoint was saved yet."

    def way_on(self) -> str:
        """Return a sentence or two on how to go on after a divergence."""
        if newest_checkpoint(self.checkpoints):
            return f"{self.last()} --resume goes on from there; to go back further, delete it."
        return "No checkpoint was saved yet: start again with that in a new folder."

    def _write_owed(self) -> None:
        if not self.folder.is_dir():
            # Made anew it would lack the configuration, and nobody would look for it.
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.folder))
        for name in list(self.owed):
            state, metadata = self.owed[name]
            save_weights(state, self.folder / f"{name}.safetensors", metadata)
            del self.owed[name]

    def _failure(self, error: OSError) -> InputError:
        return InputError(
            f"cannot save to {self.folder}: {error.strerror or error}. {self.last()} Mend that and "
            "continue with --resume."
        )


def check_weights(run: TrainState) -> None:
    """Raise :class:`DivergedError` unless all that a checkpoint stores of the networks is finite.

    Finite gradients can still move a weight past the largest number.
    """
    for name, network in run.all_networks.items():
        values = [value for value in network.state_dict().values() if value.is_floating_point()]
        if not torch.nn.utils.get_total_norm(values).isfinite():
            raise DivergedError(
                f"a weight or statistic of the {name} is not finite after step {run.step}."
            )
