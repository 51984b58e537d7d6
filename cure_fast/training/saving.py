"""Saving a run while it trains: what is kept when, and what happens when the disk is full."""

from __future__ import annotations

import errno
import os
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor, nn

from cure_fast import distributed
from cure_fast.config import Config
from cure_fast.config.values import to_dict
from cure_fast.console import command, warn
from cure_fast.errors import CureFastError, DivergedError, InputError
from cure_fast.evaluation.record import settings_metadata
from cure_fast.evaluation.results import LAST
from cure_fast.methods import result_of
from cure_fast.models import ImageClassifier
from cure_fast.models.weights import WEIGHTS_FILE, read_metadata, save_weights
from cure_fast.runs.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from cure_fast.step.state import TrainState


def weights_metadata(config: Config, network: nn.Module) -> dict[str, str]:
    """Return what a file of weights says of itself: enough to rebuild the network and its data."""
    told = {"recipe": config.name, "method": config.method, **settings_metadata(config)}
    if config.policies:
        told["policies"] = ",".join(config.policies)
    if config.data.image_size is not None:
        told["resized"] = str(config.data.image_size)
    return told | (network.description if isinstance(network, ImageClassifier) else {})


class Saver:
    """Stores checkpoints, and each network's best weights for evaluation.

    Best weights that could not be written are kept in memory and tried again at each later save;
    the checkpoint marked as best is then the newest best one that could be written.
    """

    def __init__(self, folder: Path, config: Config) -> None:
        self.folder, self.checkpoints = folder, folder / "checkpoints"
        self.config = config
        # Tensors and metadata, by name of the file.
        self.owed: dict[str, tuple[dict[str, Tensor], dict[str, str]]] = {}

    def __call__(self, run: TrainState, best: Collection[str]) -> None:
        """Store the run, and the weights of networks whose best epoch this is.

        Those that are not validated are stored whenever the result is.

        Args:
            run: what is stored.
            best: names in ``run.candidates``.

        Raises:
            DivergedError: if a weight is not finite; nothing is stored.
            InputError: if storing fails and ``--on-save-failure`` says stop.
        """
        check_weights(run)
        run.engine.flush()
        check_alike(run)
        distributed.first(lambda: self._save(run, best))

    def _save(self, run: TrainState, best: Collection[str]) -> None:
        for file in run.files:
            judge = file if file in run.candidates else "model"
            if judge in best:
                self._owe(run, file, chosen_by=judge)
        try:
            self._write_owed()
            values = to_dict(self.config)
            save_checkpoint(
                self.checkpoints, run.step, run.state_dict(), values, best="model" in best
            )
        except OSError as error:
            # The next step moves the networks' own tensors.
            self.owed = {
                name: ({key: t.to("cpu", copy=True) for key, t in state.items()}, metadata)
                for name, (state, metadata) in self.owed.items()
            }
            if self.config.run.on_save_failure == "stop":
                raise self._failure(error) from error
            warn(f"{self._failure(error)} Training goes on.")

    def finish(self, run: TrainState) -> None:
        """Write what is still owed, and the result's last weights where they are to be evaluated.

        Raises:
            InputError: if that fails; without the best weights there is nothing to evaluate.
        """
        if "last" in self.config.eval.evaluate:
            self._owe(run, "model", to=LAST)
        distributed.first(self._write_last)

    def _write_last(self) -> None:
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

    def _owe(self, run: TrainState, file: str, *, to: str | None = None, **told: str) -> None:
        """Note that a network's weights are to be written, with what their file says of itself."""
        network = run.all_networks[run.files[file]]
        told |= {"network": run.result if file == "model" else file, "epoch": str(run.epoch)}
        metadata = weights_metadata(self.config, network) | told
        self.owed[to or file] = network.state_dict(), metadata

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


def keep_last(folder: Path, config: Config) -> None:
    """Write the result's weights after the last epoch into a run's folder, unless they are there.

    Raises:
        InputError: if the run is not at its end, or its newest checkpoint cannot be read.
    """
    path, epochs = folder / f"{LAST}.safetensors", config.optim.epochs
    if path.exists() and read_metadata(path).get("epoch") == str(epochs):
        return
    state, _ = load_checkpoint(folder / "checkpoints")
    if state["epoch"] < epochs or state["pending"] is not None:
        raise InputError(
            f"--evaluate last: the newest checkpoint is in epoch {state['epoch'] + 1} of {epochs}. "
            f"Finish the run with `{command('train', folder, '--resume')}`, or take --evaluate "
            "best."
        )
    result = result_of(config)
    weights = state["model"] if result == "model" else state["networks"][result]
    metadata = read_metadata(folder / WEIGHTS_FILE)
    metadata.pop("chosen_by", None)
    save_weights(weights, path, metadata | {"network": result, "epoch": str(epochs)})


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


def check_alike(run: TrainState) -> None:
    """Raise :class:`CureFastError` unless all processes have the same networks and policies' state.

    They move alike from the same sums; a method or policy that does not would train nothing that
    can be told.
    """
    if distributed.processes() == 1:
        return
    kept = [t for network in run.all_networks.values() for t in network.state_dict().values()]
    kept += [tensor for policy in run.policies for tensor in policy.state.values()]
    sums = [float(tensor.double().sum()) for tensor in kept]
    sums_of_all = distributed.each(lambda: sums)
    if any(other != sums_of_all[0] for other in sums_of_all):
        raise CureFastError(
            f"after step {run.step} the processes have different networks: --method "
            f"{run.config.method} or one of its policies moves them by its own images alone. "
            "Start one process, without torchrun."
        )
