"""Similarity of features of natural and adversarial images, layer by layer: CURE's Figs. 3 and 12.

Rows are the layers of a network on natural images, columns the same layers on what an attack made
of these. Similarity is the linear centred kernel alignment (Kornblith et al., Similarity of Neural
Network Representations Revisited, ICML 2019) from the unbiased estimate of HSIC (Song et al.,
Feature Selection via Dependence Maximization, JMLR 2012, Eq. 4), averaged over batches (Nguyen et
al., Do Wide and Deep Networks Learn the Same Things?, ICLR 2021, Eq. 3).

The paper's code reads the outputs of modules, so ReLUs and additions that code of the network calls
as functions are missing there. Here every call is seen as PyTorch makes it, in any network that
runs in Python; a layer that computes by other means is read at the output of its module.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from cure_fast.analysis.shape import Analysis, Numbers, Settings, Subject, Task
from cure_fast.config.attack_names import attack_name, parse_single
from cure_fast.config.checks import MOST, Bounds, check, nearest, shown
from cure_fast.errors import InputError
from cure_fast.evaluation.evaluate import measuring
from cure_fast.figures import COLUMN, PAGE, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The estimate divides by N - 3.
FEWEST = 4
# Calls whose results are features, as functions, methods, or in place with a "_" at the end.
CALLS = {
    *("conv1d", "conv2d", "conv3d", "conv_transpose2d", "linear", "add", "mean"),
    *("batch_norm", "layer_norm", "group_norm", "instance_norm"),
    *("relu", "relu6", "leaky_relu", "elu", "gelu", "silu", "hardtanh", "hardswish"),
    *("max_pool2d", "avg_pool2d", "adaptive_max_pool2d", "adaptive_avg_pool2d"),
}
# Modules that are layers however they compute.
LAYERS = (_ConvNd, _BatchNorm, nn.Linear, nn.ReLU, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
# Labels that an axis of a column's width has room for.
LABELS = 18


@dataclass(frozen=True, kw_only=True)
class CkaSettings(Settings):
    """Settings of ``cka``."""

    layers: tuple[str, ...] = ("*",)
    """Layers by name or pattern (layer1.*), with commas between: all convolutions, normalisations,
    activations, poolings, additions of branches and linear layers by default."""
    attack: str = "pgd20"
    """What makes the adversarial images: pgdK, cwK or fgsm, as for cure-fast eval."""
    batch: Annotated[int, Bounds(FEWEST)] = 256
    """Images of one estimate at most, 4 or more; estimates are averaged."""


class Features(TorchFunctionMode):
    """Hands over the features [N, ...] of a network in its forward pass, in the order of calls.

    A feature is called after its module, and where a module with children makes it itself by the
    call (``layer1.0.relu``); what comes again has ``_2`` and so on behind. It is handed over at
    once, before the network can write over it.

    Attributes:
        see: what it is handed to, by its name.
        by_module: names of layers that no known call computed, read at their module's output.
    """

    def __init__(self, network: nn.Module, count: int, see: Callable[[str, Tensor], None]) -> None:
        super().__init__()
        self.network, self.count, self.see = network, count, see
        self.by_module: list[str] = []
        self._times: Counter[str] = Counter()
        self._inside: list[tuple[str, nn.Module, int]] = [("", network, 0)]
        self._hooks = ExitStack()

    def __enter__(self) -> Features:
        with ExitStack() as hooks:
            named = dict(self.network.named_modules())
            if any(hasattr(module, "_orig_mod") for module in named.values()):
                # What torch.compile made is run as it was written.
                hooks.enter_context(torch.compiler.set_stance("force_eager"))
            for name, module in named.items():
                if isinstance(module, torch.jit.ScriptModule):
                    continue
                handle = module.register_forward_pre_hook(partial(self._begin, name))
                hooks.callback(handle.remove)
                hooks.callback(module.register_forward_hook(self._end).remove)
            self._hooks = hooks.pop_all()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._hooks.close()

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Make the call, and hand its result over where it is a feature."""
        result = func(*args, **(kwargs or {}))
        call = getattr(func, "__name__", "").removesuffix("_")
        if call in CALLS and self._is_feature(result) and is_of_images(call, args, result):
            self._give(call, result)
        return result

    def _begin(self, name: str, module: nn.Module, _: Any) -> None:
        self._inside.append((name, module, self._times.total()))

    def _end(self, module: nn.Module, _: Any, result: Any) -> None:
        seen = self._inside[-1][2]
        if isinstance(module, LAYERS) and self._is_feature(result) and self._times.total() == seen:
            self.by_module.append(self._give(type(module).__name__, result))
        self._inside.pop()

    def _is_feature(self, result: Any) -> bool:
        return isinstance(result, Tensor) and result.ndim > 1 and len(result) == self.count

    def _give(self, call: str, result: Tensor) -> str:
        path, module, _ = self._inside[-1]
        whole = path and (isinstance(module, LAYERS) or type(module).__module__.startswith("torch"))
        name = path if whole and not [*module.children()] else f"{path}.{call}".lstrip(".")
        self._times[name] += 1
        again = self._times[name]
        name = name if again == 1 else f"{name}_{again}"
        self.see(name, result)
        return name


