"""The copy on a condition: all or nothing, every dtype bit for bit, kernel and reference."""

from __future__ import annotations

import pytest
import torch

from cure_fast.kernels import TensorList, copy_where_, ema
from cure_fast.kernels.device.launching import DTYPES, Launch
from cure_fast.kernels.ema import copy_where_ref

BOTH = pytest.mark.parametrize("choice", ["triton", "reference"])
# Of one chunk and more, of none, and a scalar such as BatchNorm's count of batches.
SHAPES = ((5, 3), (4096,), (4097,), (0,), ())
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def tensors(dtype, seed):
    """Return all kinds of values of a dtype: bits at random, also of NaN and infinities."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for shape in SHAPES:
        if dtype == torch.bool:
            found.append(torch.randint(0, 2, shape, generator=generator).bool())
        else:
            shape = (*shape, dtype.itemsize)
            raw = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
            found.append(raw.view(dtype)[..., 0].contiguous())
    return found


def bits(tensor):
    return tensor.view(BITS[tensor.dtype.itemsize])


def same_bits(found, wanted):
    return all(torch.equal(bits(a), bits(b)) for a, b in zip(found, wanted, strict=True))


@BOTH
@pytest.mark.parametrize("prepare", [list, TensorList])
@pytest.mark.parametrize("condition", [False, True])
@pytest.mark.parametrize("dtype", ema.DTYPES, ids=str)
def test_it_copies_all_bits_or_none(choice, prepare, condition, dtype, monkeypatch):
    monkeypatch.setenv("CURE_FAST_KERNELS", choice)
    targets, sources = tensors(dtype, 1), tensors(dtype, 2)
    wanted = [tensor.clone() for tensor in (sources if condition else targets)]
    assert not same_bits(targets, sources)
    kept = [tensor.clone() for tensor in sources]
    copy_where_(prepare(targets), prepare(sources), condition=torch.tensor(condition))
    assert same_bits(targets, wanted)
    assert same_bits(sources, kept)


@BOTH
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_sources_that_are_not_finite_leave_no_trace(choice, value, monkeypatch):
    """A product with the condition would: 0 * NaN is NaN."""
    monkeypatch.setenv("CURE_FAST_KERNELS", choice)
    targets, sources = [torch.ones(3), torch.tensor(4)], [torch.full((3,), value), torch.tensor(9)]
    copy_where_(targets, sources, condition=torch.tensor(False))
    assert targets[0].tolist() == [1, 1, 1] and targets[1] == 4
    copy_where_(targets, sources, condition=torch.tensor(True))
    assert same_bits(targets, sources)


@BOTH
def test_large_counts_keep_every_digit(choice, monkeypatch):
    """As floating numbers 2**53 + 1 would lose its last."""
    monkeypatch.setenv("CURE_FAST_KERNELS", choice)
    targets, sources = [torch.tensor(0)], [torch.tensor(2**53 + 1)]
    copy_where_(targets, sources, condition=torch.tensor(True))
    assert targets[0] == 2**53 + 1


@BOTH
def test_dtypes_may_be_mixed_and_memory_orders_differ(choice, monkeypatch):
    monkeypatch.setenv("CURE_FAST_KERNELS", choice)
    weight = torch.randn(2, 3, 4, 5)
    targets = [torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.tensor(1)]
    sources = [weight, torch.tensor(7)]
    stride = targets[0].stride()
    copy_where_(targets, sources, condition=torch.tensor(True))
    assert torch.equal(targets[0], weight) and targets[0].stride() == stride and targets[1] == 7


def test_what_lies_around_the_targets_is_not_touched(triton_kernels):
    memory = torch.full((4099,), 7.0)
    copy_where_([memory[1:-1]], [torch.zeros(4097)], condition=torch.tensor(True))
    assert memory[0] == memory[-1] == 7 and not memory[1:-1].any()


def test_a_condition_that_is_false_touches_no_memory(triton_kernels, monkeypatch):
    """The targets' addresses are those of nothing: to read or write there would crash."""
    targets, sources = TensorList([torch.zeros(5000)]), TensorList([torch.ones(5000)])
    launches = []
    run = Launch.run
    monkeypatch.setattr(Launch, "run", lambda launch: (launches.append(launch), run(launch)))
    for table in (targets, sources):
        table.addresses.zero_()
    copy_where_(targets, sources, condition=torch.tensor(False))
    assert len(launches) == 1 and not targets[0].any()


@BOTH
def test_empty_lists(choice, monkeypatch):
    monkeypatch.setenv("CURE_FAST_KERNELS", choice)
    assert copy_where_([], [], condition=torch.tensor(True)) is None


def test_parameters_that_require_gradients_are_copied_too():
    target = torch.nn.Parameter(torch.zeros(2))
    copy_where_ref([target], [torch.ones(2)], condition=torch.tensor(True))
    assert target.tolist() == [1, 1] and target.requires_grad


def test_kernels_know_the_dtypes_that_the_operations_let_through():
    assert set(ema.DTYPES) == set(DTYPES)


ONE, TRUE = torch.ones(1), torch.tensor(True)


@BOTH
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"sources": [ONE.half()]}, TypeError, r"sources\[0\]: expected torch.float32, that of"),
        ({"sources": [torch.ones(2)]}, ValueError, r"sources\[0\]: expected shape \[1\]"),
        ({"sources": []}, ValueError, "sources: expected 1 tensors"),
        ({"sources": ONE}, TypeError, "sources: expected a list"),
        ({"sources": [ONE.to("meta")]}, ValueError, "meta"),
        (
            {"targets": [ONE.cfloat()], "sources": [ONE.cfloat()]},
            TypeError,
            r"targets\[0\]: expected one of .*got torch.complex64",
        ),
        ({"condition": None}, TypeError, "condition: expected a tensor, got NoneType"),
        ({"condition": True}, TypeError, "condition: expected a tensor, got bool"),
        ({"condition": torch.tensor(1.0)}, ValueError, "condition: expected a 0-d bool tensor"),
        ({"condition": TRUE[None]}, ValueError, "condition: expected a 0-d bool tensor"),
        ({"condition": TRUE.to("meta")}, ValueError, "condition: .*on meta"),
    ],
)
def test_bad_input_is_refused(choice, arguments, error, message, monkeypatch):
    monkeypatch.setenv("CURE_FAST_KERNELS", choice)
    good = {"targets": [ONE.clone()], "sources": [ONE], "condition": TRUE}
    with pytest.raises(error, match=message):
        copy_where_(**(good | arguments))
