"""Arguments of the commands besides ``train``, whose flags are the configuration itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from cure_fast.config import Norm, Radius
from cure_fast.config.checks import Bounds, Checked, Count, Whole


@dataclass(frozen=True, kw_only=True)
class Attacks:
    """What attacks, of ``cure-fast eval``."""

    attacks: tuple[str, ...] | None = None
    """Attacks: natural, fgsm, pgdK, cwK (K steps), pgdK-t (targeted), aa (AutoAttack standard); for
    a file natural,pgd20,cw20."""
    restarts: Count | None = None
    """Random starts of pgdK, pgdK-t and cwK, 1 or more; an image is right that is so after all."""


@dataclass(frozen=True, kw_only=True)
class Opening(Checked):
    """How runs and files of weights are opened, and within which ball they are attacked.

    None takes the run's own, or what a file says of itself.
    """

    limit: Count | Literal["all"] | None = None
    """Test images to use, the first ones, 1 or more, or the word all; for a file all."""
    eps: Radius | None = None
    """Radius in pixel units, such as 8/255, which a file has that says none; 0 to 1, in L2 to
    1000."""
    norm: Norm | None = None
    """The ball: what bounds the change of each pixel (linf), or the length of an image's whole
    change (l2). Another than the run's or file's own needs --eps with it."""
    step_size: Radius | None = None
    """Step of pgdK and cwK in pixel units, as --eps; else a share of eps, for a file that says none
    a tenth, and for K below 20 at least 2.5/K."""
    batch_size: Annotated[int, Bounds(1, 1_000_000)] | None = None
    """Images per batch; changes the time, not the result, but for aa, which draws its random starts
    per batch; for a file 256."""
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto: the GPU where there is one."""
    threads: Annotated[int, Bounds(1, 1024)] | Literal["auto"] = "auto"
    """CPU threads that torch computes with, 1 to 1024, or auto: OMP_NUM_THREADS where that is set,
    else what is quickest in a second's trial at the start."""
    seed: Whole | None = None
    """Seed of the attacks' random starts, 0 or more; for a file that says none 0."""
    data_root: str | None = None
    """Folder that holds the data sets; for a file data."""
    data: str | None = None
    """For a file alone: data set of the test images."""
    image_size: Annotated[int, Bounds(1, 4096)] | None = None
    """For a file alone: pixels to resize and centre-crop test images to, 1 to 4096; None takes what
    it was trained with."""
    model: str | None = None
    """For a file alone: architecture."""
    width: Annotated[int, Bounds(1, 4096)] | None = None
    """For a file alone: width of the architecture, 1 to 4096, where it is not the published."""
    stem: Literal["cifar", "imagenet"] | None = None
    """For a file alone: first layer, 3x3 stride 1 (cifar), or 7x7 stride 2 and max-pool (imagenet),
    where it is not cifar."""
    normalize: Literal["none", "dataset"] | None = None
    """For a file alone: whether the model first takes out the data set's mean and deviation."""
    out: str | None = None
    """For a file alone: folder for results.json and resumable states; None keeps nothing."""


@dataclass(frozen=True, kw_only=True)
class EvalArgs(Opening, Attacks):
    """Arguments of ``cure-fast eval``, beside the run folder or file of weights to attack."""

    aa_limit: Count | Literal["all"] | None = None
    """Test images for AutoAttack alone, the first ones of --limit's, 1 or more, or the word all."""
    save_adversarial: str | None = None
    """File ending in .npz for the attacked images, float32 [N, C, H, W] in [0, 1]: images_ATTACK
    for each attack, with labels and indices (places in the test set); an image that is wrong
    without an attack stays as it is. Of a run it has the result's."""
    networks: tuple[str, ...] | None = None
    """For a run alone: further networks to attack beside its result, such as raw or revision."""
    evaluate: tuple[Literal["best", "last"], ...] | None = None
    """For a run alone: epochs of its result to attack, best, last, or both."""


@dataclass(frozen=True, kw_only=True)
class AnalyzeArgs(Opening):
    """Arguments of ``cure-fast analyze``, beside the analysis' own settings."""

    limit: Count | Literal["all"] | None = None
    """Test images to use, the first ones, 1 or more, or the word all; None takes as many as the
    analysis usually does."""
    out: str | None = None
    """Folder for figure and numbers; None takes the folder analysis of the first run, whose report
    shows them too, and for a file NAME-analysis beside it."""


@dataclass(frozen=True, kw_only=True)
class AuditChecks(Checked):
    """What ``cure-fast audit`` asks, and how thoroughly."""

    checks: tuple[str, ...] | None = None
    """Checks to make, with commas between: answers, classes, gradients, zero, order, plateau, ball,
    curve, black-box, planted, rescoring, counts, selection, overlap, published; None makes all."""
    steps: Annotated[int, Bounds(4, 1000)] = 40
    """Steps of the longest attacks, 4 to 1000; shorter ones have a quarter and a half of them."""
    queries: Count = 300
    """Queries of Square, 1 or more, on up to 64 images that no other attack broke."""
    planted: Count = 24
    """Images, 1 or more, for which an adversarial image is planted that attacks have to find."""


@dataclass(frozen=True, kw_only=True)
class DataWriteArgs(Checked):
    """Arguments of ``cure-fast data write``, beside the data set."""

    data_root: str = "data"
    """Folder that holds the data sets, or receives them when they are downloaded."""
    image_size: Annotated[int, Bounds(1, 4096)] | None = None
    """Pixels to resize and centre-crop images to, 1 to 4096, as for training."""
    train_images: Count | None = None
    """Number of training images, 1 or more, as for training; None takes all but --val-images."""
    val_images: Count = 1000
    """Images held out of the training set, 1 or more, as for training."""
    split_seed: Whole = 0
    """Seed of the draw of training and validation images, 0 or more, as for training."""
    cache: str = "~/.cache/cure-fast"
    """Folder for the FFCV file and its manifest."""


@dataclass(frozen=True, kw_only=True)
class ExportArgs(Checked):
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
