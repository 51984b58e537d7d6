"""The model for RobustBench: tensors that its own class loads strictly, and its model-info JSON."""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cure_fast.config.checks import format_pixel
from cure_fast.errors import InputError
from cure_fast.export.source import Source
from cure_fast.export.verify import check_equal
from cure_fast.files import replacing, write_json
from cure_fast.methods import labels
from cure_fast.models import Normalize

PACKAGE = "robustbench"
TESTED = "1.1.1"
BESIDE = f"{sys.prefix}/share/{PACKAGE}"
INSTALL = f"Run: python -m pip install --no-deps --target {BESIDE} {PACKAGE}=={TESTED}"
# Of CIFAR, to which the pooling of RobustBench's classes is fixed.
IMAGE_SIZE = 32
# The only one of its classes, wide ResNets apart.
WIDTH = 64


class Architecture(NamedTuple):
    """How RobustBench builds one of our architectures; ``title`` is its name on the leaderboard.

    A wide ResNet has a depth and no block.
    """

    title: str
    depths: tuple[int, ...]
    block: str = ""

    def build(self, classes: int, width: int, *, unused: bool = False) -> Any:
        """Return RobustBench's network, with the group that no forward pass calls if ``unused``."""
        options: dict[str, Any] = {"num_classes": classes}
        if not self.block:
            options |= {"widen_factor": width, "sub_block1": unused}
            return _classes("wide_resnet").WideResNet(depth=self.depths[0], **options)
        module, network = _classes("resnet"), "ResNet"
        if self.block == "PreActBlock":
            network, options = (
                "PreActResNet",
                options | {"bn_before_fc": True, "out_shortcut": True},
            )
        return getattr(module, network)(getattr(module, self.block), [*self.depths], **options)


_WRN34 = Architecture("WideResNet-34-{width}", (34,))
ARCHITECTURES = {
    "resnet18": Architecture("ResNet-18", (2, 2, 2, 2), "BasicBlock"),
    "resnet34": Architecture("ResNet-34", (3, 4, 6, 3), "BasicBlock"),
    "resnet50": Architecture("ResNet-50", (3, 4, 6, 3), "Bottleneck"),
    "resnet101": Architecture("ResNet-101", (3, 4, 23, 3), "Bottleneck"),
    "preactresnet18": Architecture("PreActResNet-18", (2, 2, 2, 2), "PreActBlock"),
    "wrn34-10": _WRN34,
    "wrn32-10": _WRN34,
    "wrn28-10": Architecture("WideResNet-28-{width}", (28,)),
}


def check_fits(source: Source, layout: str, image_size: tuple[int, ...]) -> Architecture:
    """Return how RobustBench builds the model; refuse one that none of its classes computes."""
    name, model = source.metadata["model"], source.model
    stem = source.metadata.get("stem", "cifar")
    known, problem, instead = ARCHITECTURES.get(name), None, ""
    if known is None:
        having = ", ".join(ARCHITECTURES)
        problem = f"expected a model that RobustBench has a class for ({having}), got {name}"
    elif known.block and model.width != WIDTH:
        problem = f"RobustBench's class of {name} has width {WIDTH}, this model {model.width}"
    elif stem != "cifar":
        problem = f"RobustBench's class of {name} has the cifar stem, this model the {stem} one"
    elif isinstance(model.normalize, Normalize):
        problem = (
            "RobustBench's classes take images as they are, and this model takes a mean and a "
            "deviation out first, which zero padding keeps from moving into the weights"
        )
        instead = ", or train with --normalize none"
    elif image_size != (IMAGE_SIZE, IMAGE_SIZE):
        problem = (
            f"RobustBench's classes take images of {IMAGE_SIZE}x{IMAGE_SIZE} pixels, those of "
            f"{source.metadata['data']} have {'x'.join(map(str, image_size))}"
        )
    if known is None or problem is not None:
        raise InputError(
            f"--format robustbench: {problem}. Take --format safetensors or onnx{instead}."
        )
    if layout == "sub_block1" and known.block:
        raise InputError(f"--layout: sub_block1 is for wide ResNets, {name} is none. Leave it out.")
    return known


def export_robustbench(
    source: Source, images: Tensor, out: Path, *, layout: str
) -> tuple[float, list[str]]:
    """Write ``out``, a state dict of ``torch.save`` that is whole and verified or not there.

    Returns the largest difference of logits in RobustBench's own class, and what is left to do for
    the JSON file beside it. The layout is ``plain``, or ``sub_block1`` as in TRADES and the codes
    after it, whose second first group no forward pass calls: it is a copy of the first.
    """
    known = check_fits(source, layout, tuple(images.shape[2:]))
    weights = {
        name: tensor.detach().clone(memory_format=torch.contiguous_format)
        for name, tensor in source.model.state_dict().items()
    }
    if layout == "sub_block1":
        first = {name: tensor for name, tensor in weights.items() if name.startswith("block1.")}
        weights |= {f"sub_{name}": tensor.clone() for name, tensor in first.items()}
    try:
        info, notes = model_info(source, known.title.format(width=source.model.width))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{source.path}: its description or the results.json beside it is damaged "
            f"({type(error).__name__}: {error}). `cure-fast eval RUN` writes results.json again "
            "once it has been moved away."
        ) from error
    with replacing(out) as temporary:
        torch.save(weights, temporary)
        model = _load_strictly(known, source, temporary, layout == "sub_block1")
        difference = check_equal(source.model, model, images)
        write_json(info_file(out), info)
    return difference, notes


