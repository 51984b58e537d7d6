"""Kernels on a real GPU give the references' results.

The references run on the CPU, on copies of the same tensors, so nothing is shared with the kernels.
Tolerances are those of the interpreter's tests: sums, exponentials and logarithms differ in their
last bits between devices; scores, thresholds and masks do not.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cure_fast import kernels
from cure_fast.kernels import augment, ema, pgd, rgp, softmax, update
from cure_fast.models import build_model
from gpu_cases import (
    GPU,
    SETTINGS,
    SGD,
    flat,
    gradients,
    hard_gradients,
    on_gpu,
    pictures,
    resident_batch,
    same_bits,
)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("triton_kernels")]


# Selection and mask.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("score", ["abs", "signed", "abs_of_sum"])
@pytest.mark.parametrize("percentile", [0.01, 30.0, 50.5, 100.0])
def test_selection_has_the_bits_of_the_reference(dtype, score, percentile):
    nat, adv = gradients(dtype), gradients(dtype, seed=1)
    settings = {"percentile": percentile, "alpha": 0.1, "score": score}
    wanted = rgp.rgp_select_ref(nat, adv, **settings)
    found = kernels.rgp_select(on_gpu(nat), on_gpu(adv), **settings)
    assert all(same_bits(a, b) for a, b in zip(found.scores, wanted.scores, strict=True))
    assert same_bits(found.thresholds, wanted.thresholds)
    assert same_bits(found.kept, wanted.kept) and same_bits(found.nonfinite, wanted.nonfinite)


@pytest.mark.parametrize("score", ["abs", "signed", "abs_of_sum"])
@pytest.mark.parametrize("percentile", [10.0, 30.0, 99.0])
def test_selection_of_hard_values_has_the_bits_of_the_reference(score, percentile):
    nat = hard_gradients()
    adv = [g.flip(0) for g in nat]
    settings = {"percentile": percentile, "alpha": 0.5, "score": score}
    wanted = rgp.rgp_select_ref(nat, adv, **settings)
    found = kernels.rgp_select(on_gpu(nat), on_gpu(adv), **settings)
    # A NaN keeps no bits of its own in arithmetic, so NaN equals NaN here.
    assert torch.equal(found.thresholds.cpu().nan_to_num(7e9), wanted.thresholds.nan_to_num(7e9))
    assert same_bits(found.kept, wanted.kept) and same_bits(found.nonfinite, wanted.nonfinite)
    grads = [torch.ones_like(g) for g in nat]
    masked = on_gpu(grads)
    kernels.rgp_mask_(masked, on_gpu(nat), on_gpu(adv), **settings)
    rgp.rgp_mask_ref(grads, nat, adv, **settings)
    assert all(same_bits(a, b) for a, b in zip(masked, grads, strict=True))


@pytest.mark.parametrize("score", ["abs", "signed"])
def test_thresholds_have_the_bits_of_the_reference(score):
    nat, adv = gradients(), gradients(seed=1)
    for percentile in (0.0, 30.0, 77.7, 100.0):
        settings = {"percentile": percentile, "alpha": 0.3, "score": score}
        wanted = rgp.rgp_threshold_ref(nat, adv, **settings)
        found = kernels.rgp_threshold(on_gpu(nat), on_gpu(adv), **settings)
        assert same_bits(found, wanted), percentile


def test_a_tensor_above_two_to_the_24_is_selected_as_sorting_does():
    n = 2**24 + 12_346
    nat, adv = (torch.randn(n, device=GPU) for _ in range(2))
    found = kernels.rgp_select([nat], [adv], **SETTINGS)
    scores = 0.1 * nat.abs() + 0.9 * adv.abs()
    rank = -(-3 * (n - 1) // 10)
    assert torch.equal(found.scores[0], scores)
    assert torch.equal(found.thresholds[0], scores.sort().values[rank])


def test_views_and_other_layouts_give_the_same_mask():
    generator = torch.Generator().manual_seed(2)
    nat, adv, grad = (torch.randn(33, 16, 3, 3, generator=generator) for _ in range(3))
    settings = {"percentile": 40.0, "alpha": 0.2}
    wanted = grad.clone()
    rgp.rgp_mask_ref([wanted], [nat], [adv], **settings)
    storage = torch.zeros(grad.numel() + 1, device=GPU)
    shifted = storage[1:].view_as(grad).copy_(grad)
    last = grad.to(GPU).contiguous(memory_format=torch.channels_last)
    for masked in (shifted, last):
        kernels.rgp_mask_([masked], [nat.to(GPU)], [adv.to(GPU)], **settings)
        assert same_bits(masked, wanted)
    assert storage[0] == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_a_mask_by_scores_of_any_dtype_and_thresholds_of_any_stride(dtype):
    tensors, scores = gradients(), gradients(dtype, seed=1)
    thresholds = torch.randn(len(scores), 2).mul(0.1)[:, 0]
    masked = on_gpu(tensors)
    # A copy on the GPU would have lost the stride.
    strided = torch.stack([thresholds.to(GPU)] * 2, dim=1)[:, 0]
    kernels.mask_below_(masked, on_gpu(scores), strided)
    rgp.mask_below_ref(tensors, scores, thresholds)
    assert all(same_bits(a, b) for a, b in zip(masked, tensors, strict=True))


def test_gradients_with_gaps_and_expanded_ones_are_read_right():
    generator = torch.Generator().manual_seed(7)
    wide = torch.randn(64, 48, generator=generator)
    nat, adv = wide[:, :20], torch.randn(64, 1, generator=generator).expand(64, 20)
    wanted = rgp.rgp_select_ref([nat], [adv], **SETTINGS)
    mine = wide.to(GPU)[:, :20], adv[:, :1].to(GPU).expand(64, 20)
    found = kernels.rgp_select([mine[0]], [mine[1]], **SETTINGS)
    assert same_bits(found.thresholds, wanted.thresholds) and same_bits(found.kept, wanted.kept)


# The update.


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("conserve", ["gradient", "weight"])
@pytest.mark.parametrize("nesterov", [False, True])
def test_update_is_the_references(grad_dtype, conserve, nesterov):
    nat, adv, grads = (gradients(grad_dtype, seed) for seed in range(3))
    selection = rgp.rgp_select_ref(nat, adv, **SETTINGS)
    params, momentum, averages = (gradients(seed=seed) for seed in range(3, 6))
    copies = [p.bfloat16() for p in params]
    scores: list[Tensor | None] = list(selection.scores)
    scores[4] = None
    changed = (params, momentum, averages, copies)
    mine = on_gpu(list(changed))
    options = {**SGD, "nesterov": nesterov, "conserve": conserve, "decay": 0.9}

    def run(function, lists, *, place):
        params, momentum, averages, copies = lists
        function(
            params,
            place(grads),
            momentum,
            **options,
            scores=place(scores),
            thresholds=place(selection.thresholds),
            averages=averages,
            low_precision_copies=copies,
        )

    run(kernels.masked_sgd_, mine, place=on_gpu)
    run(update.masked_sgd_ref, changed, place=lambda value: value)
    for found, wanted in zip(flat(mine), flat(list(changed)), strict=True):
        # Where terms cancel, their rounding is relative to the terms: at most 5 here.
        rounding = 1e-2 if found.dtype == torch.bfloat16 else 2e-6
        torch.testing.assert_close(found.cpu(), wanted, rtol=rounding, atol=rounding)
    masked = selection.scores[8] < selection.thresholds[8]
    if conserve == "weight":
        assert same_bits(mine[0][8].cpu()[masked], gradients(seed=3)[8][masked])


@pytest.mark.parametrize("landed", [False, True])
def test_flags_on_the_device_decide(landed):
    params, grads, momentum, averages = (on_gpu(gradients(seed=s)) for s in range(4))
    before = [t.clone() for t in (*params, *momentum, *averages)]
    flag = torch.tensor(landed, device=GPU)
    kernels.masked_sgd_(params, grads, momentum, **SGD, averages=averages, skip=flag)
    after = [*params, *momentum, *averages]
    assert all(torch.equal(a, b) == landed for a, b in zip(after, before, strict=True))
    kept = [a.clone() for a in averages]
    kernels.masked_sgd_(params, grads, momentum, **SGD, averages=averages, moved=flag)
    assert all(torch.equal(a, b) != landed for a, b in zip(averages, kept, strict=True))


def test_averages_of_a_whole_model_are_the_references():
    model = build_model("resnet-small", num_classes=10)
    values = [p.detach() for p in model.state_dict().values()]
    averages = [torch.zeros_like(v) for v in values]
    mine = on_gpu(averages)
    moved = kernels.ema_update_(mine, on_gpu(values), decay=0.9)
    ema.ema_update_ref(averages, values, decay=0.9)
    assert bool(moved)
    for found, wanted in zip(mine, averages, strict=True):
        torch.testing.assert_close(found.cpu(), wanted, rtol=1e-6, atol=1e-7)


def test_the_coin_is_that_of_the_cpu():
    steps = torch.arange(64)
    found = [bool(kernels.flip_coin(0.3, seed=7, step=s.to(GPU))) for s in steps]
    wanted = [bool(ema.flip_coin_ref(0.3, seed=7, step=s)) for s in steps]
    assert found == wanted and 5 < sum(found) < 40


# Other operations.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("per_image", [False, True])
def test_attack_step_is_the_references(dtype, norm, per_image):
    images = pictures(dtype)
    eps: Any = torch.linspace(0.01, 0.05, 7) if per_image else 8 / 255
    mine = on_gpu(images)
    kernels.pgd_step_(*mine, step_size=2 / 255, eps=on_gpu(eps), norm=norm)
    pgd.pgd_step_ref(*images, step_size=2 / 255, eps=eps, norm=norm)
    if norm == "linf":
        assert same_bits(mine[0], images[0])
    else:
        rounding = 1e-2 if dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(mine[0].cpu(), images[0], rtol=0, atol=rounding)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("start", ["uniform", "normal", "zero"])
def test_start_of_an_attack_is_the_references(norm, start):
    x = pictures()[1]
    options = {"eps": 8 / 255, "norm": norm, "start": start, "seed": 11, "step": 5}
    found = pgd.pgd_init(x.to(GPU), **options)
    wanted = pgd.pgd_init_ref(x, **options)
    if start == "zero" or (norm, start) == ("linf", "uniform"):
        assert same_bits(found, wanted)
    else:
        # The docstring's 1e-5 * eps, and a float32 in [0, 1] rounds to 6e-8.
        torch.testing.assert_close(found.cpu(), wanted, rtol=0, atol=1e-5 * 8 / 255 + 6e-8)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [None, 4])
def test_augmentation_has_the_bits_of_the_reference(out_dtype, channels):
    images, placed = resident_batch()
    options = {"padding": 4, "out_dtype": out_dtype, "channels": channels}
    found = augment.augment_crop_flip(*on_gpu(images), **on_gpu(placed), **options)
    wanted = augment.augment_crop_flip_ref(*images, **placed, **options)
    assert same_bits(found, wanted) and found.stride() == wanted.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("classes", [10, 100])
def test_losses_and_gradients_are_the_references(dtype, classes):
    generator = torch.Generator().manual_seed(8)
    logits = [(4 * torch.randn(128, classes, generator=generator)).to(dtype) for _ in range(4)]
    labels = torch.randint(classes, (128,), generator=generator)
    names = ("natural_ce", "adversarial_ce", "kl", "margin", "total")

    def run(function, place):
        z, z_adv, teacher, teacher_adv = place(logits)
        return function(
            z,
            z_adv,
            place(labels),
            teacher_logits=teacher,
            teacher_adv_logits=teacher_adv,
            gradients=names,
        )

    found = run(softmax.softmax_losses, on_gpu)
    wanted = run(softmax.softmax_losses_ref, lambda value: value)
    assert len(flat(found)) == len(flat(wanted)) == 6 + 7
    for i, (mine, theirs) in enumerate(zip(flat(found), flat(wanted), strict=True)):
        # A loss is a difference of numbers near 20, whose last bit is 2e-6; gradients are of means.
        rounding = 1e-2 if mine.dtype == torch.bfloat16 else 2e-5
        torch.testing.assert_close(
            mine.cpu(), theirs, rtol=rounding, atol=1e-5 if i < 6 else rounding / 20
        )
