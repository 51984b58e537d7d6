"""Which loader feeds a run, and why."""

from __future__ import annotations

from pathlib import Path

import torch

from cure_fast.errors import InputError

from .base import AUGMENTATIONS, BatchSettings, Loader
from .ffcv_loader import FfcvLoader
from .ffcv_reader import ffcv_problem
from .image_set import ImageSet
from .mixing import Mix
from .resident import ResidentLoader, fits_device
from .torch_loader import TorchLoader

KINDS = ("auto", "ffcv", "resident", "torch")
# Bytes of images that are read in less time than FFCV compiles its pipeline in, 10 s of a core.
FEW_BYTES = 16_000_000


def make_loader(
    kind: str,
    image_set: ImageSet,
    *,
    batch_size: int,
    device: torch.device,
    seed: int,
    crop_padding: int,
    flip: bool,
    reflect: bool = False,
    augment: str = "crop-flip",
    mix: Mix | None = None,
    workers: int | None,
    cache: Path,
    process: tuple[int, int] = (0, 1),
) -> Loader:
    """Return the loader of training images; ``loader.reason`` says which it is and why.

    Args:
        kind: ``ffcv``, ``resident``, ``torch``, or ``auto``: resident for less than
            :data:`FEW_BYTES`, else FFCV where it can be imported, else resident if the set takes
            less than a quarter of the device's free memory, else torch.
        image_set: training images, at least two, with every class among them.
        batch_size: images per batch, at least 2.
        device: where batches are delivered.
        seed: seed of the order and the augmentation.
        crop_padding: padding in pixels before the random crop; 0 turns the crop off.
        flip: mirror each image left to right with probability 1/2.
        reflect: whether the padding mirrors the image; else it is zero.
        augment: ``crop-flip``, or a variant of IDBH, to which padding and ``reflect`` mean nothing.
        mix: generated images to mix into the batches, and their share; None for none.
        workers: FFCV's threads (None: one) or torch's processes (None: one per usable core).
        cache: folder below which FFCV's file is kept.
        process: place, from 0, and number of the processes that share the images of each batch.

    Raises:
        InputError: for an unknown kind or augmentation, FFCV asked for and not usable (so it is
            with generated images for several processes), its file refused or not writable, images
            that do not pass, or too few generated ones.
    """
    if kind not in KINDS:
        raise InputError(f"--loader: expected one of {', '.join(KINDS)}, got {kind!r}.")
    if augment not in AUGMENTATIONS:
        raise InputError(f"--augment: expected one of {', '.join(AUGMENTATIONS)}, got {augment!r}.")
    settings = BatchSettings(
        batch_size=batch_size,
        device=device,
        seed=seed,
        crop_padding=crop_padding,
        flip=flip,
        reflect=reflect,
        augment=augment,
        mix=mix,
        process=process,
    )
    why = "asked for"
    if kind == "auto" and image_set.images.nbytes < FEW_BYTES:
        kind, why = "resident", "so few images are read before FFCV would have compiled"
    if kind in ("auto", "ffcv"):
        if mix is not None and process[1] > 1:
            # Generated images fall to processes as they come.
            problem = "with --aux a process reads more or fewer images per batch, and FFCV as many"
        else:
            problem = ffcv_problem()
        if not problem:
            return FfcvLoader(image_set, settings, workers=workers, cache=cache)
        if kind == "ffcv":
            raise InputError(f"--loader ffcv: {problem}; or use --loader auto.")
        why = problem
    megabytes = image_set.images.nbytes / 1e6
    if kind == "resident" or (kind == "auto" and fits_device(image_set, device)):
        return ResidentLoader(image_set, settings, why=f"{why}; {megabytes:.0f} MB on {device}")
    if kind == "auto":
        why += f", and {megabytes:.0f} MB are more than a quarter of the free memory of {device}"
    return TorchLoader(image_set, settings, workers=workers, why=why)
