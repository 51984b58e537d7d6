from __future__ import annotations

import inspect
from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cure_fast import losses
from cure_fast.kernels import softmax
from cure_fast.kernels.softmax import INPUTS, SoftmaxLosses, softmax_losses, softmax_losses_ref

NAMES = [field.name for field in fields(SoftmaxLosses) if field.name != "gradients"]
EVERY = tuple(INPUTS)
BOTH = ("triton", "reference")
# The fixtures only set an environment variable, which every example needs alike.
PER_TEST = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])

# float32 against float64. A log-probability is a difference of numbers up to SPREAD (the largest
# |logit| drawn, 20) and log K, so its rounding error is a few 2**-24 * 40; a KL adds up two.
LOSS_ERROR = 2e-5
# Slopes are p * (difference - kl), of the same error times a probability, for beta = 5.
SLOPE_ERROR = 1e-4


def draw(count: int, classes: int, dtype: torch.dtype = torch.float32, seed: int = 0):
    """Return logits, adversarial logits, the teacher's two and labels."""
    generator = torch.Generator().manual_seed(seed)
    logits = [(torch.randn(count, classes, generator=generator) * 5).to(dtype) for _ in range(4)]
    return *logits, torch.randint(classes, (count,), generator=generator)


def expected(
    z: Tensor,
    z_adv: Tensor,
    y: Tensor,
    t: Tensor | None,
    t_adv: Tensor | None,
    *,
    beta: float,
    gamma: float,
    natural_target: str = "attached",
) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor | None, Tensor | None]]]:
    """Return the losses and gradients in float64, by autograd through cure_fast.losses."""
    z, z_adv = (v.double().clone().requires_grad_() for v in (z, z_adv))
    target = z.detach() if natural_target == "detached" else z
    values = {
        "natural_ce": losses.cross_entropy(z, y),
        "adversarial_ce": losses.cross_entropy(z_adv, y),
        "kl": losses.kl_divergence(target, z_adv),
        "margin": losses.margin(z_adv, y),
        "consistency": torch.zeros(len(y), dtype=torch.float64),
    }
    if t is not None and t_adv is not None:
        values["consistency"] = losses.kl_divergence(t.double(), z) + losses.kl_divergence(
            t_adv.double(), z_adv
        )
    values["total"] = values["natural_ce"] + beta * values["kl"] + gamma * values["consistency"]
    gradients = {}
    for name in EVERY:
        mean = values[name].mean()
        gradients[name] = torch.autograd.grad(
            mean, (z, z_adv), retain_graph=True, allow_unused=True
        )
    return {name: value.detach() for name, value in values.items()}, gradients


def check(
    result: SoftmaxLosses,
    values: dict[str, Tensor],
    gradients: dict[str, tuple[Tensor | None, Tensor | None]],
    *,
    loss_error: float = LOSS_ERROR,
    slope_error: float = SLOPE_ERROR,
) -> None:
    for name in NAMES:
        value = getattr(result, name)
        assert value.dtype == torch.float32
        torch.testing.assert_close(
            value.double(), values[name], rtol=1e-5, atol=loss_error * (5 if name == "total" else 1)
        )
    for name, pair in result.gradients.items():
        for got, wanted in zip(pair, gradients[name], strict=True):
            assert (got is None) == (wanted is None), name
            if got is not None and wanted is not None:
                # Of the batch mean, so the error shrinks with the batch.
                atol = slope_error / len(got)
                torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=atol, msg=name)


def both_equal(one: SoftmaxLosses, other: SoftmaxLosses, *, atol: float, rtol: float = 0) -> None:
    for name in NAMES:
        a, b = getattr(one, name), getattr(other, name)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=atol, equal_nan=True, msg=name)
    assert one.gradients.keys() == other.gradients.keys()
    for name, pair in one.gradients.items():
        for a, b in zip(pair, other.gradients[name], strict=True):
            assert (a is None) == (b is None), name
            if a is not None and b is not None:
                torch.testing.assert_close(a, b, rtol=rtol, atol=atol, equal_nan=True, msg=name)


def test_the_reference_takes_the_same_arguments():
    assert inspect.signature(softmax_losses) == inspect.signature(softmax_losses_ref)


