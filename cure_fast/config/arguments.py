"""Arguments of the commands besides ``train``, whose flags are the configuration itself.

As there, the docstring under a field is the flag's help and states its unit and range.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cure_fast.config.checks import check_literals, check_range


@dataclass(frozen=True, kw_only=True)
class EvalArgs:
    """Arguments of ``cure-fast eval``, beside the run folder or file of weights to attack."""

    attacks: tuple[str, ...] | None = None
    """Attacks, with commas: natural, pgdK, cwK (K steps), aa (AutoAttack standard); None takes the
    run's own, or natural,pgd20,cw20 for a file."""
    limit: int | Literal["all"] | None = None
    """Test images to use, the first ones, 1 or more, or the word all; None takes the run's own, or
    all for a file."""
    aa_limit: int | Literal["all"] | None = None
    """Test images for AutoAttack alone, the first ones of --limit's, 1 or more, or the word all for
    all of those; None takes the run's own, or all for a file."""
    eps: float | None = None
    """Radius in pixel units of [0, 1], such as 8/255; None takes the run's own, or for a file the
    one it was trained with where it says so, else 8/255."""
    step_size: float | None = None
    """Step of pgdK and cwK in pixel units of [0, 1]; None takes the run's own, or a tenth of eps
    for a file or where the run has none."""
    batch_size: int | None = None
    """Images per batch; changes the time, not the result, but for aa, which draws its random starts
    per batch; None takes the run's own, or 256 for a file."""
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto: the GPU where there is one."""
    seed: int | None = None
    """Seed of the attacks' random starts, 0 or more; None takes the run's own, or 0 for a file."""
    data_root: str | None = None
    """Folder that holds the data sets; None takes the run's own, or data for a file."""
    data: str | None = None
    """For a file alone: data set of the test images; None takes the one it says."""
    model: str | None = None
    """For a file alone: architecture; None takes the one it says."""
    width: int | None = None
    """For a file alone: width of the architecture; None takes what it says, else the published."""
    stem: Literal["cifar", "imagenet"] | None = None
    """For a file alone: first layer, 3x3 stride 1 (cifar) or 7x7 stride 2 and max-pool (imagenet);
    None takes what it says, else cifar."""
    normalize: Literal["none", "dataset"] | None = None
    """For a file alone: whether the model first takes the data set's mean and deviation out; None
    takes what it says, else none."""
    out: str | None = None
    """For a file alone: folder for results.json and resumable states; None keeps nothing."""

    def __post_init__(self) -> None:
        for name in ("limit", "aa_limit"):
            if getattr(self, name) not in (None, "all"):
                check_range(self, name, 1)
        bounds = {
            "eps": (0, 1),
            "step_size": (0, 1),
            "batch_size": (1, 1_000_000),
            "seed": (0, 2**63 - 1),
            "width": (1, 4096),
        }
        for name, (low, high) in bounds.items():
            if getattr(self, name) is not None:
                check_range(self, name, low, high)


@dataclass(frozen=True, kw_only=True)
class DataWriteArgs:
    """Arguments of ``cure-fast data write``, beside the data set."""

    data_root: str = "data"
    """Folder that holds the data sets, or receives them when they are downloaded."""
    train_images: int | None = None
    """Number of training images, 1 or more, as for training; None takes all but --val-images."""
    val_images: int = 1000
    """Images held out of the training set, 1 or more, as for training."""
    split_seed: int = 0
    """Seed of the draw of training and validation images, 0 or more, as for training."""
    cache: str = "~/.cache/cure-fast"
    """Folder for the FFCV file and its manifest."""

    def __post_init__(self) -> None:
        if self.train_images is not None:
            check_range(self, "train_images", 1)
        check_range(self, "val_images", 1)
        check_range(self, "split_seed", 0)


@dataclass(frozen=True, kw_only=True)
class ExportArgs:
    """Arguments of ``cure-fast export``, beside the run folder or file of weights to export."""

    format: Literal["safetensors", "onnx", "robustbench"] = "safetensors"
    """safetensors: weights and description; onnx: a network for ONNX Runtime, normalisation inside;
    robustbench: weights that RobustBench's own class loads strictly, with its model-info JSON."""
    layout: Literal["plain", "sub_block1"] = "plain"
    """For robustbench and wide ResNets alone: sub_block1 adds the unused group that weights of
    TRADES and the codes after it have."""
    out: str | None = None
    """File to write, ending in .safetensors, .onnx or .pt by the format; None takes
    export/model.* in the run folder, or the folder export beside the file of weights."""
    force: bool = False
    """Replace the file where it exists."""
    data_root: str | None = None
    """Folder that holds the data sets, whose test images the file is verified on; None takes the
    run's own, or data for a file. Nothing is downloaded: random images stand in for absent ones."""

    def __post_init__(self) -> None:
        check_literals(self)
