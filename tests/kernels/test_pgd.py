"""The attack step against NumPy, and its kernels against the reference.

Step, projection, clamp, radii per image, zero and non-finite gradients, layouts, bad input.
"""

from __future__ import annotations

import inspect
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cure_fast.kernels import pgd_step_
from cure_fast.kernels.device import pgd as device
from cure_fast.kernels.pgd import pgd_step_ref

NORMS = pytest.mark.parametrize("norm", ["linf", "l2"])
# The fixtures only set an environment variable, which every example needs alike.
PER_TEST = settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
# In the interpreter, NumPy remarks on 0 * infinity.
QUIET = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
# Norms are sums of squares in another order: a few 2**-24 of pixels below 1, here 4 units.
L2_ERROR = 2.5e-7


@pytest.fixture(params=["triton", "reference"])
def kernels(request, monkeypatch):
    """Run the test with kernels in the interpreter, and with the reference."""
    monkeypatch.setenv("CURE_FAST_KERNELS", request.param)
    return request.param


def images(count=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, 3, 5, 5, generator=generator)
    x_adv = (x + 0.05 * torch.randn(x.shape, generator=generator)).clamp(0, 1)
    return x_adv, x, torch.randn(x.shape, generator=generator)


@PER_TEST
@given(seed=st.integers(0, 1000), eps=st.floats(0, 0.5), step=st.floats(0, 0.5), flip=st.booleans())
def test_linf_is_numpys(kernels, seed, eps, step, flip):
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


@PER_TEST
@given(seed=st.integers(0, 1000), eps=st.floats(0.01, 3), step=st.floats(0, 3))
def test_l2_is_numpys(kernels, seed, eps, step):
    x_adv, x, grad = images(seed=seed)
    start = x_adv.numpy().astype(np.float64)
    pgd_step_(x_adv, x, grad, step_size=step, eps=eps, norm="l2")
    for i in range(len(x)):
        direction = grad[i].numpy() / np.linalg.norm(grad[i].numpy())
        delta = start[i] + step * direction - x[i].numpy()
        delta *= min(1, eps / np.linalg.norm(delta))
        np.testing.assert_allclose(x_adv[i].numpy(), np.clip(x[i].numpy() + delta, 0, 1), atol=2e-6)


@NORMS
def test_one_radius_and_step_per_image(kernels, norm):
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


@NORMS
def test_a_zero_gradient_moves_nothing(kernels, norm):
    _, x, grad = images()
    x_adv = x.clone()
    pgd_step_(x_adv, x, torch.zeros_like(grad), step_size=0.1, eps=0.2, norm=norm)
    assert torch.equal(x_adv, x)


def plain_linf(x_adv, x, grad, *, step_size, eps):
    """The step without any guard."""
    moved = x_adv + step_size * grad.sign()
    return torch.minimum(torch.maximum(moved, x - eps), x + eps).clamp_(0, 1)


def rounded(values, dtype, kernels):
    """Round as the kernels do: Triton's interpreter cuts bfloat16 off, a GPU rounds to nearest."""
    if dtype == torch.bfloat16 and kernels == "triton" and not torch.cuda.is_available():
        return (values.view(torch.int32) & -65536).view(torch.float32).bfloat16()
    return values.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_finite_gradients_give_the_bits_of_the_plain_step(kernels, dtype):
    tiny, huge = torch.finfo(dtype).smallest_normal / 2, torch.finfo(dtype).max
    if dtype == torch.bfloat16 and kernels == "triton":
        tiny *= 2  # Triton's interpreter reads subnormal bfloat16 as other numbers.
    special = [0.0, -0.0, tiny, -tiny, huge, -huge, 1.0, -1.0]
    grad = torch.tensor(special, dtype=dtype).repeat(4, 50).view(4, 1, 20, 20)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(grad.shape, generator=generator).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    for start in (x, torch.zeros_like(x), -torch.zeros_like(x), torch.ones_like(x)):
        for eps in (0.0, 0.1):
            plain = plain_linf(start.to(wide), x.to(wide), grad.to(wide), step_size=0.03, eps=eps)
            expected = rounded(plain, dtype, kernels)
            moved = pgd_step_(start.clone(), x, grad, step_size=0.03, eps=eps)
            assert torch.equal(moved, expected)
            assert kernels == "triton" or torch.equal(moved.signbit(), expected.signbit())


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("magnitude", [1e-300, 1e-40, 1e39, 1e300])
def test_float64_gradients_keep_their_sign(kernels, sign, magnitude):
    """As float32 they would be 0 or infinite."""
    x = torch.full((1, 4), 0.5)
    grad = torch.full((1, 4), sign * magnitude, dtype=torch.float64)
    moved = pgd_step_(x.clone(), x, grad, step_size=0.1, eps=0.2)
    assert torch.equal(moved, x + sign * torch.tensor(0.1))


