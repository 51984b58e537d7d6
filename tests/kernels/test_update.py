"""The fused update: torch.optim.SGD, masks, averages, copies; kernel against reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cure_fast.kernels import TensorList, masked_sgd_, update
from cure_fast.kernels.device import numbers
from cure_fast.kernels.ema import ema_update_ref
from cure_fast.kernels.update import masked_sgd_ref

SHAPES = ((5, 3), (2500,), ())


def tensors(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 5e-4])
@pytest.mark.parametrize("nesterov", [False, True])
def test_the_reference_is_torchs_sgd_bit_for_bit(momentum, weight_decay, nesterov):
    if nesterov and not momentum:
        with pytest.raises(ValueError, match="nesterov: expected momentum above 0"):
            masked_sgd_(tensors(0), tensors(1), None, lr=0.1, nesterov=True)
        return
    mine, theirs = tensors(0), [p.requires_grad_() for p in tensors(0)]
    buffers = [torch.zeros_like(p) for p in mine] if momentum else None
    optimizer = torch.optim.SGD(
        theirs, lr=0.1, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov
    )
    for step in range(3):
        grads = tensors(step + 1)
        for param, grad in zip(theirs, grads, strict=True):
            param.grad = grad.clone()
        optimizer.step()
        masked_sgd_(
            mine,
            grads,
            buffers,
            lr=0.1,
            momentum=momentum,
            weight_decay=weight_decay,
            nesterov=nesterov,
        )
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def case(seed, *, grads=torch.float32, copies=None, averages=False, scored=False, **options):
    """Return the lists and options of one call, new tensors at each call."""
    scores = tensors(seed + 3)
    arguments = {
        "params": tensors(seed),
        "grads": tensors(seed + 1, grads),
        "momentum_buffers": tensors(seed + 2) if options.get("momentum") else None,
        "lr": 0.1,
        "weight_decay": 5e-4,
    }
    if scored:
        arguments["scores"] = [None, *scores[1:]]
        arguments["thresholds"] = torch.tensor([5.0, 0.3, -9.0])
    if averages:
        arguments["averages"] = tensors(seed + 4)
    if copies:
        arguments["low_precision_copies"] = tensors(seed + 5, copies)
    return arguments | options


CASES = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "masked": {"momentum": 0.9, "scored": True},
    "held": {"momentum": 0.9, "scored": True, "conserve": "weight"},
    "held without momentum": {"scored": True, "conserve": "weight"},
    "average": {"averages": True, "decay": 0.9},
    "average not moved": {"averages": True, "moved": torch.tensor(False)},
    "average moved": {"averages": True, "moved": torch.tensor(True), "decay": torch.tensor(0.2)},
    "half copies": {"momentum": 0.9, "copies": torch.float16},
    "half gradients": {"momentum": 0.9, "grads": torch.float16, "scored": True},
    "bfloat16 gradients": {"momentum": 0.9, "grads": torch.bfloat16},
    "lr on the device": {"lr": torch.tensor(0.05)},
    "momentum on the device": {"momentum": torch.tensor(0.9)},
    "nesterov on the device": {
        "momentum": torch.tensor(0.9, dtype=torch.float64),
        "nesterov": True,
    },
    "decay per tensor": {"weight_decay": [0.0, 0.1, 0.5]},
    "decay per tensor on the device": {"weight_decay": torch.tensor([0.0, 0.1, 0.5])},
    "skipped": {"momentum": 0.9, "averages": True, "skip": torch.tensor(True)},
    "not skipped": {"momentum": 0.9, "averages": True, "skip": torch.tensor(False)},
    "all": {
        "momentum": 0.9,
        "nesterov": True,
        "scored": True,
        "averages": True,
        "copies": torch.float16,
        "moved": torch.tensor(True),
        "skip": torch.tensor(False),
    },
}
LISTS = ("params", "grads", "momentum_buffers", "averages", "low_precision_copies")


def assert_same_update(options, seed=0):
    mine, expected = case(seed, **options), case(seed, **options)
    masked_sgd_(**mine)
    masked_sgd_ref(**expected)
    for name in LISTS:
        for a, b in zip(mine.get(name) or (), expected.get(name) or (), strict=True):
            # A multiply-add is rounded once on a GPU, here once or twice: a few units of 2**-24;
            # half precision copies can then round to the next number.
            rtol = 1e-3 if a.dtype == torch.float16 else 1e-6
            torch.testing.assert_close(a, b, rtol=rtol, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_is_the_reference(name, triton_kernels):
    assert_same_update(CASES[name])


def test_bfloat16_copies_agree_within_the_interpreters_rounding(triton_kernels):
    # It cuts bits off where a GPU rounds to nearest: one unit in the last place.
    arguments = case(0, copies=torch.bfloat16)
    masked_sgd_(**arguments)
    for copy, param in zip(arguments["low_precision_copies"], arguments["params"], strict=True):
        torch.testing.assert_close(copy.float(), param, rtol=2**-7, atol=0)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 99),
    momentum=st.sampled_from([0.0, 0.5]),
    scored=st.booleans(),
    averages=st.booleans(),
    conserve=st.sampled_from(["gradient", "weight"]),
)
def test_the_kernel_is_the_reference_for_any_mixture(seed, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CURE_FAST_KERNELS", "triton")
        assert_same_update(options, seed)


@pytest.mark.parametrize("choice", ["triton", "reference"])
@pytest.mark.parametrize("conserve", ["gradient", "weight"])
def test_what_a_mask_leaves_to_momentum_and_decay(choice, conserve, monkeypatch):
    monkeypatch.setenv("CURE_FAST_KERNELS", choice)
    param, buffer = torch.tensor([1.0, 1.0]), torch.tensor([2.0, 2.0])
    masked_sgd_(
        [param],
        [torch.tensor([4.0, 4.0])],
        [buffer],
        lr=0.5,
        momentum=0.5,
        weight_decay=0.25,
        scores=[torch.tensor([0.0, 1.0])],
        thresholds=torch.tensor([1.0]),
        conserve=conserve,
    )
    # Masked: v = 0.5*2 + 0.25*1 = 1.25; free: v = 0.5*2 + 4 + 0.25 = 5.25.
    assert buffer.tolist() == [1.25, 5.25]
    assert param.tolist() == [1.0 if conserve == "weight" else 0.375, -1.625]


@pytest.mark.parametrize("choice", ["triton", "reference"])
def test_nan_scores_count_as_largest(choice, monkeypatch):
    monkeypatch.setenv("CURE_FAST_KERNELS", choice)
    nan, inf = float("nan"), float("inf")
    scores = torch.tensor([nan, 1.0, inf, -inf])
    for threshold, kept in ((1.0, [1, 1, 1, 0]), (nan, [1, 0, 0, 0]), (-inf, [1, 1, 1, 1])):
        param = torch.zeros(4)
        masked_sgd_(
            [param],
            [torch.full((4,), -1.0)],
            None,
            lr=1.0,
            scores=[scores],
            thresholds=torch.tensor([threshold]),
        )
        assert param.tolist() == kept, threshold


def test_averages_follow_the_new_weights(triton_kernels):
    arguments = case(0, averages=True, decay=0.9)
    expected = [tensor.clone() for tensor in arguments["averages"]]
    masked_sgd_(**arguments)
    ema_update_ref(expected, arguments["params"], decay=0.9)
    torch.testing.assert_close(arguments["averages"], expected, rtol=1e-6, atol=1e-7)


def test_prepared_lists_give_the_same_bits_call_after_call(triton_kernels):
    results = []
    for prepare in (list, TensorList, TensorList):
        arguments = case(0, **CASES["all"])
        lists = {name: prepare(arguments[name]) for name in (*LISTS, "scores")}
        masked_sgd_(**(arguments | lists))
        results.append([tensor for name in LISTS for tensor in arguments[name]])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_gradients_in_another_memory_order_are_matched(triton_kernels):
    param = torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)
    grad = torch.randn(2, 3, 4, 5)
    masked_sgd_([param], [grad], None, lr=1.0)
    assert torch.equal(param, -grad)


BOTH = pytest.mark.parametrize("choice", ["triton", "reference"])


@BOTH
def test_numbers_on_the_device_may_lie_in_any_way(choice, monkeypatch):
    """A column of a matrix, and one number expanded."""
    monkeypatch.setenv("CURE_FAST_KERNELS", choice)
    columns = torch.tensor([[0.0, 2.0, 9.0], [0.5, 3.0, 9.0]])
    for decay, expected in ((columns[:, 0], [0.0, 0.5]), (torch.tensor(0.5).expand(2), [0.5] * 2)):
        params = [torch.ones(4), torch.ones(4)]
        masked_sgd_(
            params,
            [torch.full((4,), -1.0), torch.full((4,), -1.0)],
            None,
            lr=1.0,
            weight_decay=decay,
            scores=[torch.arange(4.0), torch.arange(4.0)],
            thresholds=columns[:, 1],
        )
        for param, factor, masked in zip(params, expected, (2, 3), strict=True):
            assert param.tolist() == [1 - factor] * masked + [2 - factor] * (4 - masked)


@BOTH
def test_without_momentum_buffers_stay_as_they_are(choice, monkeypatch):
    """As torch.optim.SGD leaves them."""
    monkeypatch.setenv("CURE_FAST_KERNELS", choice)
    param, buffer = torch.ones(2), torch.tensor([7.0, float("nan")])
    masked_sgd_([param], [torch.full((2,), 0.5)], [buffer], lr=1.0, momentum=0.0)
    assert param.tolist() == [0.5, 0.5] and buffer[0] == 7 and buffer[1].isnan()


KINDS = (int, np.float32, np.float64, np.float16, np.int64)


@BOTH
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_may_be_integers_and_numpys(kind, choice, monkeypatch):
    monkeypatch.setenv("CURE_FAST_KERNELS", choice)
    options = {"lr": 2, "momentum": 1, "weight_decay": 3, "decay": 0}
    found, expected = case(0, averages=True, momentum=1), case(0, averages=True, momentum=1)
    masked_sgd_(**(found | {name: kind(value) for name, value in options.items()}))
    masked_sgd_(**(expected | {name: float(value) for name, value in options.items()}))
    for name in ("params", "momentum_buffers", "averages"):
        assert all(map(torch.equal, found[name], expected[name])), name


def test_kernels_get_floats(monkeypatch):
    """An integer is compiled into the kernel, and NumPy's numbers have no type there."""
    got = {}
    monkeypatch.setattr(update.dispatch, "run", lambda *args, **options: got.update(options))
    for kind in KINDS:
        masked_sgd_([], [], [], lr=kind(1), momentum=kind(1), weight_decay=kind(1), decay=kind(1))
        names = ("lr", "momentum", "weight_decay", "decay")
        assert [type(got[name]) for name in names] == [float] * 4
        masked_sgd_([torch.ones(1)], [torch.ones(1)], None, lr=1, weight_decay=[kind(1)])
        assert [type(number) for number in got["weight_decay"]] == [float]