@pytest.mark.parametrize("kernels", BOTH)
@given(
    count=st.integers(1, 11),
    classes=st.sampled_from([2, 3, 10, 17, 130]),
    seed=st.integers(0, 2**31),
    beta=st.floats(0, 8),
    gamma=st.floats(0, 2),
    natural_target=st.sampled_from(["attached", "detached"]),
    teacher=st.booleans(),
)
@PER_TEST
def test_losses_and_gradients_are_those_of_autograd_in_float64(
    monkeypatch, kernels, count, classes, seed, beta, gamma, natural_target, teacher
):
    monkeypatch.setenv("CURE_FAST_KERNELS", kernels)
    z, z_adv, t, t_adv, y = draw(count, classes, seed=seed)
    if not teacher:
        t = t_adv = None
    result = softmax_losses(
        z,
        z_adv,
        y,
        teacher_logits=t,
        teacher_adv_logits=t_adv,
        beta=beta,
        gamma=gamma,
        natural_target=natural_target,
        gradients=EVERY,
    )
    assert tuple(result.gradients) == EVERY
    check(
        result,
        *expected(z, z_adv, y, t, t_adv, beta=beta, gamma=gamma, natural_target=natural_target),
    )


@pytest.mark.parametrize("kernels", BOTH)
def test_losses_follow_their_formulas_in_numpy(monkeypatch, kernels):
    monkeypatch.setenv("CURE_FAST_KERNELS", kernels)
    z, z_adv, t, t_adv, y = draw(6, 5)
    result = softmax_losses(z, z_adv, y, teacher_logits=t, teacher_adv_logits=t_adv, gradients=())

    def probabilities(values: Tensor) -> np.ndarray:
        powers = np.exp(values.double().numpy())
        return powers / powers.sum(axis=1, keepdims=True)

    p, q, a, b = map(probabilities, (z, z_adv, t, t_adv))
    rows = np.arange(6)
    kl = (p * np.log(p / q)).sum(axis=1)
    taught = (a * np.log(a / p)).sum(axis=1) + (b * np.log(b / q)).sum(axis=1)
    natural_ce = -np.log(p[rows, y])
    others = z_adv.double().numpy().copy()
    own = others[rows, y].copy()
    others[rows, y] = -np.inf
    wanted = {
        "natural_ce": natural_ce,
        "adversarial_ce": -np.log(q[rows, y]),
        "kl": kl,
        "consistency": taught,
        "margin": others.max(axis=1) - own,
        "total": natural_ce + 5 * kl + taught,
    }
    for name in NAMES:
        np.testing.assert_allclose(getattr(result, name), wanted[name], rtol=1e-5, atol=1e-4)
    assert result.gradients == {}


def test_a_thousand_classes(triton_kernels):
    z, z_adv, t, t_adv, y = draw(3, 1000)
    result = softmax_losses(
        z, z_adv, y, teacher_logits=t, teacher_adv_logits=t_adv, gradients=EVERY
    )
    check(result, *expected(z, z_adv, y, t, t_adv, beta=5, gamma=1))


def test_more_classes_than_a_program_holds_run_as_the_reference(monkeypatch, triton_kernels):
    monkeypatch.setattr(softmax, "MOST_CLASSES", 9)
    monkeypatch.setattr(softmax, "run", None)
    z, z_adv, _, _, y = draw(2, 10)
    result = softmax_losses(z, z_adv, y)
    both_equal(result, softmax_losses_ref(z, z_adv, y), atol=0)


@pytest.mark.parametrize("kernels", BOTH)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_computed_in_float32(monkeypatch, kernels, dtype):
    monkeypatch.setenv("CURE_FAST_KERNELS", kernels)
    z, z_adv, t, t_adv, y = draw(4, 10, dtype)
    given_teacher = {"teacher_logits": t.float(), "teacher_adv_logits": t_adv}
    result = softmax_losses(z, z_adv, y, gradients=EVERY, **given_teacher)
    values, gradients = expected(z, z_adv, y, t, t_adv, beta=5, gamma=1)
    for name, pair in result.gradients.items():
        for got, wanted in zip(pair, gradients[name], strict=True):
            if got is not None:
                assert got.dtype == dtype
                # One rounding to nearest; Triton's interpreter cuts the bits of bfloat16 off.
                rtol = {torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype]
                if kernels == "triton" and dtype == torch.bfloat16:
                    rtol = 2**-7
                torch.testing.assert_close(got.double(), wanted, rtol=rtol, atol=SLOPE_ERROR / 4)
    check(SoftmaxLosses(**{n: getattr(result, n) for n in NAMES}, gradients={}), values, {})


