"""A network built from the words that configurations and files of weights describe it with."""

from __future__ import annotations

from cure_fast.loaders import DATASETS
from cure_fast.models import ImageClassifier, build_model


def build_for_data(
    model: str, *, data: str, num_classes: int, width: int | None, stem: str, normalize: str
) -> ImageClassifier:
    """Return the network for images of a data set, on the CPU, its weights drawn at random.

    Args:
        model: name of the architecture.
        data: name of the data set, whose mean and deviation the first layer may take out.
        num_classes: number of classes, at least 2.
        width: channels of the first stage (widening factor for wide ResNets); None takes the
            published.
        stem: ``cifar`` or ``imagenet``.
        normalize: ``none``, or ``dataset`` to take the data set's mean and deviation out.

    Raises:
        InputError: if there is no such architecture, or it cannot be built so.
    """
    statistics = None
    if normalize == "dataset":
        info = DATASETS.get(data)
        # An image folder has no published statistics; half and half maps [0, 1] to [-1, 1].
        statistics = (info.mean, info.std) if info else ((0.5,) * 3, (0.5,) * 3)
    return build_model(model, num_classes=num_classes, width=width, stem=stem, normalize=statistics)
