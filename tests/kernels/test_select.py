"""The selection kernels, bit for bit against sorting the scores that they form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cure_fast.kernels import TensorList, mask_below_, rgp_mask_, rgp_select, rgp_threshold
from cure_fast.kernels.device import select
from cure_fast.kernels.rgp import rgp_mask_ref, rgp_select_ref, rgp_threshold_ref

PERCENTILES = (0, 0.5, 20, 30, 50, 99.9, 100)
SCORES = ("abs", "signed", "abs_of_sum")
NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Run the kernels, a small tensor in one program: the interpreter takes 20 ms for each."""
    monkeypatch.setenv("CURE_FAST_KERNELS", "triton")
    monkeypatch.setattr(select, "CHUNK", 2048)
    monkeypatch.setattr(select, "BLOCK", 2048)


def assert_exact(nat, adv, percentile, *, alpha=0.3, score="abs"):
    """Compare selection, percentile and mask with sorting the kernel's own scores."""
    arguments = {"percentile": percentile, "alpha": alpha, "score": score}
    found = rgp_select(nat, adv, **arguments)
    values = rgp_threshold(nat, adv, **arguments)
    grads = [torch.ones_like(g) for g in nat]
    kept = rgp_mask_(grads, nat, adv, **arguments)
    assert torch.equal(kept, found.kept)
    for i, expected in enumerate(rgp_select_ref(nat, adv, **arguments).scores):
        p = percentile[i] if isinstance(percentile, list) else percentile
        scores = found.scores[i]
        if expected is None:
            assert p == 0 and scores is None and kept[i] == 1 and grads[i].all()
            assert found.thresholds[i] == -INF
            continue
        assert torch.equal(scores, expected) or expected.isnan().any()
        ordered = np.sort(scores.numpy(), axis=None)  # NaN last
        rank = p / 100 * (len(ordered) - 1)
        at = ordered[math.ceil(rank)]
        np.testing.assert_array_equal(found.thresholds[i].numpy(), at)
        below = scores.numpy() < at if at == at else ~np.isnan(scores.numpy())
        np.testing.assert_array_equal((grads[i] == 0).numpy(), below)
        assert kept[i] == np.float32((below.size - below.sum()) / below.size)
        assert found.nonfinite[i] == (~np.isfinite(scores.numpy())).sum()
    reference = rgp_threshold_ref(nat, adv, **arguments)
    np.testing.assert_array_equal(values.numpy(), reference.numpy())


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("score", ["abs", "signed"])
def test_random_scores(score):
    """Each percentile of many scores and of two; one, three and 63 at an end and between."""
    cases = [(count, p) for p in PERCENTILES for count in (1271, 2)]
    cases += [(count, p) for p in (0.5, 100) for count in (1, 3, 63)]
    nat = [randn(count, seed=count) for count, _ in cases]
    adv = [randn(count, seed=-count) for count, _ in cases]
    assert_exact(nat, adv, [p for _, p in cases], score=score)


@pytest.mark.parametrize("percentile", [0, 30])
def test_one_percentile_is_that_of_all(percentile):
    sizes = (5, 80)
    assert_exact([randn(n) for n in sizes], [randn(n, seed=1) for n in sizes], percentile)


def special(name, count=1271):
    """Return gradients whose scores have one awkward property."""
    zero, noise = torch.zeros(count), randn(count)
    return {
        "all equal": (torch.full((count,), 0.7), zero),
        "all zero": (zero, zero),
        "both zeros": (torch.where(noise > 0, 0.0, -0.0), torch.where(noise > 1, 0.0, -0.0)),
        "heavy ties": (noise.round(), (noise * 2).round()),
        "two values": (torch.where(noise > 0.2, 1.0, 1.0000001), zero),
        "mostly zero": (torch.where(noise > 2, noise, 0.0), zero),
        "denormals": (noise * 1e-42, noise.flip(0) * 1e-43),
        "every magnitude": (torch.exp2(noise * 40), torch.exp2(noise.flip(0) * 40)),
        "opposite": (noise, -noise),
        "infinite": (torch.where(noise > 1, INF, noise), zero),
        "nan": (torch.where(noise > 1, NAN, noise), zero),
        "mostly nan": (torch.where(noise > -1, NAN, noise), zero),
        "nan and infinite": (torch.where(noise > 1, INF, noise), torch.where(noise < 0, -INF, 0)),
    }[name]


SPECIAL = (
    *("all equal", "all zero", "both zeros", "heavy ties", "two values", "mostly zero"),
    *("denormals", "every magnitude", "opposite"),
    *("infinite", "nan", "mostly nan", "nan and infinite"),
)


# Without a sign a score's bits are already in order: what is special is its ends and its ties.
UNSIGNED = ("heavy ties", "every magnitude", "denormals", "nan and infinite")


@pytest.mark.parametrize(
    ("name", "score"),
    [(name, "signed") for name in SPECIAL]
    + [
        pytest.param(name, "abs", marks=() if name in UNSIGNED else pytest.mark.slow)
        for name in SPECIAL
    ],
)
def test_awkward_scores(name, score):
    nat, adv = special(name)
    # An exact rank (30 % of 1270 intervals), and one between two.
    assert_exact([nat] * 2, [adv] * 2, [30, 50.02], alpha=0.5, score=score)


