"""The attack step against NumPy: step, projection, clamp, per-image radii, zero gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cure_fast.kernels import pgd_step_


def images(count=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, 3, 5, 5, generator=generator)
    x_adv = (x + 0.05 * torch.randn(x.shape, generator=generator)).clamp(0, 1)
    return x_adv, x, torch.randn(x.shape, generator=generator)


@given(seed=st.integers(0, 1000), eps=st.floats(0, 0.5), step=st.floats(0, 0.5), flip=st.booleans())
def test_linf_is_numpys(seed, eps, step, flip):
    x_adv, x, grad = images(seed=seed)
    start = x_adv.clone()
    if flip:
        grad[:, 0] = 0
    moved = pgd_step_(x_adv, x, grad, step_size=step, eps=eps)
    low = np.maximum(x.numpy() - np.float32(eps), 0)
    high = np.minimum(x.numpy() + np.float32(eps), 1)
    expected = np.clip(start.numpy() + np.float32(step) * np.sign(grad.numpy()), low, high)
    assert moved is x_adv
    np.testing.assert_allclose(x_adv.numpy(), expected, atol=1e-7)


@given(seed=st.integers(0, 1000), eps=st.floats(0.01, 3), step=st.floats(0, 3))
def test_l2_is_numpys(seed, eps, step):
    x_adv, x, grad = images(seed=seed)
    start = x_adv.numpy().astype(np.float64)
    pgd_step_(x_adv, x, grad, step_size=step, eps=eps, norm="l2")
    for i in range(len(x)):
        direction = grad[i].numpy() / np.linalg.norm(grad[i].numpy())
        delta = start[i] + step * direction - x[i].numpy()
        delta *= min(1, eps / np.linalg.norm(delta))
        np.testing.assert_allclose(x_adv[i].numpy(), np.clip(x[i].numpy() + delta, 0, 1), atol=2e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_one_radius_and_step_per_image(norm):
    x_adv, x, grad = images()
    eps, step = torch.tensor([0.0, 0.1, 0.2, 0.3]), torch.tensor([0.1, 0.0, 0.2, 0.05])
    each = [
        pgd_step_(
            x_adv[i : i + 1].clone(),
            x[i : i + 1],
            grad[i : i + 1],
            step_size=float(step[i]),
            eps=float(eps[i]),
            norm=norm,
        )
        for i in range(4)
    ]
    together = pgd_step_(x_adv.clone(), x, grad, step_size=step, eps=eps, norm=norm)
    torch.testing.assert_close(together, torch.cat(each))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_zero_gradient_moves_nothing(norm):
    _, x, grad = images()
    x_adv = x.clone()
    pgd_step_(x_adv, x, torch.zeros_like(grad), step_size=0.1, eps=0.2, norm=norm)
    assert torch.equal(x_adv, x)


def plain_linf(x_adv, x, grad, *, step_size, eps):
    """The step without any guard."""
    moved = x_adv + step_size * grad.sign()
    return torch.minimum(torch.maximum(moved, x - eps), x + eps).clamp_(0, 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_finite_gradients_give_the_bits_of_the_plain_step(dtype):
    tiny, huge = torch.finfo(dtype).smallest_normal / 2, torch.finfo(dtype).max
    special = [0.0, -0.0, tiny, -tiny, huge, -huge, 1.0, -1.0]
    grad = torch.tensor(special, dtype=dtype).repeat(4, 50).view(4, 1, 20, 20)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(grad.shape, generator=generator).to(dtype)
    for start in (x, torch.zeros_like(x), -torch.zeros_like(x), torch.ones_like(x)):
        for eps in (0.0, 0.1):
            expected = plain_linf(start, x, grad, step_size=0.03, eps=eps)
            moved = pgd_step_(start.clone(), x, grad, step_size=0.03, eps=eps)
            assert torch.equal(moved, expected)
            assert torch.equal(moved.signbit(), expected.signbit())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("step", [0.0, 0.1])
def test_gradients_that_are_not_finite_show(value, dtype, step):
    """The sign of NaN is 0: the pixel would stay, and the attack would silently be weaker."""
    x_adv, x, grad = (t.to(dtype) for t in images())
    good = pgd_step_(x_adv.clone(), x, grad, step_size=step, eps=0.2)
    grad[2, 1, 3, 4] = value
    moved = pgd_step_(x_adv.clone(), x, grad, step_size=step, eps=0.2)
    hit = torch.zeros(x.shape, dtype=torch.bool)
    hit[2, 1, 3, 4] = True
    assert torch.equal(moved.isnan(), hit)
    assert torch.equal(moved[~hit], good[~hit])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_gradients_that_are_not_finite_show_in_the_whole_image_with_l2(value):
    x_adv, x, grad = images()
    good = pgd_step_(x_adv.clone(), x, grad, step_size=0.1, eps=0.2, norm="l2")
    grad[2, 1, 3, 4] = value
    moved = pgd_step_(x_adv.clone(), x, grad, step_size=0.1, eps=0.2, norm="l2")
    assert moved[2].isnan().all()
    assert torch.equal(moved[[0, 1, 3]], good[[0, 1, 3]])


def test_bad_arguments_are_refused():
    x_adv, x, grad = images()
    with pytest.raises(ValueError, match="shapes"):
        pgd_step_(x_adv, x, grad[:1], step_size=0.1, eps=0.1)
    with pytest.raises(ValueError, match="norm"):
        pgd_step_(x_adv, x, grad, step_size=0.1, eps=0.1, norm="l1")