@pytest.mark.parametrize("kernels", BOTH)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_large_logits_neither_overflow_nor_lose_their_losses(monkeypatch, kernels, dtype):
    monkeypatch.setenv("CURE_FAST_KERNELS", kernels)
    z = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [1e4, 1e4, 1e4]], dtype=dtype)
    z_adv = z.flip(1).contiguous()
    y = torch.tensor([1, 0, 2])
    # Classes tie here, where autograd shares the margin's gradient among them.
    smooth = tuple(name for name in EVERY if name != "margin")
    result = softmax_losses(
        z, z_adv, y, teacher_logits=z_adv, teacher_adv_logits=z, gradients=smooth
    )
    values, gradients = expected(z, z_adv, y, z_adv, z, beta=5, gamma=1)
    assert result.kl[0] > 9e3
    # Numbers near 2e4 are 2**-9 apart in float32.
    rtol = 2**-7 if dtype == torch.bfloat16 else 2**-10
    for name in NAMES:
        torch.testing.assert_close(
            getattr(result, name).double(), values[name], rtol=1e-6, atol=2e-3
        )
    for name, pair in result.gradients.items():
        for got, wanted in zip(pair, gradients[name], strict=True):
            if got is not None:
                torch.testing.assert_close(got.double(), wanted, rtol=rtol, atol=1e-4)


@pytest.mark.parametrize("classes", [1, 2])
def test_one_and_two_classes(triton_kernels, classes):
    z, z_adv, t, t_adv, y = draw(5, classes)
    teacher = {"teacher_logits": t, "teacher_adv_logits": t_adv}
    result = softmax_losses(z, z_adv, y, gradients=EVERY, **teacher)
    both_equal(result, softmax_losses_ref(z, z_adv, y, gradients=EVERY, **teacher), atol=1e-5)
    if classes == 1:
        assert (result.natural_ce == 0).all() and (result.total == 0).all()
        assert (result.margin == -torch.inf).all()
        assert result.gradients["margin"][1].isnan().all()
        assert (result.gradients["total"][0] == 0).all()


@pytest.mark.parametrize("kernels", BOTH)
def test_an_empty_batch_has_empty_losses_and_gradients(monkeypatch, kernels):
    monkeypatch.setenv("CURE_FAST_KERNELS", kernels)
    z, z_adv, _, _, y = draw(0, 10)
    result = softmax_losses(z, z_adv, y)
    assert all(getattr(result, name).shape == (0,) for name in NAMES)
    assert all(result.gradients["total"][i].shape == (0, 10) for i in (0, 1))


@pytest.mark.parametrize("kernels", BOTH)
def test_the_first_of_tied_classes_takes_the_gradient_of_the_margin(monkeypatch, kernels):
    monkeypatch.setenv("CURE_FAST_KERNELS", kernels)
    z_adv = torch.tensor([[2.0, 5.0, 1.0, 5.0], [7.0, 7.0, 7.0, 7.0], [3.0, 1.0, 3.0, 3.0]])
    y = torch.tensor([2, 0, 0])
    result = softmax_losses(None, z_adv, y, gradients=("margin",))
    assert result.margin.tolist() == [4, 0, 0]
    natural, adversarial = result.gradients["margin"]
    assert natural is None
    third = float(np.float32(1 / 3))
    assert adversarial.tolist() == [
        [0, third, -third, 0],
        [-third, third, 0, 0],
        [-third, 0, third, 0],
    ]


@pytest.mark.parametrize("kernels", BOTH)
@pytest.mark.parametrize("wrong", [-1, -100, 5, 16, 2**40, -(2**62)])
def test_a_label_of_no_class_makes_its_sample_nan_and_no_other(monkeypatch, kernels, wrong):
    monkeypatch.setenv("CURE_FAST_KERNELS", kernels)
    z, z_adv, t, t_adv, y = draw(3, 5)
    y[1] = wrong
    result = softmax_losses(
        z, z_adv, y, teacher_logits=t, teacher_adv_logits=t_adv, gradients=EVERY
    )
    for name in ("natural_ce", "adversarial_ce", "margin", "total"):
        assert getattr(result, name).isnan().tolist() == [False, True, False], name
        for gradient in result.gradients[name]:
            if gradient is not None:
                assert gradient.isnan().all(dim=1).tolist() == [False, True, False], name
                assert gradient.isnan().any(dim=1).tolist() == [False, True, False], name
    for values in (result.kl, result.consistency, *result.gradients["kl"]):
        assert values.isfinite().all()


