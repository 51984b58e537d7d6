"""An exported file compared with the model it came from, on the same images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cure_fast.errors import InputError
from cure_fast.export.source import Source
from cure_fast.files import user_path
from cure_fast.loaders import DATASETS, names_code, read_dataset
from cure_fast.models.weights import resized_to

IMAGES = 1000
# Does not divide IMAGES: the last batch has another size, as the exported file must allow.
BATCH = 128
# Largest difference of logits, relative to the largest logit (or to 1): a hundred times what the
# order of float32 sums makes, far below what a wrong layer or constant does.
TOLERANCE = 1e-3
# Where neither files nor data set say how large the images are.
USUAL_SIZE = 32


def trial_images(
    source: Source, data_root: str | None, *, count: int = IMAGES
) -> tuple[Tensor, str]:
    """Return the first test images of the model's data set, filled up with random ones to count.

    They are [N, 3, H, W], float32 in [0, 1]; what to call them comes with them.
    Nothing is downloaded: where the data set is not in ``data_root`` (None takes the run's own, or
    ``data``), all images are random.
    """
    data = source.metadata["data"]
    own = source.config.data.data_root if source.config else "data"
    root = user_path(own if data_root is None else data_root, "--data-root")
    try:
        if source.config is None and names_code(data):
            raise InputError(f"{source.path}: no file decides which code is run.")
        image_size = resized_to(source.path, source.metadata)
        test = read_dataset(data, root, "test", download=False, image_size=image_size)
    except InputError:
        size = DATASETS[data].image_size if data in DATASETS else USUAL_SIZE
        told = f"{count:,} random images of {size}x{size} pixels, as {data} is not in {root}"
        return _random(count, (size, size)), told
    taken = torch.from_numpy(test.images[:count]).permute(0, 3, 1, 2).float() / 255
    told = f"{len(taken):,} test images of {data}"
    if len(taken) < count:
        told += f" and {count - len(taken):,} random ones"
        taken = torch.cat([taken, _random(count - len(taken), tuple(taken.shape[2:]))])
    return taken, told


def _random(count: int, size: tuple[int, ...]) -> Tensor:
    """Return the same uniformly random images at every call."""
    return torch.rand((count, 3, *size), generator=torch.Generator().manual_seed(0))


def check_equal(model: nn.Module, exported: Callable[[Tensor], Tensor], images: Tensor) -> float:
    """Return the largest difference of logits between the model and its exported form.

    Both take images [N, 3, H, W], float32 in [0, 1], to logits [N, K]. Predictions that differ, and
    logits that do by more than rounding, are an :class:`InputError`.
    """
    with torch.inference_mode():
        expected, got = (torch.cat([f(x) for x in images.split(BATCH)]) for f in (model, exported))
    if got.shape != expected.shape:
        raise _unequal(f"its logits have shape {list(got.shape)}, not {list(expected.shape)}")
    difference = (got - expected).abs().max().item()
    other = int((got.argmax(1) != expected.argmax(1)).sum())
    if other:
        raise _unequal(
            f"{other} of {len(images):,} predictions differ (logits by up to {difference:.2g})"
        )
    allowed = TOLERANCE * max(1.0, expected.abs().max().item())
    # Written so that a difference that is not a number fails as well.
    if not difference <= allowed:
        raise _unequal(
            f"logits differ by up to {difference:.2g}, rounding explains at most {allowed:.2g}"
        )
    return difference


def _unequal(how: str) -> InputError:
    return InputError(
        f"the exported file does not compute what the model does: {how}. Nothing was kept; take "
        "another --format, or the versions of the packages in constraints.txt."
    )
