"""The model for RobustBench: tensors that its own class loads strictly, and its model-info JSON."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from cure_fast.errors import InputError
from cure_fast.export.model_info import model_info
from cure_fast.export.source import Source, is_normalized
from cure_fast.export.verify import check_equal
from cure_fast.files import replacing, write_json

PACKAGE = "robustbench"
TESTED = "1.1.1"
# Of CIFAR, to which the pooling of RobustBench's classes is fixed.
IMAGE_SIZE = 32


@dataclass(frozen=True)
class Architecture:
    """How RobustBench builds one of our architectures.

    Attributes:
        module: file of its classes in RobustBench's ``model_zoo/architectures``.
        title: name as its leaderboard writes it; ``{width}`` stands for the widening factor.
        build: from the module, the number of classes, the width and whether to have the unused
            group, to the network.
        width: the only width that its class has; None for any.
    """

    module: str
    title: str
    build: Callable[[Any, int, int, bool], nn.Module]
    width: int | None = 64


def _resnet(block: str, depths: list[int]) -> Callable[[Any, int, int, bool], nn.Module]:
    return lambda module, classes, width, unused: module.ResNet(
        getattr(module, block), depths, num_classes=classes
    )


def _preact(module: Any, classes: int, width: int, unused: bool) -> nn.Module:
    return module.PreActResNet(
        module.PreActBlock,
        [2, 2, 2, 2],
        num_classes=classes,
        bn_before_fc=True,
        out_shortcut=True,
    )


def _wide(depth: int) -> Callable[[Any, int, int, bool], nn.Module]:
    return lambda module, classes, width, unused: module.WideResNet(
        depth=depth, num_classes=classes, widen_factor=width, sub_block1=unused
    )


_WRN34 = Architecture("wide_resnet", "WideResNet-34-{width}", _wide(34), None)
ARCHITECTURES = {
    "resnet18": Architecture("resnet", "ResNet-18", _resnet("BasicBlock", [2, 2, 2, 2])),
    "resnet34": Architecture("resnet", "ResNet-34", _resnet("BasicBlock", [3, 4, 6, 3])),
    "resnet50": Architecture("resnet", "ResNet-50", _resnet("Bottleneck", [3, 4, 6, 3])),
    "resnet101": Architecture("resnet", "ResNet-101", _resnet("Bottleneck", [3, 4, 23, 3])),
    "preactresnet18": Architecture("resnet", "PreActResNet-18", _preact),
    "wrn34-10": _WRN34,
    "wrn32-10": _WRN34,
    "wrn28-10": Architecture("wide_resnet", "WideResNet-28-{width}", _wide(28), None),
}


def check_fits(source: Source, layout: str, image_size: tuple[int, ...]) -> Architecture:
    """Return how RobustBench builds the model.

    Raises:
        InputError: if none of its classes computes the same function.
    """
    name, model, told = source.metadata["model"], source.model, "--format robustbench: "
    known = ARCHITECTURES.get(name)
    if known is None:
        raise InputError(
            f"{told}expected a model that RobustBench has a class for ({', '.join(ARCHITECTURES)}),"
            f" got {name}. Take --format safetensors or onnx."
        )
    if known.width not in (None, model.width):
        raise InputError(
            f"{told}RobustBench's class of {name} has width {known.width}, this model "
            f"{model.width}. Take --format safetensors or onnx."
        )
    if source.metadata.get("stem", "cifar") != "cifar":
        raise InputError(
            f"{told}RobustBench's class of {name} has the cifar stem, this model the "
            f"{source.metadata['stem']} one. Take --format safetensors or onnx."
        )
    if is_normalized(model):
        raise InputError(
            f"{told}RobustBench's classes take images as they are, and this model takes a mean "
            "and a deviation out first, which zero padding keeps from moving into the weights. "
            "Take --format safetensors or onnx, or train with --normalize none."
        )
    if image_size != (IMAGE_SIZE, IMAGE_SIZE):
        raise InputError(
            f"{told}RobustBench's classes take images of {IMAGE_SIZE}x{IMAGE_SIZE} pixels, those "
            f"of {source.metadata['data']} have {'x'.join(map(str, image_size))}. "
            "Take --format safetensors or onnx."
        )
    if layout == "sub_block1" and known.module != "wide_resnet":
        raise InputError(f"--layout: sub_block1 is for wide ResNets, {name} is none. Leave it out.")
    return known


def export_robustbench(
    source: Source, images: Tensor, out: Path, *, layout: str
) -> tuple[float, list[str]]:
    """Write ``out`` and the JSON file beside it; return the largest difference, and what is left.

    Args:
        source: what is exported.
        images: to compare on in RobustBench's own class, [N, 3, 32, 32], float32 in [0, 1].
        out: file to write, a state dict of ``torch.save``; whole and verified, or not there.
        layout: ``plain``, or ``sub_block1`` for the layout of TRADES and the codes after it, whose
            second first group no forward pass calls; it is filled with a copy of the first.
    """
    known = check_fits(source, layout, tuple(images.shape[2:]))
    weights = {
        name: tensor.detach().clone(memory_format=torch.contiguous_format)
        for name, tensor in source.model.state_dict().items()
    }
    if layout == "sub_block1":
        first = {name: tensor for name, tensor in weights.items() if name.startswith("block1.")}
        weights |= {f"sub_{name}": tensor.clone() for name, tensor in first.items()}
    info, notes = model_info(source, known.title.format(width=source.model.width))
    with replacing(out) as temporary:
        torch.save(weights, temporary)
        model = _load_strictly(known, source, temporary, layout == "sub_block1")
        difference = check_equal(source.model, model, images)
        write_json(info_file(out), info)
    return difference, notes


def info_file(out: Path) -> Path:
    """Return the model-info file that belongs to an exported file."""
    return out.with_suffix(".json")


def _load_strictly(known: Architecture, source: Source, file: Path, unused: bool) -> nn.Module:
    """Return RobustBench's own network with the weights of the file."""
    classes = int(source.metadata["num_classes"])
    try:
        # Without drawing first weights, which the file replaces.
        with torch.device("meta"):
            model = known.build(_classes(known.module), classes, source.model.width, unused)
        weights = torch.load(file, map_location="cpu", weights_only=True)
        model.load_state_dict(weights, strict=True, assign=True)
    # Another version of the package may have other classes.
    except (AttributeError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"--format robustbench: the installed RobustBench does not take the weights ({reason})."
            f" Nothing was kept. {_install()}"
        ) from error
    return model.eval()


