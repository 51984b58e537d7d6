"""A network for attacks: the model in evaluation mode, with BatchNorm folded where it can be.

An attack needs gradients of the images alone, while weights and running statistics stand still. A
BatchNorm is then one scale and shift per channel. Where it reads a convolution whose output nothing
else reads, that convolution takes both over. In pre-activation networks the residual sum feeds a
BatchNorm and a shortcut, so the BatchNorms that read it stay.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from cure_fast.engine.trace import UnsupportedNetworkError, trace
from cure_fast.kernels import TensorList, fold_batchnorm
from cure_fast.kernels.layout import memory_order
from cure_fast.models import ImageClassifier, Normalize

from .compile import compile_static

HALF_DTYPES = (torch.bfloat16, torch.float16)


class FoldedNetwork:
    """Computes what ``model.eval()`` computes, by weights of its own that take no gradient.

    The model stays as it is. Its settings (strides, eps, normalisation) are taken over once, its
    weights and running statistics at each :meth:`refresh`, the first of which happens here.

    In half precision, features are rounded where autocast rounds them; the normalisation, and the
    scales and shifts of the BatchNorms that stay, are float32.

    Args:
        model: on one device, its parameters and statistics all float32, or all float64.
        dtype: of weights and features: None for the model's own, or, where that is float32,
            bfloat16 or float16.
        pad_channels: images get channels of zeros up to a multiple of this before the first
            convolution, whose weight is zero there: 3 channels are slow on tensor cores.
        compiled: whether ``torch.compile`` compiles the evaluation, without CUDA graphs of its
            own, and anew for each shape of the images.

    Attributes:
        dtype: of weights and features.
        folded: the names in the model of each convolution and of the BatchNorm that it takes over,
            in the order of computation.
        unfolded: the names in the model of the BatchNorms that stay, in the order of computation.
        evaluation: from images to logits; its parameters and buffers keep their addresses.

    Raises:
        UnsupportedNetworkError: for a layer or function that :func:`~cure_fast.engine.trace.trace`
            does not know, a BatchNorm without running statistics, a normalisation that is no
            :class:`~cure_fast.models.Normalize`, tensors of several dtypes or devices, and
            ``pad_channels`` where images go elsewhere than into ungrouped convolutions.
        ValueError: for another ``dtype``, and for ``pad_channels`` below 1.
    """

    def __init__(
        self,
        model: ImageClassifier,
        *,
        dtype: torch.dtype | None,
        pad_channels: int = 1,
        compiled: bool = False,
    ) -> None:
        own = _dtype_of(model)
        allowed = (None, own, *HALF_DTYPES) if own == torch.float32 else (None, own)
        if dtype not in allowed:
            wanted = " or ".join(map(str, allowed))
            raise ValueError(f"dtype: expected {wanted} for a model in {own}, got {dtype}.")
        if pad_channels < 1:
            raise ValueError(f"pad_channels: expected at least 1, got {pad_channels}.")
        self.dtype = own if dtype is None else dtype
        graph = trace(model)
        norms = _fold_graph(graph, model)
        extra = _extra_channels(graph, model, pad_channels)
        layers = _Layers(model, self.dtype)
        for node in graph.nodes:
            if node.op == "call_module":
                layers.add(node, norms.get(node), extra.get(node, 0))
        _add_ends(graph, layers, extra)
        self.folded = tuple((fold.conv_name, fold.norm_name) for fold in layers.folds)
        self.unfolded = tuple(layers.unfolded)
        self.evaluation = fx.GraphModule(layers.modules, graph, "FoldedEvaluation")
        self._updates: list[Callable[[], None]] = layers.updates()
        self._model = model
        self._addresses = self._current_addresses()
        self.refresh()
        self._compute: Callable[[Tensor], Tensor] = self.evaluation
        if compiled:
            self._compute = compile_static(self.evaluation)

    def __call__(self, x: Tensor) -> Tensor:
        """Return logits [N, K], float32 (float64 for float64), of images [N, 3, H, W] in [0, 1].

        Gradient flows to ``x`` alone.
        """
        return self._compute(x)

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the model's current weights and running statistics.

        Nothing waits for the device, and a CUDA graph can capture it.

        Raises:
            RuntimeError: if the model has other tensors than when this was built.
        """
        if self._current_addresses() != self._addresses:
            raise RuntimeError(
                f"{type(self._model).__name__} has other tensors than when it was folded. Write "
                "to its tensors in place, or build another FoldedNetwork."
            )
        for update in self._updates:
            update()

    def _current_addresses(self) -> list[int]:
        tensors = (*self._model.parameters(), *self._model.buffers())
        return [tensor.data_ptr() for tensor in tensors]


