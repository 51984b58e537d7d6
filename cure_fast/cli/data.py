"""``cure-fast data write | pack``: files of images, ahead of training."""

from __future__ import annotations

import time

from cure_fast.config.arguments import DataWriteArgs
from cure_fast.config.checks import Bounds
from cure_fast.console import say
from cure_fast.files import user_path


def data_write(data: str, args: DataWriteArgs) -> None:
    """Write the training images of a data set as a checked FFCV file, ahead of training.

    Training reads the file of its own training split: with the same flags as here it finds this
    one, and with others it writes its own on first use.

    Args:
        data: Data set: cifar10, cifar100, svhn, digits or folder:PATH.
        args: Which images, and where to.
    """
    # These need torch, and help does not.
    from cure_fast.loaders import read_training
    from cure_fast.loaders.beton import ensure_beton

    started = time.monotonic()
    root = user_path(args.data_root, "--data-root")
    cache = user_path(args.cache, "--cache")
    images, _ = read_training(
        data,
        root,
        train_images=args.train_images,
        val_images=args.val_images,
        seed=args.split_seed,
        image_size=args.image_size,
        cache=cache,
    )
    path = ensure_beton(images, cache)
    seconds = time.monotonic() - started
    say(f"{path}: {len(images):,} images, checked sample by sample, {seconds:.1f} s")


def data_pack(folder: str, out: str, *, image_size: int | None = None) -> None:
    """Write a folder of images as the .npz that `--aux npz:OUT` of train takes.

    Args:
        folder: Folder with one folder of images per class, named as the data set's classes.
        out: File to write, ending in .npz.
        image_size: Pixels to resize and centre-crop images to, 1 to 4096, as for training; None
            takes them as they are.
    """
    if image_size is not None:
        Bounds(1, 4096).check("image_size", image_size)
    from cure_fast.loaders.packing import pack_folder

    path = user_path(out, "OUT")
    count = pack_folder(user_path(folder, "FOLDER"), path, image_size=image_size)
    say(f"{path}: {count:,} images")