@pytest.mark.parametrize("kernels", BOTH)
def test_a_nan_logit_makes_the_losses_that_it_enters_nan(monkeypatch, kernels):
    monkeypatch.setenv("CURE_FAST_KERNELS", kernels)
    z, z_adv, _, _, y = draw(3, 5)
    z[0, (y[0] + 1) % 5] = torch.nan
    z_adv[2, (y[2] + 1) % 5] = torch.nan
    result = softmax_losses(z, z_adv, y, gradients=EVERY)
    wanted = {
        "natural_ce": ([True, False, False], None),
        "adversarial_ce": (None, [False, False, True]),
        "margin": (None, [False, False, True]),
        "kl": ([True, False, True], [True, False, True]),
        "total": ([True, False, True], [True, False, True]),
    }
    for name, rows in wanted.items():
        assert getattr(result, name).isnan().tolist() == (rows[0] or rows[1]), name
        for gradient, nan in zip(result.gradients[name], rows, strict=True):
            assert (gradient is None) == (nan is None)
            if gradient is not None:
                assert gradient.isnan().any(dim=1).tolist() == nan, name


@pytest.mark.parametrize("kernels", BOTH)
def test_losses_of_logits_that_are_not_given_are_nan(monkeypatch, kernels):
    monkeypatch.setenv("CURE_FAST_KERNELS", kernels)
    z, z_adv, _, _, y = draw(4, 10)
    whole = softmax_losses(z, z_adv, y, gradients=EVERY)
    attack = softmax_losses(None, z_adv, y, gradients=("adversarial_ce", "margin"))
    clean = softmax_losses(z, None, y, gradients=("natural_ce",))
    for result, known in ((attack, ("adversarial_ce", "margin")), (clean, ("natural_ce",))):
        assert tuple(result.gradients) == known
        for name in NAMES:
            if name in known:
                assert torch.equal(getattr(result, name), getattr(whole, name))
            else:
                assert getattr(result, name).isnan().all(), name
        for name in known:
            for one, other in zip(result.gradients[name], whole.gradients[name], strict=True):
                assert (one is None) == (other is None)
                assert one is None or torch.equal(one, other)


@pytest.mark.parametrize("kernels", BOTH)
def test_rows_apart_in_memory_and_logits_of_a_graph(monkeypatch, kernels):
    monkeypatch.setenv("CURE_FAST_KERNELS", kernels)
    wide = torch.randn(4, 30, requires_grad=True)
    z, z_adv, y = wide[:, :10], wide[:, 10:].T[::2].T, torch.tensor([0, 9, 3, 3])
    labels = torch.stack([y, y], dim=1)[:, 0]
    assert not (z.is_contiguous() or z_adv.is_contiguous() or labels.is_contiguous())
    result = softmax_losses(z, z_adv, labels)
    check(result, *expected(z.detach(), z_adv.detach(), y, None, None, beta=5, gamma=1))
    assert not result.total.requires_grad
    torch.autograd.backward([z, z_adv], list(result.gradients["total"]))
    by_hand = wide.grad
    wide.grad = None
    total = losses.cross_entropy(z, y) + 5 * losses.kl_divergence(z, z_adv)
    total.mean().backward()
    torch.testing.assert_close(by_hand, wide.grad, rtol=1e-5, atol=SLOPE_ERROR / 4)


def test_a_gradient_that_is_not_asked_for_is_not_computed(monkeypatch, triton_kernels):
    shapes = []
    empty = torch.empty

    def counted(shape, *args, **kwargs):
        shapes.append(tuple(shape))
        return empty(shape, *args, **kwargs)

    z, z_adv, _, _, y = draw(4, 10)
    softmax_losses(z, z_adv, y, gradients=("kl",))  # builds the kernel
    monkeypatch.setattr(torch, "empty", counted)
    result = softmax_losses(z, z_adv, y, gradients=("kl",), natural_target="detached")
    assert shapes.count((4, 10)) == 1
    assert result.gradients["kl"][0] is None
