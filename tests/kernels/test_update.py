"""The fused update: torch.optim.SGD, masks, averages, copies; kernel against reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cure_fast.kernels import TensorList, masked_sgd_
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


WRONG = {
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