def find_package() -> Path | None:
    """Return the folder of the RobustBench package, without importing it; None where it is not.

    Its wheel also brings a package ``tests`` and pins timm, so the set-up keeps it out of the way
    of others, where :func:`beside` says.
    """
    spec = importlib.machinery.PathFinder.find_spec(PACKAGE, [*sys.path, str(beside())])
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def beside() -> Path:
    """Return the folder in this environment, not searched by imports, that may hold RobustBench."""
    return Path(sys.prefix) / "share" / PACKAGE


def check_package() -> None:
    """Raise :class:`InputError` with the command to run, unless RobustBench is installed."""
    if find_package() is None:
        raise InputError(f"--format robustbench: needs RobustBench to load the file. {_install()}")


def _install() -> str:
    return f"Run: python -m pip install --no-deps --target {beside()} {PACKAGE}=={TESTED}"


def _classes(name: str) -> ModuleType:
    """Return a file of RobustBench's architectures as a module, by its path.

    Importing the package itself would need timm, gdown and a package ``autoattack``.
    """
    check_package()
    package = find_package()
    file = Path(str(package)) / "model_zoo" / "architectures" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{PACKAGE}_{name}", file)
    if spec is None or spec.loader is None or not file.is_file():
        raise InputError(
            f"--format robustbench: the installed RobustBench has no {name}.py. {_install()}"
        )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
