"""The attack's start: in the ball, distributed as it says, the same on every path."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cure_fast.kernels.device import pgd as device
from cure_fast.kernels.pgd import NORMAL_START, pgd_init, pgd_init_ref
from cure_fast.kernels.philox import RADIUS, START, philox_normal, philox_uniform

ALL = pytest.mark.parametrize(
    ("norm", "start"), [(n, s) for n in ("linf", "l2") for s in ("uniform", "normal", "zero")]
)
NORMS = pytest.mark.parametrize("norm", ["linf", "l2"])
# The fixtures only set an environment variable, which every example needs alike.
PER_TEST = settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
# Kernels draw normal numbers within 3e-6 of the reference, and the perturbations here are at most
# 0.3 of that; adding x rounds to 2**-24.
ERROR = 1e-6


@pytest.fixture(params=["triton", "reference"])
def kernels(request, monkeypatch):
    """Run the test with kernels in the interpreter, and with the reference."""
    monkeypatch.setenv("CURE_FAST_KERNELS", request.param)
    return request.param


def grey(*shape):
    """Images that no perturbation below 0.5 takes out of [0, 1]."""
    return torch.full(shape, 0.5)


def in_numpy(x, *, eps, norm, start, seed, step):
    """The start in float64, from the random numbers."""
    index = torch.arange(x.numel()).view(x.shape)
    n = philox_normal(seed, index, step, stream=START).double().numpy()
    u = philox_uniform(seed, index, step, stream=START).double().numpy()
    u_image = philox_uniform(seed, torch.arange(len(x)), step, stream=RADIUS).double().numpy()
    out = []
    for i, image in enumerate(x.double().numpy()):
        if start == "zero":
            delta = 0
        elif norm == "linf":
            delta = eps * (2 * u[i] - 1) if start == "uniform" else np.clip(1e-3 * n[i], -eps, eps)
        else:
            length = np.sqrt((n[i] ** 2).sum())
            if start == "uniform":
                wanted = eps * (1 - u_image[i]) ** (1 / image.size)
            else:
                wanted = min(1e-3 * length, eps)
            delta = n[i] / length * wanted
        out.append(np.clip(image + delta, 0, 1))
    return np.stack(out)


@ALL
@PER_TEST
@given(
    shape=st.one_of(
        st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5)),
        st.tuples(st.integers(1, 2), st.sampled_from([1, 7, 1024, 1030])),
    ),
    eps=st.sampled_from([0.0, 1e-4, 8 / 255, 0.3]),
    seed=st.integers(0, 2**64 - 1),
    step=st.integers(0, 2**63 - 1),
)
def test_it_is_numpys(kernels, norm, start, shape, eps, seed, step):
    x = torch.rand(shape, generator=torch.Generator().manual_seed(seed % 1000))
    options = {"eps": eps, "norm": norm, "start": start, "seed": seed, "step": step}
    found = pgd_init(x, **options)
    np.testing.assert_allclose(found.numpy(), in_numpy(x, **options), rtol=0, atol=ERROR)


@PER_TEST
@given(
    shape=st.tuples(*[st.integers(1, 5)] * 4),
    seed=st.integers(0, 2**64 - 1),
    step=st.integers(0, 2**63 - 1),
    on_device=st.booleans(),
    each=st.booleans(),
)
def test_uniform_linf_has_the_references_bits(triton_kernels, shape, seed, step, on_device, each):
    x = torch.rand(shape, generator=torch.Generator().manual_seed(seed % 1000))
    options = {"eps": torch.rand(shape[0]) if each else 0.1, "seed": seed}
    options["step"] = torch.tensor(step) if on_device else step
    assert torch.equal(pgd_init(x, **options), pgd_init_ref(x, **options))


def laid_out(kind, x):
    """Return the values of ``x`` [N, C, H, W] as they may lie in memory."""
    if kind == "channels_last":
        return x.clone(memory_format=torch.channels_last)
    if kind == "images last":
        return x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    if kind == "with gaps":
        return torch.stack((x, x + 1), dim=-1)[..., 0]
    if kind == "unaligned":
        return torch.cat((torch.zeros(1), x.flatten()))[1:].view(x.shape)
    return x.clone()


@ALL
@pytest.mark.parametrize("kind", ["channels_last", "images last", "with gaps", "unaligned"])
def test_the_numbers_do_not_depend_on_the_memory_format(kernels, norm, start, kind):
    x = torch.rand(2, 3, 18, 19)
    options = {"eps": torch.tensor([0.1, 0.3]), "norm": norm, "start": start, "seed": 3}
    other = laid_out(kind, x)
    found = pgd_init(other, **options)
    assert found.stride() == torch.empty_like(other).stride()
    # Sums of squares in another order.
    atol = ERROR if norm == "l2" else 0
    torch.testing.assert_close(found, pgd_init(x, **options), rtol=0, atol=atol)
    assert torch.equal(other, x)


@ALL
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_round_the_same_perturbation_once(kernels, norm, start, dtype):
    x = torch.rand(2, 3, 4, 4).to(dtype)
    options = {"eps": 0.1, "norm": norm, "start": start, "seed": 3}
    found, exact = pgd_init(x, **options), pgd_init(x.float(), **options)
    assert found.dtype == dtype
    # Half a unit in the last place; one for bfloat16, which the interpreter cuts off.
    rtol = {torch.float16: 2**-11, torch.bfloat16: 2**-7, torch.float64: 0}[dtype]
    torch.testing.assert_close(found.double(), exact.double(), rtol=rtol, atol=ERROR)


@ALL
@pytest.mark.parametrize("eps", [0.0, 8 / 255, 0.5])
def test_it_stays_in_the_ball_and_in_the_range_of_pixels(kernels, norm, start, eps):
    x = torch.rand(3, 3, 8, 8).round()
    found = pgd_init(x, eps=eps, norm=norm, start=start, seed=1)
    order = float("inf") if norm == "linf" else 2
    lengths = (found - x).flatten(1).norm(order, dim=1)
    assert (lengths <= eps * (1 + 1e-6) + 1e-7).all()
    assert 0 <= found.min() and found.max() <= 1
    moves = start != "zero" and eps > 0
    assert torch.equal(found, x) != moves


def test_a_radius_per_image_is_that_images(kernels):
    x = grey(3, 3, 8, 8)
    eps = torch.tensor([0.0, 0.1, 0.3])
    for norm, order in (("linf", float("inf")), ("l2", 2)):
        found = pgd_init(x, eps=eps, norm=norm, seed=1)
        lengths = (found - x).flatten(1).norm(order, dim=1)
        assert (lengths <= eps * (1 + 1e-6)).all()
        # 192 pixels: the largest is nearly eps, and so is eps * u**(1/192).
        assert (lengths >= 0.9 * eps).all()
        shared = pgd_init(x, eps=eps[1], norm=norm, seed=1)
        assert torch.equal(shared[1], found[1])


def test_distributions():
    """Kolmogorov and Smirnov's distance is below 1.95 / sqrt(count) in 999 of 1000 cases."""

    def distance(values, cdf):
        return (cdf(values.flatten().double().sort().values) - ranks(values)).abs().max()

    def ranks(values):
        return torch.arange(values.numel()) / values.numel()

    x = grey(4, 2**12)
    bound = 1.95 / 2**7
    uniform = pgd_init(x, eps=0.25, seed=2) - x
    assert distance(uniform, lambda v: (v + 0.25) / 0.5) < bound
    normal = pgd_init(x, eps=0.25, start="normal", seed=2) - x
    # Differences of pixels near 0.5 are multiples of 2**-24, small against 0.001.
    assert distance(normal, lambda v: torch.special.ndtr(v / NORMAL_START)) < bound
    x = grey(2**12, 3)
    ball = pgd_init(x, eps=0.25, norm="l2", seed=2) - x
    assert distance(ball.norm(dim=1), lambda v: (v / 0.25) ** 3) < 1.95 / 2**6
    # Archimedes: a coordinate of a direction in three dimensions is uniform.
    assert distance(ball[:, 0] / ball.norm(dim=1), lambda v: (v + 1) / 2) < 1.95 / 2**6