@pytest.mark.parametrize("score", SCORES)
def test_tensors_of_several_programs_and_passes(score, monkeypatch):
    monkeypatch.setattr(select, "CHUNK", 256)
    monkeypatch.setattr(select, "BLOCK", 128)
    nat, adv = special("heavy ties", 700)
    assert_exact([randn(512), nat], [randn(512, seed=1), adv], 30, score=score)


# The largest layer of a ResNet-18, and more than float32 counts one by one.
@pytest.mark.parametrize("count", [pytest.param(4_718_592, marks=pytest.mark.slow), 2**24 + 5])
def test_large_tensors(count, monkeypatch):
    # The largest block that Triton allows, or the interpreter would take minutes.
    monkeypatch.setattr(select, "CHUNK", 2**20)
    monkeypatch.setattr(select, "BLOCK", 2**20)
    nat, adv = randn(count), randn(count, seed=1)
    found = rgp_select([nat], [adv], percentile=30, alpha=0.3)
    assert torch.equal(found.scores[0], 0.3 * nat.abs() + 0.7 * adv.abs())
    rank = math.ceil(30 / 100 * (count - 1))
    assert found.thresholds[0] == found.scores[0].kthvalue(rank + 1).values
    assert found.kept[0] == np.float32((count - rank) / count)


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float16", "bfloat16")])
def test_gradients_of_mixed_dtypes(dtypes):
    nat = [randn(70).to(getattr(torch, dtypes[0])), randn(1500), randn(80).half()]
    adv = [randn(70, seed=1).to(getattr(torch, dtypes[1])), randn(1500, seed=2), randn(80, seed=3)]
    assert_exact(nat, adv, 30)


@settings(max_examples=10)
@given(
    values=st.lists(st.floats(width=32), min_size=1, max_size=30),
    percentile=st.floats(0.001, 100),
    alpha=st.floats(0, 1),
    score=st.sampled_from(SCORES),
)
def test_any_values(values, percentile, alpha, score):
    nat = torch.tensor(values, dtype=torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CURE_FAST_KERNELS", "triton")
        assert_exact([nat], [nat.flip(0)], percentile, alpha=alpha, score=score)


def test_empty_lists_and_exempt_tensors():
    assert rgp_select([], [], percentile=30, alpha=0.1).thresholds.shape == (0,)
    assert rgp_threshold([], [], percentile=30, alpha=0.1).shape == (0,)
    assert rgp_mask_([], [], [], percentile=30, alpha=0.1).shape == (0,)
    assert_exact([randn(9), randn(20)], [randn(9), randn(20)], [0, 40])


def test_memory_orders_that_differ_are_matched_element_by_element():
    nat, adv, grad = (randn(4, 3, 3, 3, seed=i) for i in range(3))
    expected = grad.clone()
    rgp_mask_ref([expected], [nat], [adv], percentile=30, alpha=0.1)
    last = adv.to(memory_format=torch.channels_last)
    rgp_mask_([grad], [nat.to(memory_format=torch.channels_last)], [last], percentile=30, alpha=0.1)
    assert torch.equal(grad, expected)


def test_prepared_lists_of_different_memory_order_are_refused_by_name():
    nat = TensorList([randn(4, 3, 3, 3)])
    last = [randn(4, 3, 3, 3).to(memory_format=torch.channels_last)]
    with pytest.raises(ValueError, match=r"^adv_grads\[0\]: expected strides"):
        rgp_select(nat, TensorList(last), percentile=30, alpha=0.1)
    with pytest.raises(ValueError, match=r"^conv\.weight: expected strides"):
        rgp_select(nat, TensorList(last, names=["conv.weight"]), percentile=30, alpha=0.1)
    assert rgp_select(nat, last, percentile=30, alpha=0.1).scores[0].is_contiguous()


def test_unaligned_views_are_not_read_from_their_neighbours():
    storage = randn(2050)
    nat, adv = storage[1:1026], storage[1025:]
    assert_exact([nat], [adv], 30)
    grad = torch.ones(1026)
    rgp_mask_([grad[1:]], [nat], [adv], percentile=30, alpha=0.1)
    assert grad[0] == 1 and (grad == 0).sum() == 308  # ceil(0.3 * 1024) scores lie below


def test_masks_are_the_same_bits_call_after_call():
    nat, adv = special("heavy ties", 3000)
    runs = [rgp_select([nat], [adv], percentile=30, alpha=0.1) for _ in range(3)]
    assert all(torch.equal(r.thresholds, runs[0].thresholds) for r in runs)
    assert all(torch.equal(r.kept, runs[0].kept) for r in runs)


def test_a_mask_by_scores_leaves_tensors_without_scores():
    first, second = torch.ones(5).half(), torch.ones(5)
    mask_below_([first, second], [torch.arange(5.0), None], torch.tensor([2.5, 9.0]))
    assert first.tolist() == [0, 0, 0, 1, 1] and second.tolist() == [1] * 5
