"""Vision transformers of timm, with patches of 4x4 pixels for small images.

ViT-B (Dosovitskiy et al., ICLR 2021), DeiT-S (Touvron et al., ICML 2021) and ConViT-B (d'Ascoli et
al., ICML 2021) as adversarial training on CIFAR takes them (Mo et al., NeurIPS 2022): no dropout,
and weights of 16x16 patches fitted by :meth:`VisionTransformer.adapted`.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cure_fast.errors import InputError

from .own import Wrapped

LOG = logging.getLogger(__name__)
PATCH = 4
# First blocks of ConViT-B whose attention starts local, as a convolution.
LOCAL_BLOCKS = 10


class VisionTransformer(Wrapped):
    """A transformer of timm for images of one size.

    Args:
        depth: number of blocks.
        heads: attention heads of each block.
        convolutional: attention that starts as a convolution (ConViT).
        num_classes: number of logits.
        width: length of a token, a multiple of ``heads``.
        image_size: height and width of the images in pixels, a multiple of 4.

    Raises:
        InputError: for another width or size, or without timm.
    """

    def __init__(
        self,
        depth: int,
        heads: int,
        *,
        convolutional: bool = False,
        num_classes: int,
        width: int,
        image_size: int,
    ) -> None:
        if width % heads:
            raise InputError(f"--width: expected a multiple of {heads} heads, got {width}.")
        if image_size % PATCH:
            raise InputError(
                f"--model: expected images whose side its patches of {PATCH}x{PATCH} pixels "
                f"divide, got {image_size}x{image_size}. Choose another --model."
            )
        if importlib.util.find_spec("timm") is None:
            raise InputError(
                "--model: vision transformers need timm, which is not installed. Run: python -m "
                "pip install 'timm>=1.0.31'"
            )
        build = _convit if convolutional else _vit
        net = build(depth, heads, width, image_size=image_size, num_classes=num_classes)
        super().__init__(net, width=width)
        self.image_size, self.patch = image_size, PATCH

    @property
    def attention_branches(self) -> list[nn.Module]:
        """The attention of each block, whose output is added to the block's input."""
        return [
            block.get_submodule("attn") for block in self.net.get_submodule("blocks").children()
        ]

    def adapted(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return weights of larger patches and images, and of other classes, fitted to this model.

        Kernels of patches are summed in blocks: a patch whose pixels are those of a smaller one,
        repeated, has the same token. Position embeddings are resized bilinearly. A classifier of
        another number of classes is replaced by the model's own, which is logged.
        """
        fitted, own = super().adapted(weights), self.state_dict()
        for name, tensor in fitted.items():
            wanted = own.get(name)
            if wanted is None or wanted.shape == tensor.shape or wanted.ndim != tensor.ndim:
                continue
            if name == "net.patch_embed.proj.weight" and tensor.shape[2] % PATCH == 0:
                blocks = tensor.unflatten(3, (PATCH, -1)).unflatten(2, (PATCH, -1))
                fitted[name] = blocks.sum((3, 5))
            elif name == "net.pos_embed":
                fitted[name] = _resized(tensor, wanted)
            elif name.startswith(f"{self.classifier_name}."):
                LOG.warning("%s: of %d classes, taken anew for %d.", name, len(tensor), len(wanted))
                fitted[name] = wanted
        return fitted


def _vit(depth: int, heads: int, width: int, *, image_size: int, num_classes: int) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer as Net

    return Net(
        img_size=image_size,
        patch_size=PATCH,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        num_classes=num_classes,
    )


def _convit(depth: int, heads: int, width: int, *, image_size: int, num_classes: int) -> nn.Module:
    from timm.models.convit import ConVit

    net: Any = ConVit(
        img_size=image_size,
        patch_size=PATCH,
        embed_dim=width // heads,
        depth=depth,
        num_heads=heads,
        num_classes=num_classes,
        local_up_to_layer=LOCAL_BLOCKS,
    )
    for block in net.blocks[:LOCAL_BLOCKS]:
        # Here, as timm puts this buffer into its place in the first forward pass only.
        block.attn.rel_indices = block.attn.get_rel_indices(net.num_patches)
    return net


def _resized(positions: Tensor, wanted: Tensor) -> Tensor:
    """Return embeddings [1, tokens, D] for the grid of others; class tokens stay as they are."""
    side = math.isqrt(wanted.shape[1])
    # ConViT has no embedding for its class token.
    tokens = wanted.shape[1] - side**2
    former = math.isqrt(positions.shape[1] - tokens)
    if former**2 != positions.shape[1] - tokens:
        return positions
    grid = positions[:, tokens:].unflatten(1, (former, former)).permute(0, 3, 1, 2)
    resized = F.interpolate(grid.float(), (side, side), mode="bilinear").flatten(2).mT
    return torch.cat((positions[:, :tokens].float(), resized), dim=1)