@NORMS
def test_other_seeds_and_steps_draw_other_numbers(kernels, norm):
    x = grey(1, 64)
    one = pgd_init(x, eps=0.1, norm=norm, seed=1)
    assert torch.equal(one, pgd_init(x, eps=0.1, norm=norm, seed=1, step=0))
    for change in ({"seed": 2}, {"seed": 1 + 2**32}, {"step": 1}, {"step": 2**32}):
        other = pgd_init(x, eps=0.1, norm=norm, **({"seed": 1} | change))
        assert (one != other).float().mean() > 0.9


@ALL
def test_the_result_is_new_and_without_gradient(kernels, norm, start):
    x = grey(2, 3, 4, 4).requires_grad_()
    found = pgd_init(x, eps=0.1, norm=norm, start=start, seed=1)
    assert not found.requires_grad and found.data_ptr() != x.data_ptr()
    assert (x == 0.5).all()


@ALL
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0), (3,)])
def test_no_images_no_pixels_and_one_pixel(kernels, norm, start, shape):
    found = pgd_init(grey(*shape), eps=0.1, norm=norm, start=start, seed=1)
    assert found.shape == shape
    assert ((found - 0.5).abs() <= 0.1 + 1e-7).all()


def test_nan_shows(kernels):
    x = grey(3, 5)
    x[1, 2] = float("nan")
    for norm in ("linf", "l2"):
        for start in ("uniform", "normal"):
            found = pgd_init(x, eps=0.1, norm=norm, start=start, seed=1)
            assert torch.equal(found.isnan(), x.isnan())
            eps = torch.tensor([float("nan"), 0.1, 0.1])
            found = pgd_init(grey(3, 5), eps=eps, norm=norm, start=start, seed=1)
            assert found[0].isnan().all() and found[1:].isfinite().all()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.ones(2, 3, dtype=torch.uint8)}, TypeError, "x: .*floating.*uint8"),
        ({"x": torch.tensor(0.5)}, ValueError, r"x: expected images \[N"),
        ({"x": torch.empty(2**16, 2**15, device="meta")}, ValueError, "x: .*2147483647"),
        ({"eps": -1}, ValueError, r"eps: expected a number in \[0, inf\)"),
        ({"eps": float("nan")}, ValueError, "eps: .*got nan"),
        ({"eps": torch.ones(3)}, ValueError, r"eps: .*one per image \[2\]"),
        ({"eps": torch.ones(2, device="meta")}, ValueError, "eps: expected cpu"),
        ({"norm": "l1"}, ValueError, "norm: expected one of linf, l2"),
        ({"start": "random"}, ValueError, "start: expected one of uniform, normal, zero"),
        ({"seed": -1}, ValueError, "seed"),
        ({"seed": 1.5}, TypeError, "seed"),
        ({"step": -1}, ValueError, "step"),
        ({"step": torch.tensor([1, 2])}, ValueError, "step: expected a 0-d tensor"),
        ({"step": torch.tensor(1.0)}, TypeError, "step: .*float32"),
    ],
)
def test_bad_arguments_are_refused(kernels, changes, error, message):
    arguments = {"x": grey(2, 3), "eps": 0.1, "seed": 0} | changes
    with pytest.raises(error, match=message):
        pgd_init(arguments.pop("x"), **arguments)


def test_launcher_reference_and_operation_have_one_signature():
    functions = (pgd_init, pgd_init_ref, device.pgd_init)
    assert len({inspect.signature(function) for function in functions}) == 1