def is_of_images(call: str, args: Sequence[Any], result: Tensor) -> bool:
    """Return whether a call pools positions if it is a mean, and joins two branches if a sum."""
    if call == "mean":
        return isinstance(args[0], Tensor) and result.ndim < args[0].ndim
    if call == "add":
        parts = [each for each in args if isinstance(each, Tensor)]
        return len(parts) == 2 and parts[0].shape == parts[1].shape
    return True


def kernels(network: nn.Module, x: Tensor, layers: Sequence[str]) -> Tensor:
    """Return the linear kernels of layers on images [N, C, H, W]: float64 [L, N, N], on the CPU.

    Features are less their mean over the images: the unbiased estimate is the same, and rounding
    smaller.
    """
    found: dict[str, Tensor] = {}

    def see(name: str, features: Tensor) -> None:
        if name in layers:
            flat = features.detach().flatten(1).float()
            flat = flat - flat.mean(0)
            found[name] = (flat @ flat.T).double().cpu()

    with measuring(network, x.device), Features(network, len(x), see):
        network(x)
    return torch.stack([found[name] for name in layers])


def hsic(k: Tensor, other: Tensor) -> Tensor:
    """Return the unbiased estimates of HSIC [P, Q] of kernels [P, N, N] and [Q, N, N], N >= 4."""
    n = k.shape[-1]
    others = 1 - torch.eye(n, dtype=k.dtype)
    k, other = k * others, other * others
    sums, other_sums = k.sum(2), other.sum(2)
    whole = torch.outer(sums.sum(1), other_sums.sum(1)) / ((n - 1) * (n - 2))
    trace = k.flatten(1) @ other.flatten(1).T
    return (trace + whole - 2 / (n - 2) * sums @ other_sums.T) / (n * (n - 3))


def alignment(estimates: Sequence[tuple[Tensor, Tensor, Tensor]]) -> list[list[float | None]]:
    """Return CKA [P][Q] from each batch's HSIC of both kinds [P, Q], of the rows' kernels with
    themselves [P], and of the columns' [Q]; None where a layer's features do not vary.
    """
    both, rows, columns = (torch.stack(each).mean(0) for each in zip(*estimates, strict=True))
    scale = (rows.clamp(min=0)[:, None] * columns.clamp(min=0)).sqrt()
    found = (both / scale).tolist()
    return [[value if math.isfinite(value) else None for value in row] for row in found]


def layers_of(subject: Subject, task: Task) -> tuple[list[str], list[str]]:
    """Return the names of a network's features in order, and of those read at their module."""
    names: list[str] = []
    x = task.pixels[:FEWEST].to(task.device)
    watching = Features(subject.network, len(x), lambda name, _: names.append(name))
    with measuring(subject.network, task.device), watching:
        subject.network(x)
    if not names:
        raise InputError(
            f"{subject.name}: expected a network whose layers can be seen, got one that runs "
            "outside of Python. Give it as it was before torch.jit."
        )
    return names, watching.by_module