def _dtype_of(model: ImageClassifier) -> torch.dtype:
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    kinds = {(tensor.dtype, tensor.device) for tensor in tensors}
    dtype = tensors[0].dtype if len(kinds) == 1 else None
    if dtype not in (torch.float32, torch.float64):
        found = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
        raise UnsupportedNetworkError(
            f"{type(model).__name__}: expected all tensors in float32, or all in float64, on one "
            f"device, got {found or 'none'}"
        )
    return dtype


def _called(node: fx.Node, model: nn.Module) -> nn.Module | None:
    """Return the layer of the model that ``node`` calls, or None if it calls none."""
    return model.get_submodule(str(node.target)) if node.op == "call_module" else None


def _fold_graph(graph: fx.Graph, model: nn.Module) -> dict[fx.Node, str]:
    """Take the BatchNorms that fold out of ``graph``; return their names by convolution."""
    norms: dict[fx.Node, str] = {}
    for node in graph.nodes:
        norm = _called(node, model)
        if not isinstance(norm, nn.BatchNorm2d):
            continue
        if norm.running_mean is None or norm.running_var is None:
            raise UnsupportedNetworkError(
                f"{node.target} has no running statistics (track_running_stats=False): what it "
                "computes depends on the batch, so it is no scale and shift"
            )
        (conv,) = node.all_input_nodes
        is_free = conv not in norms and len(conv.users) == 1
        if is_free and isinstance(_called(conv, model), nn.Conv2d):
            norms[conv] = str(node.target)
            node.replace_all_uses_with(conv)
            graph.erase_node(node)
    return norms


def _extra_channels(graph: fx.Graph, model: nn.Module, pad_channels: int) -> dict[fx.Node, int]:
    """Return by how many channels each convolution of the images grows; empty for none."""
    extra: dict[fx.Node, int] = {}
    for node in next(iter(graph.nodes)).users if pad_channels > 1 else ():
        layer = _called(node, model)
        if not isinstance(layer, nn.Conv2d) or layer.groups > 1:
            raise UnsupportedNetworkError(
                f"{type(model).__name__}: channels can be added to images only where they go into "
                f"convolutions without groups, and they go into {node.target}"
            )
        if growth := -layer.in_channels % pad_channels:
            extra[node] = growth
    return extra


def _add_ends(graph: fx.Graph, layers: _Layers, extra: dict[fx.Node, int]) -> None:
    """Make ``graph`` one from images in [0, 1] to logits in float32 or wider."""
    images = next(iter(graph.nodes))
    users = list(images.users)
    with graph.inserting_after(images):
        prepared = graph.call_method("to", (images, layers.dtype))
    if isinstance(layers.model.normalize, Normalize):
        with graph.inserting_before(prepared):
            normalized = graph.call_module("normalize", (images,))
        layers.put(normalized, copy.deepcopy(layers.model.normalize))
        prepared.args = (normalized, layers.dtype)
    elif type(layers.model.normalize) is not nn.Identity:
        kind = type(layers.model.normalize).__name__
        raise UnsupportedNetworkError(f"the fast engine does not know normalisation by {kind}")
    if extra:
        after = (0, 0, 0, 0, 0, next(iter(extra.values())))
        with graph.inserting_after(prepared):
            prepared = graph.call_function(F.pad, (prepared, after))
    for user in users:
        user.replace_input_with(images, prepared)
    output = graph.output_node()
    with graph.inserting_before(output):
        wide = torch.promote_types(layers.dtype, torch.float32)
        logits = graph.call_method("to", (output.args[0], wide))
    output.args = (logits,)


