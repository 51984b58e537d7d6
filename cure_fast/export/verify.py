"""An exported file compared with the model it came from, on the same images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cure_fast.errors import InputError
from cure_fast.export.source import Source
from cure_fast.files import user_path
from cure_fast.loaders import DATASETS, read_dataset

IMAGES = 1000
# Does not divide IMAGES: the last batch has another size, as the exported file must allow.
BATCH = 128
# Largest difference of logits, relative to the largest logit (or to 1): a hundred times what the
# order of float32 sums makes, far below what a wrong layer or constant does.
TOLERANCE = 1e-3
# Where neither files nor data set say how large the images are.
USUAL_SIZE = 32


@dataclass(frozen=True)
class Trial:
    """Images to compare on.

    Attributes:
        images: [N, 3, H, W], float32 in [0, 1].
        told: what they are, such as ``360 test images of digits``.
    """

    images: Tensor
    told: str


def trial_images(source: Source, data_root: str | None, *, count: int = IMAGES) -> Trial:
    """Return the first test images of the model's data set, filled up with random ones to count.

    Nothing is downloaded: where the data set is not there, all images are random.

    Args:
        source: what is exported.
        data_root: folder that holds the data sets; None takes the run's own, or ``data``.
        count: number of images.
    """
    data = source.metadata["data"]
    own = source.config.data.data_root if source.config else "data"
    root = user_path(own if data_root is None else data_root, "--data-root")
    try:
        test = read_dataset(data, root, "test", download=False)
    except InputError:
        info = DATASETS.get(data)
        size = info.image_size if info else USUAL_SIZE
        return Trial(
            _random(count, (size, size)),
            f"{count:,} random images of {size}x{size} pixels, as {data} is not in {root}",
        )
    taken = torch.from_numpy(test.images[:count]).permute(0, 3, 1, 2).float() / 255
    told = f"{len(taken):,} test images of {data}"
    if len(taken) < count:
        told += f" and {count - len(taken):,} random ones"
        taken = torch.cat([taken, _random(count - len(taken), tuple(taken.shape[2:]))])
    return Trial(taken, told)


def _random(count: int, size: tuple[int, ...]) -> Tensor:
    """Return the same uniformly random images at every call."""
    return torch.rand((count, 3, *size), generator=torch.Generator().manual_seed(0))


def logits_of(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Return logits [N, K] of images [N, 3, H, W], computed in batches."""
    with torch.inference_mode():
        return torch.cat([model(batch) for batch in images.split(BATCH)])


def check_equal(model: nn.Module, exported: Callable[[Tensor], Tensor], images: Tensor) -> float:
    """Return the largest difference of logits between the model and its exported form.

    Args:
        model: in evaluation mode.
        exported: from images [N, 3, H, W], float32 in [0, 1], to logits [N, K], for any N.
        images: to compare on.

    Raises:
        InputError: if a prediction differs, or a logit by more than rounding.
    """
    expected, got = logits_of(model, images), logits_of(exported, images)
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