def chosen(patterns: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return the names that any of the patterns has."""
    return [name for name in names if any(fnmatchcase(name, each) for each in patterns)]


def check_layers(patterns: Sequence[str], layers: dict[str, list[str]]) -> None:
    """Raise ``InputError`` for a pattern without a layer, or a network without a pattern's."""
    known = [*dict.fromkeys(name for names in layers.values() for name in names)]
    more = f" and {len(known) - MOST} more" if len(known) > MOST else ""
    for pattern in patterns:
        if not chosen([pattern], known):
            raise InputError(
                f"--layers: expected names or patterns of {', '.join(known[:MOST])}{more}, got "
                f"{shown(pattern)}.{nearest(pattern, known)}"
            )
    for model, names in layers.items():
        check(bool(chosen(patterns, names)), "layers", ",".join(patterns), f"a layer of {model}")


def compute(task: Task, settings: CkaSettings) -> Numbers:
    """Return the similarity of each two layers of each network."""
    parse_single(settings.attack)
    check(bool(settings.layers), "layers", "", "a name or pattern")
    count = len(task.images)
    groups = torch.arange(count).tensor_split(math.ceil(count / settings.batch))
    fewest = min(map(len, groups))
    check(fewest >= FEWEST, "limit", count, f"images of which each batch has {FEWEST} or more")
    seen = {subject.name: layers_of(subject, task) for subject in task.subjects}
    check_layers(settings.layers, {name: names for name, (names, _) in seen.items()})
    layers = {name: chosen(settings.layers, names) for name, (names, _) in seen.items()}

    def estimate(subject: Subject, indices: Tensor) -> list[list[Any]]:
        batch = replace(task, images=task.images[indices], labels=task.labels[indices])
        names = layers[subject.name]
        natural, adversarial = (
            kernels(subject.network, x.to(task.device), names)
            for x in (batch.pixels, batch.attacked(subject, settings.attack))
        )
        own = (hsic(each, each).diagonal() for each in (natural, adversarial))
        return [each.tolist() for each in (hsic(natural, adversarial), *own)]

    parts = {
        f"{subject.name}, batch {number}": partial(estimate, subject, indices)
        for subject in task.subjects
        for number, indices in enumerate(groups, start=1)
    }
    found = iter(task.each(parts, "cka").values())
    rows = []
    for subject in task.subjects:
        names = layers[subject.name]
        estimates = [next(found) for _ in groups]
        tensors = [tuple(torch.tensor(e, dtype=torch.float64) for e in each) for each in estimates]
        values = alignment(tensors)  # pyright: ignore[reportArgumentType]
        pairs = [(i, j) for i in range(len(names)) for j in range(len(names))]
        # Each layer with itself first: what a table that is cut off should have.
        rows += [
            {
                "model": subject.name,
                "natural": names[i],
                "adversarial": names[j],
                "cka": values[i][j],
            }
            for i, j in sorted(pairs, key=lambda pair: pair[0] != pair[1])
        ]
    return {
        "rows": rows,
        "layers": layers,
        "read_at_modules": {name: by_module for name, (_, by_module) in seen.items()},
        "batches": [len(indices) for indices in groups],
    }


def draw(numbers: Numbers) -> Figure:
    """Return a map per network."""
    import numpy as np

    subjects = numbers["subjects"]
    columns = min(len(subjects), 3)
    lines = math.ceil(len(subjects) / columns)
    width = COLUMN if columns == 1 else PAGE
    side = width / columns
    figure, axes = new_figure(lines, columns, width=width, height=lines * 0.9 * side + 0.1)
    attack = attack_name(numbers["settings"]["attack"])
    shown_image: Any = None
    for subject, place in zip(subjects, axes, strict=False):
        names = numbers["layers"][subject["name"]]
        index = {name: number for number, name in enumerate(names)}
        values = np.full((len(names), len(names)), np.nan)
        for row in numbers["rows"]:
            if row["model"] == subject["name"] and row["cka"] is not None:
                values[index[row["natural"]], index[row["adversarial"]]] = row["cka"]
        shown_image = place.imshow(values, vmin=0, vmax=1, interpolation="nearest")
        place.set_title(subject["name"])
        label_layers(place, names, most=LABELS if columns < 3 else LABELS - 4)
        place.set_xlabel(f"layer, on images of {attack}")
    for place in axes[::columns]:
        place.set_ylabel("layer, on natural images")
    for place in axes[len(subjects) :]:
        place.set_visible(False)
    bar = figure.colorbar(shown_image, ax=axes, shrink=0.7, aspect=30, pad=0.02)
    bar.set_label("CKA")
    return figure


def label_layers(place: Axes, names: Sequence[str], *, most: int) -> None:
    """Label every so many layers of both axes, that there are ``most`` labels at most."""
    step = math.ceil(len(names) / most)
    ticks = range(0, len(names), step)
    place.set_xticks(ticks, names[::step], rotation=90, fontsize=5)
    place.set_yticks(ticks, names[::step], fontsize=5)
    place.grid(visible=False)


CKA = Analysis(
    name="cka",
    title="Similarity of features of natural and adversarial images",
    source="CURE, Figs. 3 and 12",
    about=(
        "Linear CKA between layers, in the order of the forward pass; 1 is alike up to rotation "
        "and scale, 0 unrelated. A diagonal that fades shows from where on the attack changes what "
        "the network sees. Additions and ReLUs that are no modules are seen too, unlike in the "
        "paper's code."
    ),
    settings=CkaSettings(),
    compute=compute,
    draw=draw,
    images=512,
)
