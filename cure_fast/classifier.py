"""What every model is: images in [0, 1] at the door, normalisation inside, float32 logits out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn


class Normalize(nn.Module):
    """Subtract a mean and divide by a deviation per channel.

    The buffers are not part of the state dict, so that published weights load strictly.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            tensor = torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1)
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised images, same shape and dtype."""
        return (x - self.mean) / self.std


class ImageClassifier(nn.Module):
    """Base of all models: ``forward`` = normalise, then :meth:`logits`, in the chosen precision.

    Attributes:
        stem_names: modules before the first block (convolution, and its BatchNorm).
        classifier_name: module that maps features to logits, an ``nn.Linear``.
        unused_modules: top-level modules that published weights may carry for this architecture
            though no forward pass ever calls them; loading leaves them out.
        width: channels of the first stage, the widening factor of a wide ResNet, or the length of a
            transformer's token; 0 where the network has no such number.
        image_size: height and width in pixels of the images that it takes; ``None`` takes any.
        patch: side in pixels of the patches that a transformer cuts images into, else ``None``.
        description: what it was built from, in the words of files of weights; see
            :func:`cure_fast.models.building.build_for_data`.
        stand_in: what computes the logits faster than the layers; ``None`` takes the layers.
        compute_dtype: ``None`` computes in the input's dtype; ``torch.bfloat16`` or
            ``torch.float16`` run :meth:`logits` under autocast. Evaluation sets it to ``None``.
    """

    stem_names: tuple[str, ...]
    classifier_name: str
    unused_modules: ClassVar[tuple[str, ...]] = ()
    image_size: int | None = None
    patch: int | None = None

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.description: dict[str, str] = {}
        self.normalize: nn.Module = nn.Identity()
        self.compute_dtype: torch.dtype | None = None
        self.stand_in: Callable[[Tensor], Tensor] | None = None

    def logits(self, x: Tensor) -> Tensor:
        """Return logits [N, K] of normalised images [N, C, H, W].

        Models average positions by ``mean``: the backward pass of adaptive pooling is not
        deterministic on a GPU.
        """
        raise NotImplementedError

    @property
    def attention_branches(self) -> list[nn.Module]:
        """The modules whose output is a transformer's attention, one per block, or none."""
        return []

    def adapted(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return first weights of another origin as this network names and shapes its own."""
        return dict(weights)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [N, K], float32 or wider, of images [N, C, H, W] in [0, 1]."""
        return self.own_logits(x) if self.stand_in is None else self.stand_in(x)

    def own_logits(self, x: Tensor) -> Tensor:
        """Return the logits as the layers compute them, in the chosen precision."""
        if self.compute_dtype is None:
            logits = self.logits(self.normalize(x))
        else:
            with torch.autocast(x.device.type, self.compute_dtype):
                logits = self.logits(self.normalize(x))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def block_first_convs(model: ImageClassifier) -> list[str]:
    """Return the parameter names of the first convolution inside each residual block, in order.

    The public CURE code masks these: names that contain ``conv1``, but for the stem.
    """
    return [name for name, _ in model.named_parameters() if name.endswith(".conv1.weight")]


@contextmanager
def attack_mode(model: nn.Module, mode: str) -> Iterator[None]:
    """Put ``model`` into eval or train mode without parameter gradients, and restore both after.

    Each module gets its own former mode back, so a frozen BatchNorm stays frozen, and each
    parameter its own ``requires_grad``.
    """
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        if mode == "eval":
            model.eval()
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)


@contextmanager
def still_statistics(model: nn.Module) -> Iterator[None]:
    """Let BatchNorm in train mode normalise by the batch, and leave its buffers as they are."""
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    norms = [m for m in model.modules() if isinstance(m, kinds) and m.track_running_stats]
    try:
        for norm in norms:
            norm.track_running_stats = False
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