@QUIET
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("step", [0.0, 0.1])
def test_gradients_that_are_not_finite_show(kernels, value, dtype, step):
    """The sign of NaN is 0: the pixel would stay, and the attack would silently be weaker."""
    x_adv, x, grad = (t.to(dtype) for t in images())
    good = pgd_step_(x_adv.clone(), x, grad, step_size=step, eps=0.2)
    grad[2, 1, 3, 4] = value
    moved = pgd_step_(x_adv.clone(), x, grad, step_size=step, eps=0.2)
    hit = torch.zeros(x.shape, dtype=torch.bool)
    hit[2, 1, 3, 4] = True
    assert torch.equal(moved.isnan(), hit)
    assert torch.equal(moved[~hit], good[~hit])


@QUIET
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_gradients_that_are_not_finite_show_in_the_whole_image_with_l2(kernels, value):
    x_adv, x, grad = images()
    good = pgd_step_(x_adv.clone(), x, grad, step_size=0.1, eps=0.2, norm="l2")
    grad[2, 1, 3, 4] = value
    moved = pgd_step_(x_adv.clone(), x, grad, step_size=0.1, eps=0.2, norm="l2")
    assert moved[2].isnan().all()
    assert torch.equal(moved[[0, 1, 3]], good[[0, 1, 3]])


def one_number(kind, largest, seed):
    """Return a number per image in one of the three forms it may have, for 3 images."""
    values = largest * torch.rand(3, generator=torch.Generator().manual_seed(seed))
    return {"number": float(values[0]), "shared": values[1], "each": values}[kind]


KINDS = st.sampled_from(["number", "shared", "each"])
HALF = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


@NORMS
@PER_TEST
@given(
    pixels=st.one_of(st.integers(1, 40), st.sampled_from([1023, 1024, 1025, 2048])),
    kinds=st.tuples(KINDS, KINDS),
    dtypes=st.tuples(HALF, HALF, st.one_of(HALF, st.just(torch.float64))),
    seed=st.integers(0, 1000),
)
def test_kernels_are_the_reference(triton_kernels, norm, pixels, kinds, dtypes, seed):
    """Any number of pixels, dtypes and forms of the radius: linf in its bits."""
    generator = torch.Generator().manual_seed(seed)
    x_adv, x, grad = (torch.rand(3, pixels, generator=generator) for _ in range(3))
    x, grad = x.to(dtypes[1]), (grad - 0.5).to(dtypes[2])
    numbers = {
        "step_size": one_number(kinds[0], 0.1, seed),
        "eps": one_number(kinds[1], 0.2, seed + 1),
    }
    start = x_adv.to(dtypes[0])
    # The reference in float32, so that the last rounding can be the interpreter's.
    exact = pgd_step_ref(start.float().clone(), x, grad, norm=norm, **numbers)
    moved = pgd_step_(start.clone(), x, grad, norm=norm, **numbers)
    assert moved.dtype == dtypes[0]
    if norm == "linf":
        assert torch.equal(moved, rounded(exact, dtypes[0], "triton"))
    else:
        step = {torch.float32: 0, torch.float16: 2**-11, torch.bfloat16: 2**-7}[dtypes[0]]
        torch.testing.assert_close(moved.float(), exact, rtol=step, atol=L2_ERROR)


