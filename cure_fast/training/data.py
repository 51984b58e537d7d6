"""The images of a run: read, split, and fed to training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from cure_fast.config import Config
from cure_fast.files import user_path
from cure_fast.loaders import ImageSet, Loader, make_loader, read_dataset, split_train


@dataclass(frozen=True)
class Data:
    """The images of a run: training, the validation split held out of it, and test."""

    train: ImageSet
    val: ImageSet
    test: ImageSet


def read_data(config: Config) -> Data:
    """Read the data set and hold out the validation split."""
    options: dict[str, Any] = {
        "download": config.data.download,
        "image_size": config.data.image_size,
    }
    name, root = config.data.data, user_path(config.data.data_root, "--data-root")
    whole = read_dataset(name, root, "train", **options)
    train, val = split_train(
        whole,
        train_images=config.data.train_images,
        val_images=config.data.val_images,
        seed=config.data.split_seed,
    )
    return Data(train=train, val=val, test=read_dataset(name, root, "test", **options))


def open_loader(
    config: Config, data: Data, device: torch.device, process: tuple[int, int] = (0, 1)
) -> Loader:
    """Return the loader of the training images, of which ``process`` has its part of each batch."""
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
        workers=config.data.workers,
        cache=user_path(config.run.cache, "--cache"),
        process=process,
    )