def model_info(source: Source, architecture: str) -> tuple[dict[str, Any], list[str]]:
    """Return the entry of a model for RobustBench's ``model_info``, and what is missing in it.

    An accuracy is there only where it was measured on all test images, in float32 and without a
    warning, and belongs to the exported weights. ``architecture`` is the name on the leaderboard.
    """
    results = source.results or {}
    eps = results.get("eps", source.metadata.get("eps"))
    policies = source.metadata.get("policies")
    label = labels(source.metadata.get("method", ""), policies.split(",") if policies else ())
    given_start = source.config is not None and source.config.model.init_from is not None
    info: dict[str, Any] = {
        "link": "",
        "name": label,
        "authors": "",
        # Weights that someone gave may come from more images than the data set has.
        "additional_data": None if given_start or source.config is None else False,
        "number_forward_passes": 1,
        "dataset": source.metadata["data"],
        "venue": "Unpublished",
        "architecture": architecture,
        "eps": None if eps is None else format_pixel(float(eps)),
    }
    notes = ["fill in link, name, authors, venue in the JSON file"]
    if results.get("norm", source.metadata.get("norm")) == "l2":
        notes.append("eps is of the L2 threat model, whose entries have a folder of their own")
    if info["additional_data"] is None:
        notes.append("additional_data is null: say whether the start saw other images")
    natural, why = _accuracy(source, "natural")
    if natural is None:
        notes.append(f"clean_acc is left out: {why}")
    else:
        info["clean_acc"] = natural
    robust, why = _accuracy(source, "aa")
    if robust is None:
        notes.append(
            f"autoattack_acc and reported are left out: {why}; "
            "`cure-fast eval RUN --attacks natural,aa --limit all --aa-limit all` measures them"
        )
    else:
        info |= {"reported": robust, "autoattack_acc": robust, "unreliable": False}
    return info, notes


def _accuracy(source: Source, attack: str) -> tuple[str | None, str]:
    """Return an accuracy in percent with two decimals, or None and why it can't be given."""
    if source.results is None:
        return None, "there is no results.json beside the weights"
    entry = source.results.get("models", {}).get("trained", {})
    if entry.get("weights") != source.sha256:
        return None, "results.json is of other weights"
    result = entry.get("attacks", {}).get(attack)
    if result is None:
        return None, f"{attack} was not run"
    total = source.results.get("test_images")
    if result["count"] != total:
        return None, f"{attack} was run on {result['count']:,} of {total:,} test images"
    if not result["reliable"]:
        return None, f"the result of {attack} is unreliable ({'; '.join(result['warnings'])})"
    if result["precision"] != "float32":
        return None, f"{attack} was run in {result['precision']}, not in float32"
    return f"{result['accuracy']:.2f}", ""


def info_file(out: Path) -> Path:
    """Return the model-info file that belongs to an exported file."""
    return out.with_suffix(".json")


def _load_strictly(known: Architecture, source: Source, file: Path, unused: bool) -> nn.Module:
    """Return RobustBench's own network with the weights of the file."""
    classes = int(source.metadata["num_classes"])
    try:
        # Without drawing first weights, which the file replaces.
        with torch.device("meta"):
            model = known.build(classes, source.model.width, unused=unused)
        weights = torch.load(file, map_location="cpu", weights_only=True)
        model.load_state_dict(weights, strict=True, assign=True)
    # Another version of the package may have other classes.
    except (AttributeError, TypeError, RuntimeError, FileNotFoundError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"--format robustbench: the installed RobustBench does not take the weights ({reason})."
            f" Nothing was kept. {INSTALL}"
        ) from error
    return model.eval()


def find_package() -> Path | None:
    """Return the folder of the RobustBench package, without importing it; None where it is not.

    Its wheel also brings a package ``tests`` and pins timm, so the set-up keeps it in a folder that
    imports do not search.
    """
    spec = PathFinder.find_spec(PACKAGE, [*sys.path, BESIDE])
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def check_package() -> Path:
    """Return the package's folder, or raise :class:`InputError` with the command to run."""
    package = find_package()
    if package is None:
        raise InputError(f"--format robustbench: needs RobustBench to load the file. {INSTALL}")
    return package


def _classes(name: str) -> ModuleType:
    """Return a file of RobustBench's architectures as a module, by its path.

    Importing the package itself would need timm, gdown and a package ``autoattack``.
    """
    file = check_package() / "model_zoo" / "architectures" / f"{name}.py"
    module = ModuleType(f"{PACKAGE}_{name}")
    SourceFileLoader(module.__name__, str(file)).exec_module(module)
    return module
