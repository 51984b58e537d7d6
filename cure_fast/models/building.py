"""A network built from the words that configurations and files of weights describe it with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cure_fast.errors import InputError
from cure_fast.loaders import DATASETS
from cure_fast.models import ImageClassifier, build_model
from cure_fast.models.own import is_factory
from cure_fast.models.weights import load_into, read_metadata, read_weights


def build_for_data(
    model: str,
    *,
    data: str,
    num_classes: int,
    width: int | None,
    stem: str,
    normalize: str,
    image_size: int | None = None,
) -> ImageClassifier:
    """Return the network for images of a data set, on the CPU, its weights drawn at random.

    Its ``description`` says all of the arguments: :func:`load_model` builds it again from that.
    They are those of :func:`cure_fast.models.build_model`, but for ``normalize``: ``none``, or
    ``dataset`` to have the first layer take the mean and the deviation of ``data`` out; and for
    ``image_size``, which may be ``None`` where it is not known yet.
    """
    statistics = None
    if normalize == "dataset":
        info = DATASETS.get(data)
        # An image folder has no published statistics; half and half maps [0, 1] to [-1, 1].
        statistics = (info.mean, info.std) if info else ((0.5,) * 3, (0.5,) * 3)
    sized = {} if image_size is None else {"image_size": image_size}
    network = build_model(
        model, num_classes=num_classes, width=width, stem=stem, normalize=statistics, **sized
    )
    network.description = {
        "data": data,
        "model": model,
        "width": "" if width is None else str(width),
        "stem": stem,
        "normalize": normalize,
        "num_classes": str(num_classes),
        **{name: str(size) for name, size in sized.items()},
    }
    return network


def load_model(
    path: Path, metadata: Mapping[str, str] | None = None, *, trusted: str | None = None
) -> ImageClassifier:
    """Return the network in a file of weights, on the CPU, as ``metadata`` or the file says.

    No file decides which code is run: a function that makes the network is called only if it is
    the ``trusted`` one, which the user has named.
    """
    metadata = read_metadata(path) if metadata is None else metadata
    missing = [key for key in ("model", "num_classes") if key not in metadata]
    if missing:
        raise InputError(
            f"{path}: the file does not say its {' and '.join(missing)}; "
            "name the architecture with --model and the data set with --data."
        )
    if is_factory(metadata["model"]) and metadata["model"] != trusted:
        raise InputError(
            f"{path}: its network is made by {metadata['model']}, and no file decides which code "
            f"is run. Where you trust that function, name it: --model {metadata['model']}"
        )
    numbers: dict[str, int | None] = {}
    for key in ("num_classes", "width", "image_size"):
        text = metadata.get(key, "")
        if text and not text.isdecimal():
            raise InputError(f"{path}: expected {key} as a whole number, the file says {text!r}.")
        numbers[key] = int(text) if text else None
    model = build_for_data(
        metadata["model"],
        data=metadata.get("data", ""),
        num_classes=numbers["num_classes"] or 0,
        width=numbers["width"],
        stem=metadata.get("stem", "cifar"),
        normalize=metadata.get("normalize", "none"),
        image_size=numbers["image_size"],
    )
    load_into(model, read_weights(path), source=str(path))
    return model


def check_takes(model: ImageClassifier, image_size: int, source: str) -> None:
    """Raise ``InputError`` if the network, which ``source`` calls, takes images of another size."""
    if model.image_size not in (None, image_size):
        raise InputError(
            f"{source}: it takes images of {model.image_size}x{model.image_size} pixels, and these "
            f"have {image_size}x{image_size}. Choose a network of that size."
        )
