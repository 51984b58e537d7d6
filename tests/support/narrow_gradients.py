"""Gradients of narrow networks against float64; a program, as what it tests may end its process.

Each line that it prints is a network, and ends in ``right`` if its gradients are.
"""

from __future__ import annotations

import copy
import sys

import torch

from cure_fast.models import build_model

# One per class of network and block, with the widths to try: a wide ResNet's is a factor of 16
# channels, and the shortcuts of resnet50 read four times its width.
FAMILIES = {
    "resnet-small": (1, 2, 3, 4, 5, 6, 7, 8, 9, 12),
    "resnet18": (1, 3, 7, 12),
    "preactresnet18": (2, 5, 9),
    "resnet50": (1, 3),
    "wrn28-10": (1,),
}
# Of them, one of each class, and widths below, at and above the blocks of channels.
SOME = {
    "resnet-small": (1, 3, 5, 8, 12),
    "resnet18": (3,),
    "preactresnet18": (5,),
    "resnet50": (1,),
}


def gradients(model, images):
    """Return the gradients of a sum of squared logits by the images and all weights."""
    images = images.detach().to(memory_format=torch.channels_last).requires_grad_()
    return torch.autograd.grad(model(images).square().sum(), [images, *model.parameters()])


def worst_difference(name, width, size):
    """Return the largest difference of a gradient to float64's, relative to the largest of all."""
    torch.manual_seed(width)
    # Statistics of three images would amplify rounding a thousandfold.
    model = build_model(name, num_classes=3, width=width).eval()
    # An odd number of images is one that two threads share.
    images = torch.rand(3, 3, size, size)
    exact = gradients(copy.deepcopy(model).double(), images.double())
    found = gradients(model, images)
    weights = max(e.abs().max() for e in exact[1:])
    scales = [exact[0].abs().max(), *[weights] * (len(exact) - 1)]
    differences = [
        ((f - e).abs().max() / scale).item()
        for f, e, scale in zip(found, exact, scales, strict=True)
    ]
    return max(differences)


def compare_all(families):
    """Print the families, widths and threads at which a gradient is wrong."""
    for name, widths in families.items():
        for width in widths:
            for threads in (1, 2):
                torch.set_num_threads(threads)
                print(name, "width", width, "threads", threads, end=" ", flush=True)
                difference = worst_difference(name, width, 16)
                print("right" if difference < 1e-5 else f"WRONG: {difference:.1e}", flush=True)


if __name__ == "__main__":
    compare_all(SOME if sys.argv[1:] == ["some"] else FAMILIES)
