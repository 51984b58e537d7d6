"""The images of a run: read, split, and fed to training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from cure_fast.config import Config
from cure_fast.files import user_path
from cure_fast.loaders import (
    ImageSet,
    Loader,
    Mix,
    make_loader,
    read_dataset,
    read_generated,
    read_training,
)


@dataclass(frozen=True)
class Data:
    """The images of a run: training, the validation split held out of it, and test.

    Generated images, if any, are for training alone.
    """

    train: ImageSet
    val: ImageSet
    test: ImageSet
    generated: ImageSet | None = None


def read_data(config: Config) -> Data:
    """Read the data set and hold out the validation split."""
    cache = user_path(config.run.cache, "--cache")
    options: dict[str, Any] = {
        "download": config.data.download,
        "image_size": config.data.image_size,
        "cache": cache,
    }
    name, root = config.data.data, user_path(config.data.data_root, "--data-root")
    train, val = read_training(
        name,
        root,
        train_images=config.data.train_images,
        val_images=config.data.val_images,
        seed=config.data.split_seed,
        **options,
    )
    test, aux = read_dataset(name, root, "test", **options), config.data.aux
    if aux is None:
        return Data(train=train, val=val, test=test)
    generated = read_generated(aux, train, checksum=config.data.aux_hash, cache=cache)
    return Data(train=train, val=val, test=test, generated=generated)


def open_loader(
    config: Config, data: Data, device: torch.device, process: tuple[int, int] = (0, 1)
) -> Loader:
    """Return the loader of the training images, with generated ones where those are asked for.

    ``process`` has its part of each batch.
    """
    # A stage that names none, as the natural start, has none of those that were read.
    generated = data.generated if config.data.aux is not None else None
    return make_loader(
        config.data.loader,
        data.train,
        batch_size=config.optim.batch_size,
        device=device,
        seed=config.run.seed,
        crop_padding=config.data.crop_padding,
        flip=config.data.flip,
        reflect=config.data.crop_mode == "reflect",
        augment=config.data.augment,
        mix=None if generated is None else Mix(generated, config.data.aux_share),
        workers=config.data.workers,
        cache=user_path(config.run.cache, "--cache"),
        process=process,
    )
