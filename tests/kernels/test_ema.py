"""The coin and the averages: values, statistics, dtypes, kernels against references."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cure_fast.kernels import TensorList, ema, ema_update_, flip_coin
from cure_fast.kernels.ema import ema_update_ref, flip_coin_ref


def test_a_move_is_the_weighted_mean():
    average, param = [torch.tensor([1.0, 2.0])], [torch.tensor([3.0, -2.0])]
    moved = ema_update_(average, param, decay=0.75)
    assert bool(moved)
    torch.testing.assert_close(average[0], torch.tensor([1.5, 1.0]))
    assert torch.equal(param[0], torch.tensor([3.0, -2.0]))


@pytest.mark.parametrize("choice", ["triton", "reference"])
def test_rate_zero_moves_nothing(choice, monkeypatch):
    monkeypatch.setenv("CURE_FAST_KERNELS", choice)
    average = [torch.ones(3), torch.tensor(4)]
    nan = [torch.full((3,), float("nan")), torch.tensor(9)]
    moved = ema_update_(average, nan, decay=0.5, rate=0, step=0)
    assert not bool(moved) and torch.equal(average[0], torch.ones(3)) and average[1] == 4


@pytest.mark.parametrize("choice", ["triton", "reference"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool])
def test_what_is_not_floating_is_copied_with_the_move(choice, dtype, monkeypatch):
    monkeypatch.setenv("CURE_FAST_KERNELS", choice)
    average = [torch.tensor([0, 1, 1]).to(dtype)]
    ema_update_(average, [torch.tensor([1, 0, 1]).to(dtype)], decay=0.999)
    assert average[0].tolist() == [1, 0, 1] and average[0].dtype == dtype


def test_one_coin_moves_all_or_nothing_at_the_given_rate():
    moves = 0
    for step in range(2000):
        average = [torch.zeros(2), torch.zeros(3)]
        moved = ema_update_(
            average, [torch.ones(2), torch.ones(3)], decay=0.5, rate=0.2, seed=7, step=step
        )
        values = {float(v) for tensor in average for v in tensor}
        assert values == ({0.5} if moved else {0.0})
        moves += bool(moved)
    # Binomial(2000, 0.2): mean 400, deviation 17.9.
    assert 400 - 5 * 17.9 < moves < 400 + 5 * 17.9


@pytest.mark.parametrize("choice", ["triton", "reference"])
@pytest.mark.parametrize("rate", [0.5, 0, torch.tensor(1.0)], ids=str)
def test_a_rate_below_one_needs_the_number_of_the_step(choice, rate, monkeypatch):
    """Without it the same coin would be tossed at every step."""
    monkeypatch.setenv("CURE_FAST_KERNELS", choice)
    with pytest.raises(ValueError, match=r"step: expected the number of the step .* got None"):
        ema_update_([torch.ones(1)], [torch.zeros(1)], decay=0.5, rate=rate)
    for always in (1, 1.0, np.float32(1)):
        assert bool(ema_update_([torch.ones(1)], [torch.zeros(1)], decay=0.5, rate=always))


@pytest.mark.parametrize("choice", ["triton", "reference"])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("step", range(4))
def test_a_step_that_is_skipped_moves_nothing(choice, skip, step, monkeypatch):
    monkeypatch.setenv("CURE_FAST_KERNELS", choice)
    average, nan = (
        [torch.ones(3), torch.tensor(4)],
        [torch.full((3,), float("nan")), torch.tensor(9)],
    )
    coin = {"rate": 0.5, "seed": 1, "step": step}
    moved = ema_update_(average, nan, decay=0.5, **coin, skip=torch.tensor(skip))
    landed = bool(flip_coin(coin["rate"], seed=1, step=step))
    assert bool(moved) == (landed and not skip)
    assert average[1] == (9 if moved else 4)
    assert torch.equal(average[0].isnan(), torch.full((3,), bool(moved)))


def test_the_tosses_of_the_skipped_steps_land_and_do_not():
    """Or the test above would not tell a skip from a coin."""
    assert {bool(flip_coin(0.5, seed=1, step=step)) for step in range(4)} == {False, True}


@pytest.mark.parametrize("choice", ["triton", "reference"])
def test_the_devices_name_will_do(choice, monkeypatch):
    monkeypatch.setenv("CURE_FAST_KERNELS", choice)
    for device in ("cpu", torch.device("cpu"), None):
        assert bool(flip_coin(1, seed=1, step=0, device=device))
        assert bool(flip_coin(torch.tensor(1.0), seed=1, step=torch.tensor(0), device=device))


def test_a_gpu_without_a_number_is_the_current_one(monkeypatch):
    """Tensors there have a number, and would otherwise be on another device."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    for device in ("cuda", torch.device("cuda")):
        assert ema.device_of(0, device) == torch.device("cuda", 3)
    assert ema.device_of(0, "cuda:1") == torch.device("cuda", 1)


@given(
    rate=st.floats(0, 1),
    seed=st.integers(0, 2**64 - 1),
    step=st.integers(0, 2**63 - 1),
    on_device=st.booleans(),
)
def test_the_coins_kernel_is_the_references(rate, seed, step, on_device):
    given_rate = torch.tensor(rate) if on_device else rate
    given_step = torch.tensor(step) if on_device else step
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CURE_FAST_KERNELS", "triton")
        tossed = flip_coin(given_rate, seed=seed, step=given_step)
    assert tossed.dtype == torch.bool and tossed.shape == ()
    assert tossed == flip_coin_ref(rate, seed=seed, step=step)


