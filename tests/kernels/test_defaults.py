"""Torch's default dtype and device are the user's: no operation's result depends on them."""

from __future__ import annotations

import contextlib

import pytest
import torch

from cure_fast import kernels
from gpu_cases import flat, same_bits

CPU = torch.device("cpu")


def numbers(seed, *shape):
    generator = torch.Generator(CPU).manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float32, device=CPU)


def lists(seed):
    return [numbers(seed, 5, 3), numbers(seed + 1, 700)]


def on_cpu(*values, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype, device=CPU)


def update():
    averages, copies = lists(4), [tensor.half() for tensor in lists(5)]
    params, buffers = lists(0), lists(2)
    kernels.masked_sgd_(
        params,
        lists(1),
        buffers,
        lr=0.1,
        momentum=0.9,
        weight_decay=[0.1, 0.2],
        scores=lists(3),
        thresholds=on_cpu(0.1, 0.2),
        averages=averages,
        low_precision_copies=copies,
    )
    return [params, buffers, averages, copies]


def average():
    averages = lists(0)
    return [kernels.ema_update_(averages, lists(1), decay=0.9), averages]


def average_by_coin():
    averages = lists(0)
    moved = kernels.ema_update_(averages, lists(1), decay=0.9, rate=0.5, seed=1, step=1)
    return [moved, averages]


def copy():
    targets = lists(0)
    kernels.copy_where_(targets, lists(1), condition=on_cpu(True, dtype=torch.bool)[0])
    return targets


def step(norm):
    def call():
        x_adv, x = numbers(0, 2, 3, 4).sigmoid(), numbers(1, 2, 3, 4).sigmoid()
        return kernels.pgd_step_(x_adv, x, numbers(2, 2, 3, 4), step_size=0.1, eps=0.2, norm=norm)

    return call


def start(norm, kind):
    return lambda: kernels.pgd_init(
        numbers(0, 2, 3, 4).sigmoid(), eps=0.1, norm=norm, start=kind, seed=3, step=2
    )


def losses():
    labels = on_cpu(1, 0, -100, dtype=torch.int64)
    return kernels.softmax_losses(
        *(numbers(0, 3, 4), numbers(1, 3, 4), labels),
        teacher_logits=numbers(2, 3, 4),
        teacher_adv_logits=numbers(3, 3, 4),
    )


def losses_of_one():
    labels = on_cpu(1, 0, -100, dtype=torch.int64)
    return kernels.softmax_losses(numbers(0, 3, 4), None, labels, gradients=("natural_ce",))


def augment():
    images = torch.arange(120, dtype=torch.uint8, device=CPU).view(2, 5, 4, 3)
    corner, mirror = on_cpu(3, 5, dtype=torch.int64), on_cpu(True, False, dtype=torch.bool)
    return kernels.augment_crop_flip(
        images, on_cpu(1, 0, dtype=torch.int64), top=corner, left=corner, mirror=mirror
    )


CALLS = {
    "masked_sgd_": update,
    "ema_update_": average,
    "ema_update_ by coin": average_by_coin,
    "flip_coin": lambda: kernels.flip_coin(0.5, seed=1, step=2),
    "copy_where_": copy,
    "softmax_losses": losses,
    "softmax_losses of one": losses_of_one,
    "augment_crop_flip": augment,
    **{f"pgd_step_ {norm}": step(norm) for norm in ("linf", "l2")},
    **{
        f"pgd_init {norm} {kind}": start(norm, kind)
        for norm in ("linf", "l2")
        for kind in ("uniform", "normal", "zero")
    },
}


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS = {
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "meta": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("choice", ["triton", "reference"])
@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("name", CALLS)
def test_results_have_the_same_bits_dtypes_and_device(name, default, choice, monkeypatch):
    monkeypatch.setenv("CURE_FAST_KERNELS", choice)
    expected = flat(CALLS[name]())
    with DEFAULTS[default]():
        found = flat(CALLS[name]())
    assert found
    assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in expected]
    assert all(map(same_bits, found, expected))