ANOTHER = torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)


@BOTH
@pytest.mark.parametrize("prepare", [list, TensorList])
@pytest.mark.parametrize("name", ["momentum_buffers", "averages", "low_precision_copies"])
def test_what_lies_in_another_order_than_the_weights_is_refused(name, prepare, choice, monkeypatch):
    monkeypatch.setenv("CURE_FAST_KERNELS", choice)
    params = prepare([torch.zeros(3), torch.zeros(2, 3, 4, 5)])
    other = ANOTHER.clone().half() if name == "low_precision_copies" else ANOTHER.clone()
    first = torch.zeros(3, dtype=other.dtype)
    lists = {"momentum_buffers": None, name: prepare([first, other])}
    with pytest.raises(ValueError, match=rf"{name}\[1\]: expected strides .*of params\[1\]"):
        masked_sgd_(params, [torch.zeros(3), torch.zeros(2, 3, 4, 5)], **lists, lr=0.1)


def test_decays_per_tensor_cannot_be_sent_in_a_capture(triton_kernels, monkeypatch):
    params = [torch.ones(1), torch.ones(1)]
    lists = (TensorList(params), TensorList([torch.zeros(1), torch.zeros(1)]), None)
    masked_sgd_(*lists, lr=1.0)
    monkeypatch.setattr(numbers, "is_capturing", lambda device: True)
    masked_sgd_(*lists, lr=1.0, weight_decay=[0.5, 0.5])
    masked_sgd_(*lists, lr=1.0, weight_decay=torch.tensor([0.5, 0.5]))
    assert [float(param) for param in params] == [0.25, 0.25]
    with pytest.raises(RuntimeError, match=r"weight_decay: .*Pass a float32 tensor \[2\] on cpu"):
        masked_sgd_(*lists, lr=1.0, weight_decay=[0.1, 0.5])