@dataclass(frozen=True)
class _Fold:
    """A convolution of the model and the BatchNorm that it takes over, with their names there."""

    conv_name: str
    norm_name: str
    conv: nn.Conv2d
    norm: nn.BatchNorm2d
    # What is overwritten: of the shape and memory order of conv.weight, and [O].
    weight: Tensor
    bias: Tensor


class _Layers:
    """The layers of a folded network, one for each call, and where their values come from.

    Calls of one layer have one each: another BatchNorm may follow each time.
    """

    def __init__(self, model: ImageClassifier, dtype: torch.dtype) -> None:
        self.model = model
        self.dtype = dtype
        self.modules: dict[str, nn.Module] = {}
        self.folds: list[_Fold] = []
        self.unfolded: list[str] = []
        self._affines: list[tuple[nn.BatchNorm2d, _Affine]] = []
        self._copies: list[tuple[Tensor, Tensor]] = []

    def put(self, node: fx.Node, layer: nn.Module) -> None:
        self.modules[node.name] = layer
        node.target = node.name

    def add(self, node: fx.Node, norm_name: str | None, extra: int) -> None:
        """Make the layer of a call; a convolution takes a BatchNorm over and ``extra`` channels."""
        name = str(node.target)
        layer = self.model.get_submodule(name)
        if isinstance(layer, nn.BatchNorm2d):
            affine = _Affine(layer)
            self._affines.append((layer, affine))
            self.unfolded.append(name)
            self.put(node, affine)
            return
        made = copy.deepcopy(layer).eval().requires_grad_(False)
        if isinstance(made, nn.Conv2d):
            made.in_channels += extra
            weight = _blank_weight(layer.get_parameter("weight"), extra, self.dtype)
            made.weight = nn.Parameter(weight, requires_grad=False)
        made.to(self.dtype)
        if isinstance(made, nn.Conv2d) and norm_name is not None:
            self._add_fold(name, norm_name, made)
        else:
            for parameter_name, source in layer.named_parameters():
                target = made.get_parameter(parameter_name).detach()
                own = target[:, : source.shape[1]] if target.ndim > 1 else target
                self._copies.append((own, source.detach()))
        self.put(node, made)

    def _add_fold(self, conv_name: str, norm_name: str, made: nn.Conv2d) -> None:
        """Fold into the weights of ``made``, directly where they lie as the model's do."""
        conv, norm = self.model.get_submodule(conv_name), self.model.get_submodule(norm_name)
        assert isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
        weight = made.weight.detach()
        bias = weight.new_zeros(made.out_channels)
        made.bias = nn.Parameter(bias, requires_grad=False)
        if (weight.shape, memory_order(weight)) != (conv.weight.shape, memory_order(conv.weight)):
            folded = torch.zeros_like(conv.weight, dtype=self.dtype, requires_grad=False)
            self._copies.append((weight[:, : folded.shape[1]], folded))
            weight = folded
        self.folds.append(_Fold(conv_name, norm_name, conv, norm, weight, bias))

    def updates(self) -> list[Callable[[], None]]:
        """Return what takes over the model's values, in this order."""
        updates: list[Callable[[], None]] = []
        if self.folds:
            wide = self.dtype == torch.float64
            updates.append((_WideFolding if wide else _KernelFolding)(self.folds))
        if self._affines:
            updates.append(_AffineUpdate(self._affines))
        # Last, as some copy what was folded.
        return [*updates, _Copying(self._copies)]


def _blank_weight(weight: Tensor, extra: int, dtype: torch.dtype) -> Tensor:
    """Return zeros in channels_last, with ``extra`` more input channels than ``weight``."""
    outputs, inputs, *size = weight.shape
    zeros = weight.new_zeros(outputs, inputs + extra, *size, dtype=dtype, requires_grad=False)
    return zeros.to(memory_format=torch.channels_last)