def test_a_step_on_the_device_is_read_and_not_advanced(triton_kernels):
    step = torch.tensor(3)
    first = [bool(flip_coin(0.5, seed=1, step=step)) for _ in range(2)]
    drawn = []
    for _ in range(16):
        drawn.append(bool(flip_coin(0.5, seed=1, step=step)))
        step += 1
    assert first == [drawn[0]] * 2 and len(set(drawn)) == 2


DECAYS = (
    0,
    0.0,
    0.3,
    0.5,
    0.999,
    np.float32(0.9),
    1,
    1.0,
    torch.tensor(0.9),
    torch.tensor(0.9, dtype=torch.float64),
)


@pytest.mark.parametrize("decay", DECAYS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_the_averages_kernel_is_the_references_bit_for_bit(decay, dtype, triton_kernels):
    shapes = ((5, 3), (4096,), (4097,), (0,), ())
    average = [torch.randn(shape).to(dtype) for shape in shapes]
    params = [torch.randn(shape) for shape in shapes]
    expected = [tensor.clone() for tensor in average]
    ema_update_(average, params, decay=decay)
    ema_update_ref(expected, params, decay=decay)
    assert all(torch.equal(a, b) for a, b in zip(average, expected, strict=True))


def test_bfloat16_averages_agree_within_the_interpreters_rounding(triton_kernels):
    # The interpreter cuts bits off where a GPU rounds to nearest: one unit in the last place.
    average, param = [torch.randn(300).bfloat16()], [torch.randn(300)]
    expected = [average[0].clone()]
    ema_update_(average, param, decay=0.7)
    ema_update_ref(expected, param, decay=0.7)
    torch.testing.assert_close(average, expected, rtol=2**-7, atol=0)


@given(size=st.integers(1, 40), decay=st.floats(0, 1))
def test_the_reference_is_the_formula(size, decay):
    old, new = np.linspace(-2, 3, size), np.linspace(5, -1, size)
    average = [torch.tensor(old)]
    ema_update_(average, [torch.tensor(new)], decay=decay)
    expected = decay * old + (1 - decay) * new
    np.testing.assert_allclose(average[0].numpy(), expected, rtol=1e-12, atol=1e-12)


def test_memory_orders_may_differ_and_views_may_be_unaligned(triton_kernels):
    storage = torch.zeros(2 * 3 * 4 * 5 + 1)
    average = [storage[1:].view(2, 3, 4, 5)]
    param = [torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)]
    ema_update_(average, param, decay=0.0)
    assert torch.equal(average[0], param[0]) and storage[0] == 0


def test_prepared_lists_of_different_memory_order_are_refused_by_name(triton_kernels):
    average = TensorList([torch.zeros(2, 3, 4, 5)], names=["conv.weight"])
    param = TensorList([torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)])
    with pytest.raises(ValueError, match=r"params\[0\]: expected strides .*of conv.weight"):
        ema_update_(average, param, decay=0.5)


@pytest.mark.parametrize("choice", ["triton", "reference"])
def test_empty_lists_move_nothing(choice, monkeypatch):
    monkeypatch.setenv("CURE_FAST_KERNELS", choice)
    assert bool(ema_update_([], [], decay=0.5))


ONE = torch.ones(1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"decay": 1.1}, ValueError, r"decay: expected a number in \[0, 1\], got 1.1"),
        ({"decay": -0.1}, ValueError, "decay: "),
        ({"decay": "0.5"}, TypeError, "decay: expected a number .* got str"),
        ({"decay": torch.ones(2)}, ValueError, "decay: expected a number or a 0-d tensor"),
        ({"decay": 0.5, "rate": 2}, ValueError, "rate: "),
        ({"decay": 0.5, "rate": float("nan")}, ValueError, "rate: "),
        ({"decay": 0.5, "seed": -1}, ValueError, "seed: "),
        ({"decay": 0.5, "step": 1.5}, TypeError, "step: "),
        ({"decay": 0.5, "params": [torch.ones(2)]}, ValueError, r"params\[0\]: expected shape"),
        ({"decay": 0.5, "params": []}, ValueError, "params: expected 1 tensors"),
        ({"decay": 0.5, "params": torch.ones(1)}, TypeError, "params: expected a list"),
        ({"decay": 0.5, "params": [torch.ones(1).int()]}, TypeError, r"params\[0\]: .*int32"),
        (
            {"decay": 0.5, "averages": [torch.ones(1).char()], "params": [torch.ones(1).int()]},
            TypeError,
            r"params\[0\]: expected torch.int8, that of averages\[0\], got torch.int32",
        ),
        (
            {"decay": 0.5, "averages": [ONE.cfloat()], "params": [ONE.cfloat()]},
            TypeError,
            r"averages\[0\]: expected one of .*got torch.complex64",
        ),
        ({"decay": 0.5, "params": [ONE.cfloat()]}, TypeError, r"params\[0\]: .*complex64"),
        ({"decay": 0.5, "skip": torch.tensor(0.0)}, ValueError, "skip: expected a 0-d bool"),
        ({"decay": 0.5, "params": [torch.ones(1, device="meta")]}, ValueError, "meta"),
    ],
)
def test_bad_input_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        ema_update_(**({"averages": [ONE.clone()], "params": [ONE]} | arguments))