def test_averages_without_a_coin_make_nothing_on_another_device(monkeypatch):
    """A copy from the host cannot be captured in a CUDA graph."""
    places, ones = [], torch.ones

    def noted(*args, **options):
        places.append(options.get("device"))
        return ones(*args, **options)

    monkeypatch.setattr(torch, "ones", noted)
    params, grads, averages = ([torch.zeros(2, device="meta")] for _ in range(3))
    masked_sgd_ref(params, grads, None, lr=0.1, averages=averages)
    assert places == [torch.device("meta")]


WRONG = {
    "words": ({"nesterov": "no"}, TypeError, "nesterov: expected True or False"),
    "a list of momentum": ({"momentum": [0.9]}, TypeError, "momentum: expected a number"),
    "a coin alone": (
        {"moved": torch.tensor(True)},
        ValueError,
        "averages: .* with moved, got None",
    ),
    "decay alone": ({"decay": 2}, ValueError, r"decay: expected a number in \[0, 1\], got 2"),
    "wide thresholds": (
        {"scores": [torch.ones(2)], "thresholds": torch.ones(1).double()},
        TypeError,
        "thresholds: expected torch.float32, got torch.float64",
    ),
    "half weights": ({"params": [torch.ones(2).half()]}, TypeError, r"params\[0\]: .*master"),
    "integer gradients": ({"grads": [torch.ones(2).long()]}, TypeError, r"grads\[0\]: expected a"),
    "no buffers": ({"momentum": 0.9}, ValueError, "momentum_buffers: expected one per tensor"),
    "negative lr": ({"lr": -1.0}, ValueError, "lr: expected a number"),
    "negative decay": ({"weight_decay": -1.0}, ValueError, "weight_decay: "),
    "too many decays": ({"weight_decay": [0.1, 0.1]}, ValueError, "weight_decay: expected one"),
    "short decay": (
        {"weight_decay": torch.ones(3)},
        ValueError,
        "weight_decay: expected a float32",
    ),
    "scores alone": ({"scores": [torch.ones(2)]}, ValueError, "scores and thresholds"),
    "thresholds": (
        {"scores": [torch.ones(2)], "thresholds": torch.ones(())},
        ValueError,
        "thresholds: expected one number per tensor",
    ),
    "score shape": (
        {"scores": [torch.ones(3)], "thresholds": torch.ones(1)},
        ValueError,
        r"scores\[0\]: expected shape \[2\]",
    ),
    "conserve": ({"conserve": "none"}, ValueError, "conserve: expected one of gradient, weight"),
    "flag": ({"skip": torch.tensor(1)}, ValueError, "skip: expected a 0-d bool tensor"),
    "float copies": ({"low_precision_copies": [torch.ones(2)]}, TypeError, "low_precision_copies"),
    "average": ({"averages": [torch.ones(2).double()]}, TypeError, r"averages\[0\]: "),
    "gradient shape": ({"grads": [torch.ones(3)]}, ValueError, r"grads\[0\]: expected shape \[2\]"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_is_refused(name):
    arguments, error, message = WRONG[name]
    lists = {"params": [torch.ones(2)], "grads": [torch.ones(2)], "momentum_buffers": None}
    with pytest.raises(error, match=message):
        masked_sgd_(**(lists | {"lr": 0.1} | arguments))