class _KernelFolding:
    """Folds float32 weights into weights of any dtype, all in one launch."""

    def __init__(self, folds: Sequence[_Fold]) -> None:
        norms = [fold.norm for fold in folds]
        eps = [norm.eps for norm in norms]
        *self._inputs, self._weights, self._biases = (
            TensorList([fold.conv.weight for fold in folds]),
            TensorList([fold.conv.bias for fold in folds]),
            TensorList([norm.weight for norm in norms]),
            TensorList([norm.bias for norm in norms]),
            TensorList([norm.running_mean for norm in norms]),
            TensorList([norm.running_var for norm in norms]),
            TensorList([fold.weight for fold in folds]),
            TensorList([fold.bias for fold in folds]),
        )
        self._eps = torch.tensor(eps, dtype=torch.float32, device=self._weights.device)

    def __call__(self) -> None:
        out = {"out_weights": self._weights, "out_biases": self._biases}
        fold_batchnorm(*self._inputs, eps=self._eps, **out)


class _WideFolding:
    """Folds float64 weights, which the kernel does not take."""

    def __init__(self, folds: Sequence[_Fold]) -> None:
        self._folds = folds
        self._affines = [(fold.norm, _Affine(fold.norm)) for fold in folds]
        self._update = _AffineUpdate(self._affines)

    def __call__(self) -> None:
        self._update()
        for fold, (_, affine) in zip(self._folds, self._affines, strict=True):
            torch.mul(fold.conv.weight, affine.scale.view(-1, 1, 1, 1), out=fold.weight)
            fold.bias.copy_(affine.shift)
            if fold.conv.bias is not None:
                fold.bias.addcmul_(fold.conv.bias, affine.scale)


class _Affine(nn.Module):
    """A BatchNorm in evaluation mode: one scale and one shift per channel."""

    scale: Tensor
    shift: Tensor
    zeros: Tensor

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        for name in ("scale", "shift", "zeros"):
            self.register_buffer(name, torch.zeros_like(norm.get_buffer("running_var")))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``scale * x + shift``, rounded once to the dtype of ``x`` [N, C, H, W]."""
        # One kernel, float32 inside, where a product and a sum would store float32 between them.
        # Its own factor, 1 / sqrt(variance + eps), is 1 / sqrt(0 + 1).
        return F.batch_norm(x, self.zeros, self.zeros, self.scale, self.shift, eps=1.0)


class _AffineUpdate:
    """Computes scales and shifts from the statistics and weights of their BatchNorms."""

    def __init__(self, affines: Sequence[tuple[nn.BatchNorm2d, _Affine]]) -> None:
        norms = [norm for norm, _ in affines]
        self._scales = [affine.scale for _, affine in affines]
        self._shifts = [affine.shift for _, affine in affines]
        self._means = [norm.get_buffer("running_mean") for norm in norms]
        self._variances = [norm.get_buffer("running_var") for norm in norms]
        self._eps = [norm.eps for norm in norms]
        # A BatchNorm without a weight and a bias (affine=False) has 1 and 0.
        ones, zeros = map(torch.ones_like, self._means), map(torch.zeros_like, self._means)
        self._weights = [
            one if n.weight is None else n.weight for n, one in zip(norms, ones, strict=True)
        ]
        self._biases = [
            zero if n.bias is None else n.bias for n, zero in zip(norms, zeros, strict=True)
        ]

    def __call__(self) -> None:
        deviations = torch._foreach_add(self._variances, self._eps)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_sqrt_(deviations)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_copy_(self._scales, self._weights)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_div_(self._scales, deviations)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_copy_(self._shifts, self._biases)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_addcmul_(self._shifts, self._means, self._scales, value=-1)  # pyright: ignore[reportPrivateImportUsage]


class _Copying:
    """Copies tensors onto others, grouped so that each group is one launch where they lie alike."""

    def __init__(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._groups: dict[object, tuple[list[Tensor], list[Tensor]]] = {}
        for target, source in pairs:
            alike = memory_order(target) == memory_order(source)
            kind = (target.dtype, source.dtype, alike)
            targets, sources = self._groups.setdefault(kind, ([], []))
            targets.append(target)
            sources.append(source)

    def __call__(self) -> None:
        for targets, sources in self._groups.values():
            torch._foreach_copy_(targets, sources)  # pyright: ignore[reportPrivateImportUsage]
