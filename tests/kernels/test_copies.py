"""A prepared call copies nothing: no tensor is laid out anew, and nothing is sent to the device.

The launches are left out, so that what torch itself does is all that is seen.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cure_fast import kernels
from cure_fast.kernels import RGP, TensorList, dispatch
from cure_fast.kernels.device.launching import Launch

COPIES = (
    "clone",
    "copy_",
    "_to_copy",
    "contiguous",
    "lift_fresh_copy",
    "masked_fill_",
    "pin_memory",
)


class Noted(TorchDispatchMode):
    """Counts the operations of torch by name."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def weights(dtype=torch.float32):
    """Return a convolution's weight as it lies in a channels_last network, and a vector."""
    first = torch.rand(8, 4, 3, 3).to(memory_format=torch.channels_last)
    return [first.to(dtype), torch.rand(8).to(dtype)]


def images():
    return [torch.rand(2, 3, 8, 8).to(memory_format=torch.channels_last) for _ in range(3)]


def update():
    numbers = torch.zeros(2), torch.tensor(0.1), torch.tensor(False)
    lists = {
        "momentum_buffers": TensorList(weights()),
        "scores": TensorList(weights()),
        "averages": TensorList(weights()),
        "low_precision_copies": TensorList(weights(torch.bfloat16)),
    }
    options = {"lr": numbers[1], "momentum": 0.9, "skip": numbers[2], "moved": numbers[2]}
    options |= {"decay": numbers[1], "thresholds": numbers[0], "weight_decay": numbers[0]}
    params, grads = TensorList(weights()), TensorList(weights())
    return lambda: kernels.masked_sgd_(params, grads, **lists, **options)


def average(**coin):
    averages, params = TensorList(weights()), TensorList(weights())
    options = {"decay": torch.tensor(0.9), "skip": torch.tensor(False), **coin}
    return lambda: kernels.ema_update_(averages, params, **options)


def copy():
    targets, sources, condition = TensorList(weights()), TensorList(weights()), torch.tensor(True)
    return lambda: kernels.copy_where_(targets, sources, condition=condition)


def mask():
    tensors, scores, numbers = TensorList(weights()), TensorList(weights()), torch.zeros(2)
    return lambda: kernels.mask_below_(tensors, scores, numbers)


def select():
    rgp = RGP([("a", weights()[0]), ("b", weights()[1])], percentile=30, alpha=0.1)
    grads = TensorList(weights()), TensorList(weights())
    return lambda: rgp.select(*grads)


def step(norm):
    def make():
        x_adv, x, grad = images()
        each = torch.full((2,), 0.1)
        return lambda: kernels.pgd_step_(x_adv, x, grad, step_size=each, eps=each, norm=norm)

    return make


def start(norm, kind):
    def make():
        x, number = images()[0], torch.tensor(0)
        options = {"eps": 0.1, "norm": norm, "start": kind, "seed": 1, "step": number}
        return lambda: kernels.pgd_init(x, **options)

    return make


def losses():
    logits, labels = [torch.randn(4, 10) for _ in range(4)], torch.zeros(4).long()
    teacher = dict(zip(("teacher_logits", "teacher_adv_logits"), logits[2:], strict=True))
    return lambda: kernels.softmax_losses(*logits[:2], labels, **teacher)


def augment():
    stored, zeros = torch.zeros(2, 8, 8, 3, dtype=torch.uint8), torch.zeros(2).long()
    drawn = {"top": zeros, "left": zeros, "mirror": zeros.bool()}
    return lambda: kernels.augment_crop_flip(stored, zeros, **drawn)


def coin():
    rate, step = torch.tensor(0.5), torch.tensor(0)
    return lambda: kernels.flip_coin(rate, seed=1, step=step)


CALLS = {
    "masked_sgd_": update,
    "ema_update_": average,
    "ema_update_ by coin": lambda: average(rate=torch.tensor(0.5), step=torch.tensor(0)),
    "flip_coin": coin,
    "copy_where_": copy,
    "mask_below_": mask,
    "RGP.select": select,
    "softmax_losses": losses,
    "augment_crop_flip": augment,
    **{f"pgd_step_ {norm}": step(norm) for norm in ("linf", "l2")},
    **{
        f"pgd_init {norm} {kind}": start(norm, kind)
        for norm in ("linf", "l2")
        for kind in ("uniform", "normal")
    },
}
# These make their memory at each call; RGP is their prepared form.
UNPREPARED = {"rgp_mask_", "rgp_select", "rgp_threshold", "rgp_score"}


@pytest.fixture
def launches(monkeypatch):
    """Take the kernels' path without their launches, which are noted."""
    found = []
    monkeypatch.setattr(dispatch, "uses_triton", lambda device: True)
    monkeypatch.setattr(Launch, "run", lambda launch: found.append(launch))
    return found


def test_every_operation_is_here():
    operations = {name for name in kernels.__all__ if name.islower()} - UNPREPARED
    assert {name.split()[0] for name in CALLS} - {"RGP.select"} == operations


@pytest.mark.parametrize("name", CALLS)
def test_a_prepared_call_copies_nothing(name, launches):
    call = CALLS[name]()
    call()
    launches.clear()
    with Noted() as noted:
        call()
    assert launches
    assert not {name: noted.names[name] for name in COPIES if noted.names[name]}


def test_a_copy_is_seen(launches):
    """A gradient that lies otherwise than its weight is laid out anew, and a plain list sent."""
    params, grads = weights(), [tensor.contiguous() for tensor in weights()]
    with Noted() as noted:
        kernels.masked_sgd_(params, grads, None, lr=0.1)
    assert noted.names["copy_"] or noted.names["clone"]