def laid_out(kind, tensor):
    """Return the values of ``tensor`` [N, C, H, W] as they may lie in memory."""
    if kind == "channels_last":
        return tensor.clone(memory_format=torch.channels_last)
    if kind == "images last":
        return tensor.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    if kind == "with gaps":
        return torch.stack((tensor, tensor + 1), dim=-1)[..., 0]
    if kind == "unaligned":
        return torch.cat((torch.zeros(1), tensor.flatten()))[1:].view(tensor.shape)
    return tensor.clone()


LAYOUTS = ["contiguous", "channels_last", "images last", "with gaps", "unaligned"]


@NORMS
@pytest.mark.parametrize(
    ("mine", "theirs"), [*((kind, kind) for kind in LAYOUTS), *pairwise([*LAYOUTS, LAYOUTS[0]])]
)
def test_images_may_lie_in_memory_in_any_way(triton_kernels, norm, mine, theirs):
    x_adv, x, grad = images()
    numbers = {"step_size": torch.tensor([0.1, 0.2, 0.3, 0.4]), "eps": torch.rand(4), "norm": norm}
    expected = pgd_step_ref(x_adv.clone(), x, grad, **numbers)
    given = laid_out(mine, x_adv)
    others = laid_out(theirs, x), laid_out(theirs, grad)
    before = [tensor.clone() for tensor in others]
    stride, address = given.stride(), given.data_ptr()
    moved = pgd_step_(given, *others, **numbers)
    assert moved is given and (given.stride(), given.data_ptr()) == (stride, address)
    torch.testing.assert_close(moved, expected, rtol=0, atol=0 if norm == "linf" else L2_ERROR)
    assert all(map(torch.equal, others, before))


@NORMS
def test_what_lies_around_the_images_is_not_touched(triton_kernels, norm):
    memory = torch.full((3 * 35 + 2,), 7.0)
    x_adv = memory[1:-1].view(3, 35)
    x_adv.copy_(torch.rand(3, 35))
    pgd_step_(x_adv, torch.rand(3, 35), torch.randn(3, 35), step_size=0.1, eps=0.1, norm=norm)
    assert memory[0] == memory[-1] == 7
    assert x_adv.max() <= 1


@NORMS
@pytest.mark.parametrize("name", ["eps", "step_size"])
def test_a_number_on_the_device_that_is_nan_shows(kernels, norm, name):
    x_adv, x, grad = images()
    numbers = {"eps": torch.full((4,), 0.1), "step_size": torch.full((4,), 0.1)}
    numbers[name][2] = float("nan")
    moved = pgd_step_(x_adv, x, grad, norm=norm, **numbers)
    assert moved[2].isnan().all()
    assert moved[[0, 1, 3]].isfinite().all()


@NORMS
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0), (3,)])
def test_no_images_no_pixels_and_one_pixel(kernels, norm, shape):
    x = torch.full(shape, 0.5)
    moved = pgd_step_(x.clone(), x, torch.ones(shape), step_size=0.1, eps=0.2, norm=norm)
    torch.testing.assert_close(moved, x + 0.1, rtol=0, atol=L2_ERROR)


@NORMS
def test_images_that_require_gradients_are_refused_where_gradients_are_recorded(kernels, norm):
    """As torch refuses it; the kernel would change a value that the backward pass needs."""
    x_adv, x, grad = images()
    options = {"step_size": 0.1, "eps": 0.2, "norm": norm}
    leaf = x_adv.clone().requires_grad_()
    for recorded in (leaf, leaf * 1):
        with pytest.raises(ValueError, match=r"x_adv: .*no gradient.*x_adv.detach\(\)"):
            pgd_step_(recorded, x, grad, **options)
    assert torch.equal(leaf, x_adv)
    with torch.no_grad():
        moved = pgd_step_(leaf, x, grad, **options)
    assert torch.equal(moved, pgd_step_(x_adv, x, grad, **options))


