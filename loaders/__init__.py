"""Data sets, splits and the three loaders that feed training with the same batches."""

from __future__ import annotations

from .augment import crop_flip, to_float
from .base import Loader
from .beton import check_beton, ensure_beton, write_beton
from .choose import make_loader
from .datasets import DATASETS, DatasetInfo, names_code, read_dataset, read_training
from .generated import generated_hash, read_generated
from .image_set import ImageSet, check_images
from .mixing import Mix
from .split import split_train

__all__ = [
    "DATASETS",
    "DatasetInfo",
    "ImageSet",
    "Loader",
    "Mix",
    "check_beton",
    "check_images",
    "crop_flip",
    "ensure_beton",
    "generated_hash",
    "make_loader",
    "names_code",
    "read_dataset",
    "read_generated",
    "read_training",
    "split_train",
    "to_float",
    "write_beton",
]
