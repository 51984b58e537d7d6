"""What every operation that works in place has in common: versions, gaps, memory given twice."""

from __future__ import annotations

import pytest
import torch

from cure_fast import kernels

BOTH = pytest.mark.parametrize("choice", ["triton", "reference"])


def pair():
    return [torch.randn(4, 3), torch.randn(5)]


def update(arguments):
    kernels.masked_sgd_(**arguments, lr=0.1, momentum=0.9)


def step(norm):
    def call(arguments):
        images = {name: tensors[0] for name, tensors in arguments.items()}
        kernels.pgd_step_(**images, step_size=0.1, eps=0.2, norm=norm)

    return call


def rgp(arguments):
    named = [("a", torch.randn(4, 3)), ("b", torch.randn(5))]
    kernels.RGP(named, percentile=30, alpha=0.1).mask_(**arguments)


# Of each operation: what it changes, what it reads, and the call.
OPERATIONS = {
    "masked_sgd_": (
        {
            "params": pair,
            "momentum_buffers": pair,
            "averages": pair,
            "low_precision_copies": lambda: [tensor.half() for tensor in pair()],
        },
        {"grads": pair},
        update,
    ),
    "ema_update_": (
        {"averages": pair},
        {"params": pair},
        lambda a: kernels.ema_update_(**a, decay=0.9),
    ),
    "copy_where_": (
        {"targets": pair},
        {"sources": pair},
        lambda a: kernels.copy_where_(**a, condition=torch.tensor(True)),
    ),
    "mask_below_": (
        {"tensors": pair},
        {"scores": pair},
        lambda a: kernels.mask_below_(**a, thresholds=torch.zeros(2)),
    ),
    "rgp_mask_": (
        {"grads": pair},
        {"nat_grads": pair, "adv_grads": pair},
        lambda a: kernels.rgp_mask_(**a, percentile=30, alpha=0.1),
    ),
    "RGP.mask_": ({"grads": pair}, {"nat_grads": pair, "adv_grads": pair}, rgp),
    **{
        f"pgd_step_ {norm}": (
            {"x_adv": lambda: [torch.rand(4, 3)]},
            {"x": lambda: [torch.rand(4, 3)], "grad": lambda: [torch.rand(4, 3)]},
            step(norm),
        )
        for norm in ("linf", "l2")
    },
}


def made(makers):
    return {name: make() for name, make in makers.items()}


def test_every_operation_is_here():
    in_place = {name for name in kernels.__all__ if name.endswith("_")}
    assert {name.split()[0] for name in OPERATIONS} - {"RGP.mask_"} == in_place


@BOTH
@pytest.mark.parametrize("name", OPERATIONS)
def test_what_is_changed_counts_as_changed_and_nothing_else(name, choice, monkeypatch):
    """Or a backward pass would use the new value and return a wrong gradient."""
    monkeypatch.setenv("CURE_FAST_KERNELS", choice)
    changes, reads, call = OPERATIONS[name]
    changed, read = made(changes), made(reads)
    before = {id(t): t._version for tensors in (changed | read).values() for t in tensors}
    call(changed | read)
    for argument, tensors in changed.items():
        assert all(t._version > before[id(t)] for t in tensors), argument
    for argument, tensors in read.items():
        assert all(t._version == before[id(t)] for t in tensors), argument


@pytest.mark.parametrize("name", OPERATIONS)
def test_tensors_of_inference_mode_are_changed_too(name, triton_kernels):
    changes, reads, call = OPERATIONS[name]
    with torch.inference_mode():
        changed = made(changes)
        before = [t.clone() for tensors in changed.values() for t in tensors]
        call(changed | made(reads))
        after = [t for tensors in changed.values() for t in tensors]
    assert not all(map(torch.equal, before, after))


APART = [
    ("masked_sgd_", "averages", "params"),
    ("masked_sgd_", "momentum_buffers", "params"),
    ("masked_sgd_", "averages", "momentum_buffers"),
    ("masked_sgd_", "grads", "params"),
    ("ema_update_", "params", "averages"),
    ("copy_where_", "sources", "targets"),
]


@BOTH
@pytest.mark.parametrize(("name", "later", "first"), APART)
def test_memory_given_twice_is_refused(name, later, first, choice, monkeypatch):
    """The old value would be lost, or several programs write one place."""
    monkeypatch.setenv("CURE_FAST_KERNELS", choice)
    changes, reads, call = OPERATIONS[name]
    arguments = made(changes) | made(reads)
    arguments[later][1] = arguments[first][1].detach()
    before = arguments[first][1].clone()
    with pytest.raises(ValueError, match=rf"{later}\[1\]: .* got that of {first}\[1\].*clone\(\)"):
        call(arguments)
    assert torch.equal(arguments[first][1], before)


@BOTH
def test_a_weight_given_twice_is_refused(choice, monkeypatch):
    monkeypatch.setenv("CURE_FAST_KERNELS", choice)
    weight = torch.ones(3)
    with pytest.raises(ValueError, match=r"params\[1\]: .* got that of params\[0\]"):
        kernels.masked_sgd_([weight, weight], [torch.ones(3), torch.ones(3)], None, lr=0.1)


def test_tensors_without_elements_may_be_given_twice():
    empty, weight = torch.ones(0), torch.ones(1)
    kernels.masked_sgd_([empty, weight, empty], [empty, torch.ones(1), empty], None, lr=0.5)
    assert weight == 0.5


IN_PLACE_LISTS = [
    (name, argument)
    for name, (changes, _, _) in OPERATIONS.items()
    if "pgd" not in name
    for argument in changes
]


@BOTH
@pytest.mark.parametrize(("name", "argument"), IN_PLACE_LISTS)
def test_gaps_in_what_is_changed_are_refused_by_name(name, argument, choice, monkeypatch):
    monkeypatch.setenv("CURE_FAST_KERNELS", choice)
    changes, reads, call = OPERATIONS[name]
    arguments = made(changes) | made(reads)
    arguments[argument][0] = torch.stack([arguments[argument][0]] * 2, dim=-1)[..., 0]
    with pytest.raises(ValueError, match=rf"^{argument}\b"):
        call(arguments)


READ_LISTS = [
    (name, argument)
    for name, (_, reads, _) in OPERATIONS.items()
    if "pgd" not in name and name != "RGP.mask_"
    for argument in reads
]


@pytest.mark.parametrize("turned", [False, True], ids=["gaps", "another order"])
@pytest.mark.parametrize(("name", "argument"), READ_LISTS)
def test_what_is_read_may_lie_in_any_way(name, argument, turned, triton_kernels):
    """The same values come out as of tensors that lie alike."""
    changes, reads, call = OPERATIONS[name]
    arguments = made(changes) | made(reads)
    alike = {key: [t.clone() for t in tensors] for key, tensors in arguments.items()}
    tensor = arguments[argument][0]
    other = tensor.T.contiguous().T if turned else torch.stack([tensor] * 2, dim=-1)[..., 0]
    assert other.stride() != tensor.stride()
    arguments[argument][0] = other
    call(arguments)
    call(alike)
    for key in changes:
        assert all(map(torch.equal, arguments[key], alike[key])), key