@NORMS
def test_nothing_is_recorded_for_autograd(kernels, norm):
    x_adv, x, grad = images()
    x.requires_grad_(), grad.requires_grad_()
    assert not pgd_step_(x_adv, x, grad, step_size=0.1, eps=0.2, norm=norm).requires_grad


@NORMS
def test_a_backward_pass_through_moved_images_is_an_error(kernels, norm):
    x_adv, x, grad = images()
    weight = torch.ones(1, requires_grad=True)
    loss = (weight * x_adv).sum()
    pgd_step_(x_adv, x, grad, step_size=0.1, eps=0.2, norm=norm)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@NORMS
def test_images_that_are_the_natural_ones_are_refused(kernels, norm):
    """They would become adversarial themselves, and the ball would move with them."""
    _, x, grad = images()
    kept = x.clone()
    for x_adv in (x, x.detach(), x.view(x.shape)):
        with pytest.raises(ValueError, match=r"x: expected other memory than .*x_adv = x.clone"):
            pgd_step_(x_adv, x, grad, step_size=0.1, eps=0.2, norm=norm)
    assert torch.equal(x, kept)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"grad": torch.rand(1, 3)}, ValueError, r"grad: expected shape \[4, 3\].*got \[1, 3\]"),
        ({"x": torch.rand(4, 2)}, ValueError, "x: expected shape"),
        ({"x": torch.ones(4, 3, dtype=torch.uint8)}, TypeError, "x: .*floating.*uint8"),
        ({"x_adv": torch.ones(4, 3, dtype=torch.int64)}, TypeError, "x_adv: .*floating"),
        ({"grad": torch.ones(4, 3, dtype=torch.bool)}, TypeError, "grad: .*floating"),
        ({"x_adv": torch.tensor(1.0)}, ValueError, r"x_adv: expected images \[N"),
        ({"x_adv": torch.empty(2**16, 2**15, device="meta")}, ValueError, "x_adv: .*2147483647"),
        ({"grad": torch.ones(4, 3, device="meta")}, ValueError, "grad: expected cpu.*got meta"),
        ({"eps": -0.1}, ValueError, r"eps: expected a number in \[0, inf\), got -0.1"),
        ({"eps": float("nan")}, ValueError, "eps: .*got nan"),
        ({"step_size": float("inf")}, ValueError, "step_size: .*got inf"),
        ({"step_size": "0.1"}, TypeError, "step_size: expected a number"),
        ({"step_size": torch.ones(3)}, ValueError, r"step_size: .*one per image \[4\].*\[3\]"),
        ({"eps": torch.ones(4, 1)}, ValueError, r"eps: .*\[4, 1\]"),
        ({"eps": torch.ones(4, dtype=torch.int32)}, TypeError, "eps: .*floating"),
        ({"eps": torch.ones((), device="meta")}, ValueError, "eps: expected cpu.*got meta"),
        ({"norm": "l1"}, ValueError, "norm: expected one of linf, l2, got 'l1'"),
    ],
)
def test_bad_arguments_are_refused(kernels, changes, error, message):
    good = {"x_adv": torch.rand(4, 3), "x": torch.rand(4, 3), "grad": torch.rand(4, 3)}
    arguments = good | {"step_size": 0.1, "eps": 0.1} | changes
    with pytest.raises(error, match=message):
        pgd_step_(**arguments)


def test_launcher_reference_and_operation_have_one_signature():
    functions = (pgd_step_, pgd_step_ref, device.pgd_step)
    assert len({inspect.signature(function) for function in functions}) == 1
