"""A network built from the words that configurations and files of weights describe it with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cure_fast.classifier import attack_mode
from cure_fast.errors import InputError
from cure_fast.loaders import DATASETS, ImageSet
from cure_fast.models import ImageClassifier, build_model
from cure_fast.models.weights import load_into, read_metadata, read_weights
from cure_fast.plugins.lookup import first_line, is_reference

# Added to a run's seed: no run draws its own network from such a one. The CPU's generator takes
# 32 bits of it.
FURTHER = 2**31


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
    if is_reference(metadata["model"]) and metadata["model"] != trusted:
        raise InputError(
            f"{path}: its network is made by {metadata['model']}, and no file decides which code "
            f"is run. Where you trust that function, name it: --model {metadata['model']}."
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


def check_logits(model: ImageClassifier, images: ImageSet, source: str) -> None:
    """Raise ``InputError`` unless two images give a logit for each class, and these a gradient.

    The network, which ``source`` calls, is on the CPU and left as it was.
    """
    pixels = torch.from_numpy(images.images[:2]).permute(0, 3, 1, 2) / 255
    expected = [len(pixels), len(images.classes)]
    try:
        with attack_mode(model, "eval"):
            logits = model(pixels.requires_grad_())
            # Parameters take none in this mode, so that it comes from the images if at all.
            if reached := logits.requires_grad:
                torch.autograd.grad(logits.sum(), pixels)
    except Exception as error:  # code of the user's own: whatever it throws is told in one line
        raise InputError(
            f"--model {source}: a pass of images {list(pixels.shape)} failed ({first_line(error)})."
        ) from error
    came = list(logits.shape)
    if came != expected:
        raise InputError(
            f"--model {source}: expected logits {expected} of images {list(pixels.shape)}, one for "
            f"each class of the data, got {came}. Mend the network's last layer."
        )
    if not reached:
        raise InputError(
            f"--model {source}: expected logits that a gradient reaches the images through, got "
            "some cut off from them (detach, no_grad, argmax). Attacks and training need it."
        )


def build_like(
    network: ImageClassifier,
    *,
    seed: int,
    model: str | None = None,
    num_classes: int | None = None,
) -> ImageClassifier:
    """Return a further network for the images of another, on the CPU and in its precision.

    Torch's random numbers go on as if nothing had been drawn.

    Args:
        network: what it is like. Without a description, as of one's own making, it is copied and
            its layers draw their weights again.
        seed: of the run, 0 or more; decides the weights, which no run's own network begins with.
        model: its architecture in the published width; None takes the network's own.
        num_classes: number of its logits; None takes the network's own.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(FURTHER + seed)
        if network.description:
            told = network.description.items()
            words: dict[str, Any] = {k: int(v) if v.isdecimal() else v or None for k, v in told}
            words |= {} if model is None else {"model": model, "width": None}
            words |= {} if num_classes is None else {"num_classes": num_classes}
            further = build_for_data(**words)
        else:
            assert model is None, "no description says what another architecture is to take"
            further = _redrawn(network, num_classes)
    further.compute_dtype = network.compute_dtype
    return further


def _redrawn(network: ImageClassifier, num_classes: int | None) -> ImageClassifier:
    """Return a copy on the CPU with weights drawn anew, and another number of logits if asked."""
    # Drawn in float32: other types draw other numbers.
    further = copy.deepcopy(network).cpu().float()
    last = further.get_submodule(network.classifier_name)
    assert isinstance(last, nn.Linear)
    if num_classes is not None:
        last = nn.Linear(last.in_features, num_classes)
        further.set_submodule(network.classifier_name, last)
    for module in further.modules():
        if isinstance(draw := getattr(module, "reset_parameters", None), Callable):
            draw()
    return further.to(next(network.parameters()).dtype)
