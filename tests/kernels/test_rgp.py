"""The selection ops against NumPy: scores, percentile, mask, ties, extremes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cure_fast.kernels import (
    TensorList,
    mask_below_,
    rgp_mask_,
    rgp_score,
    rgp_select,
    rgp_threshold,
)

PERCENTILES = (0, 0.5, 20, 30, 50, 99.9, 100)
SCORES = ("abs", "signed", "abs_of_sum")


def numpy_score(nat, adv, alpha, score):
    """Scores in float32, in the same order of operations as the definition."""
    nat, adv = nat.astype(np.float32), adv.astype(np.float32)
    weight, rest = np.float32(alpha), np.float32(1 - alpha)
    if score == "abs":
        return weight * np.abs(nat) + rest * np.abs(adv)
    total = weight * nat + rest * adv
    return np.abs(total) if score == "abs_of_sum" else total


def numpy_keep(scores, percentile):
    """Entries at or above the percentile; float64, lest interpolation round onto a score."""
    scores = scores.astype(np.float64)
    return ~(scores < np.percentile(scores, percentile, method="linear"))


def tensors(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("percentile", PERCENTILES)
@pytest.mark.parametrize("count", [1, 2, 3, 63, 1271])
@pytest.mark.parametrize("score", SCORES)
def test_mask_is_numpys(count, percentile, score):
    nat, adv, grad = tensors((count,), (count,), (count,), seed=count)
    before = grad.clone()
    kept = rgp_mask_([grad], [nat], [adv], percentile=percentile, alpha=0.3, score=score)
    keep = numpy_keep(numpy_score(nat.numpy(), adv.numpy(), 0.3, score), percentile)
    assert np.array_equal(grad.numpy(), np.where(keep, before.numpy(), 0))
    assert kept.dtype == torch.float32 and kept.shape == (1,)
    assert kept.item() == pytest.approx(keep.mean(), abs=1e-6)


@pytest.mark.parametrize("percentile", PERCENTILES)
def test_threshold_is_numpys(percentile):
    nat, adv = tensors((501,), (501,))
    threshold = rgp_threshold([nat], [adv], percentile=percentile, alpha=0.1)
    scores = numpy_score(nat.numpy(), adv.numpy(), 0.1, "abs").astype(np.float64)
    assert threshold.item() == pytest.approx(np.percentile(scores, percentile), rel=1e-6)


@given(
    values=st.lists(st.integers(-3, 3), min_size=1, max_size=40),
    # Thousandths: far finer than a use, far coarser than NumPy's rounding of the interpolation.
    percentile=st.integers(0, 100_000).map(lambda thousandths: thousandths / 1000),
    score=st.sampled_from(SCORES),
)
def test_ties_are_kept_at_the_threshold(values, percentile, score):
    nat = torch.tensor(values, dtype=torch.float32)
    adv = nat.flip(0)
    grad = torch.ones_like(nat)
    rgp_mask_([grad], [nat], [adv], percentile=percentile, alpha=0.5, score=score)
    scores = numpy_score(nat.numpy(), adv.numpy(), 0.5, score)
    assert np.array_equal(grad.numpy() == 1, numpy_keep(scores, percentile))


def test_density_is_the_percentile_without_ties():
    nat, adv, grad = tensors((10_001,), (10_001,), (10_001,))
    kept = rgp_mask_([grad], [nat], [adv], percentile=30, alpha=0.1)
    # 10,000 intervals: the 30th percentile is the order statistic 3,000, below it lie 3,000.
    assert int((grad == 0).sum()) == 3000
    assert kept.item() == pytest.approx(7001 / 10_001)


def test_limits_of_alpha_take_one_gradient_alone():
    nat, adv = tensors((200,), (200,))
    ones = [torch.ones(200), torch.ones(200)]
    rgp_mask_(ones[:1], [nat], [adv], percentile=40, alpha=1)
    rgp_mask_(ones[1:], [nat], [adv], percentile=40, alpha=0)
    assert np.array_equal(ones[0].numpy() == 1, numpy_keep(nat.abs().numpy(), 40))
    assert np.array_equal(ones[1].numpy() == 1, numpy_keep(adv.abs().numpy(), 40))


def test_signed_and_magnitude_masks_are_disjoint_for_symmetric_gradients():
    nat, adv = tensors((5000,), (5000,))
    masked = {}
    for score in ("abs", "signed"):
        ones = torch.ones(5000)
        rgp_mask_([ones], [nat], [adv], percentile=30, alpha=0.1, score=score)
        masked[score] = ones == 0
    assert masked["abs"].any() and masked["signed"].any()
    assert not (masked["abs"] & masked["signed"]).any()


def test_each_tensor_has_its_own_percentile_and_alpha():
    nat = tensors((50,), (50,), seed=1)
    adv = tensors((50,), (50,), seed=2)
    grads = [torch.ones(50), torch.ones(50)]
    kept = rgp_mask_(grads, nat, adv, percentile=[0, 60], alpha=[0.5, 0.9])
    assert kept[0] == 1 and torch.equal(grads[0], torch.ones(50))
    keep = numpy_keep(numpy_score(nat[1].numpy(), adv[1].numpy(), 0.9, "abs"), 60)
    assert np.array_equal(grads[1].numpy() == 1, keep)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_scores_are_float32_in_every_dtype(dtype):
    nat, adv = (t.to(dtype) for t in tensors((4, 3), (4, 3)))
    assert rgp_score(nat, adv, alpha=0.2).dtype == torch.float32


def test_channels_last_gradients_pair_the_same_weights():
    nat, adv, grad = tensors((6, 4, 3, 3), (6, 4, 3, 3), (6, 4, 3, 3))
    plain = grad.clone()
    rgp_mask_([plain], [nat], [adv], percentile=30, alpha=0.4)
    mixed = grad.clone().contiguous(memory_format=torch.channels_last)
    rgp_mask_(
        [mixed],
        [nat.contiguous(memory_format=torch.channels_last)],
        [adv],
        percentile=30,
        alpha=0.4,
    )
    assert torch.equal(plain, mixed)


def test_all_zero_scores_keep_every_weight():
    grad = torch.ones(9)
    kept = rgp_mask_([grad], [torch.zeros(9)], [torch.zeros(9)], percentile=50, alpha=0.5)
    assert kept.item() == 1 and torch.equal(grad, torch.ones(9))


def test_an_empty_list_gives_an_empty_tensor():
    assert rgp_threshold([], [], percentile=30, alpha=0.5).shape == (0,)
    assert rgp_mask_([], [], [], percentile=30, alpha=0.5).shape == (0,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"percentile": 101}, "percentile"),
        ({"percentile": -1}, "percentile"),
        ({"percentile": float("nan")}, "percentile"),
        ({"alpha": 1.5}, "alpha"),
        ({"alpha": [0.1, 0.2]}, "alpha"),
        ({"score": "norm"}, "score"),
    ],
)
def test_bad_numbers_are_refused_by_name(changes, message):
    arguments = {"percentile": 30, "alpha": 0.5} | changes
    with pytest.raises(ValueError, match=message):
        rgp_threshold([torch.ones(3)], [torch.ones(3)], **arguments)


def test_tensors_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match=r"adv_grads\[0\]: expected shape \[3\]"):
        rgp_threshold([torch.ones(3)], [torch.ones(4)], percentile=30, alpha=0.5)
    with pytest.raises(ValueError, match="grads"):
        rgp_mask_([torch.ones(4)], [torch.ones(3)], [torch.ones(3)], percentile=30, alpha=0.5)
    with pytest.raises(ValueError, match=r"nat_grads\[0\]: expected 1 to"):
        rgp_threshold([torch.ones(0)], [torch.ones(0)], percentile=30, alpha=0.5)


@pytest.fixture(params=["triton", "reference"])
def either(request, monkeypatch):
    """Run the test with kernels in the interpreter, and with the reference."""
    monkeypatch.setenv("CURE_FAST_KERNELS", request.param)


def with_gaps(tensor):
    return torch.stack([tensor, torch.full_like(tensor, 9.0)], dim=-1)[..., 0]


LAYOUTS = {
    "gaps": with_gaps,
    "columns": lambda t: torch.cat([t, t + 1], dim=1)[:, : t.shape[1]],
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "reversed dimensions": lambda t: t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "expanded": lambda t: t[:, :1, :1, :1].expand(t.shape),
}


@pytest.mark.parametrize("nat_layout", sorted(LAYOUTS))
@pytest.mark.parametrize("adv_layout", ["gaps", "channels last", "expanded"])
def test_gradients_that_are_only_read_may_lie_anyhow(either, nat_layout, adv_layout):
    nat, adv, grad = tensors((6, 4, 3, 3), (6, 4, 3, 3), (6, 4, 3, 3))
    nat, adv = LAYOUTS[nat_layout](nat), LAYOUTS[adv_layout](adv)
    assert not nat.is_contiguous() and not adv.is_contiguous()
    keep = numpy_keep(numpy_score(nat.numpy(), adv.numpy(), 0.4, "abs"), 30)
    masked = grad.contiguous(memory_format=torch.channels_last).clone()
    rgp_mask_([masked], [nat], [adv], percentile=30, alpha=0.4)
    assert np.array_equal(masked.numpy(), np.where(keep, grad.numpy(), 0))
    found = rgp_select([nat], [adv], percentile=30, alpha=0.4)
    assert found.kept.item() == np.float32(keep.mean())
    threshold = rgp_threshold([nat], [adv], percentile=100, alpha=0.4).item()
    assert threshold == numpy_score(nat.numpy(), adv.numpy(), 0.4, "abs").max()
    by_scores = grad.clone()
    mask_below_([by_scores], [with_gaps(found.scores[0])], found.thresholds)
    assert torch.equal(by_scores, masked)


def test_what_is_changed_in_place_must_fill_its_memory(either):
    grads = [torch.ones(4), torch.ones(8)[::2]]
    others = [torch.ones(4), torch.ones(4)]
    with pytest.raises(ValueError, match=r"^grads\[1\]: expected a tensor whose elements fill"):
        rgp_mask_(grads, others, others, percentile=30, alpha=0.5)
    with pytest.raises(ValueError, match=r"^tensors\[1\]: expected a tensor whose elements fill"):
        mask_below_(grads, others, torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_mask_reads_scores_of_every_dtype(either, dtype):
    # 2.001 rounds to 2 in half precision: thresholds keep their bits.
    scores = torch.tensor([0, 1, 2, 3, float("nan"), float("inf"), -1, 2.5]).to(dtype)
    ones = [torch.ones(8), torch.ones(8).half()]
    mask_below_(ones, [scores, scores], torch.tensor([2.001, 0.5]))
    assert ones[0].tolist() == [0, 0, 0, 1, 1, 1, 0, 1]
    assert ones[1].tolist() == [0, 1, 1, 1, 1, 1, 0, 1]


def test_thresholds_may_be_a_column_of_a_matrix(either):
    thresholds = torch.tensor([[2.0, 9.0], [3.0, 9.0], [0.0, 9.0]])[:, 0]
    ones = [torch.ones(4) for _ in range(3)]
    mask_below_(ones, [torch.arange(4.0)] * 3, thresholds)
    assert [t.tolist() for t in ones] == [[0, 0, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]]


def test_a_mask_counts_as_a_change_for_autograd(either):
    changed, left = torch.ones(4), torch.ones(4)
    before = changed._version, left._version
    mask_below_([changed, left], [torch.arange(4.0), None], torch.tensor([2.0, 2.0]))
    assert changed._version > before[0] and left._version == before[1]


def test_gradients_with_a_graph_of_their_own_leave_none_behind(either):
    nat = torch.rand(20, requires_grad=True) * 2
    found = rgp_select([nat], [nat], percentile=30, alpha=0.5)
    threshold = rgp_threshold([nat], [nat], percentile=30, alpha=0.5)
    assert not any(t.requires_grad for t in (*found.scores, *found[1:], threshold))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda t: rgp_score(t, t, alpha=1.5), ValueError, r"alpha: expected a number in \[0, 1\]"),
        (lambda t: rgp_score(t, t[:1], alpha=0.5), ValueError, r"adv_grad: expected shape \[3\]"),
        (lambda t: rgp_score(t.int(), t, alpha=0.5), TypeError, "nat_grad: expected a floating"),
        (lambda t: rgp_score([t], t, alpha=0.5), TypeError, "nat_grad: expected a tensor, got lis"),
        (lambda t: rgp_score(t, t, alpha="1"), TypeError, "alpha: expected a number"),
        (
            lambda t: rgp_select([t], [t], percentile="30", alpha=0.5),
            TypeError,
            r"percentile: expected a number in \[0, 100\], got str",
        ),
        (
            lambda t: rgp_select([t], [t], percentile=np.array([1.0, 2.0]), alpha=0.5),
            TypeError,
            "percentile: expected a number in .* got ndarray",
        ),
        (
            lambda t: rgp_mask_([t] * 3, [t] * 2, [t] * 3, percentile=30, alpha=0.5),
            ValueError,
            "^nat_grads: expected 3 tensors, as many as grads, got 2",
        ),
        (
            lambda t: rgp_mask_([t] * 3, [t] * 3, [t] * 4, percentile=30, alpha=0.5),
            ValueError,
            "^adv_grads: expected 3 tensors, as many as grads, got 4",
        ),
        (
            lambda t: rgp_select((x for x in [t]), [t], percentile=30, alpha=0.5),
            TypeError,
            r"nat_grads: .*got generator\. Pass list\(\.\.\.\) of it",
        ),
        (
            lambda t: rgp_select([t], {"w": t}.values(), percentile=30, alpha=0.5),
            TypeError,
            r"adv_grads: .*got dict_values\. Pass list\(",
        ),
        (
            lambda t: rgp_select([t], t, percentile=30, alpha=0.5),
            TypeError,
            r"adv_grads: .*Pass \[tensor\]",
        ),
        (
            lambda t: rgp_select([t.to_sparse()], [t], percentile=30, alpha=0.5),
            TypeError,
            r"nat_grads\[0\]: expected a tensor that is not sparse.*to_dense",
        ),
        (
            lambda t: mask_below_([t], [t], torch.ones(1, dtype=torch.float64)),
            TypeError,
            "thresholds: expected torch.float32, got torch.float64",
        ),
        (lambda t: mask_below_([t], [t.int()], torch.ones(1)), TypeError, r"scores\[0\]: expected"),
        (lambda t: mask_below_([t], t, torch.ones(1)), TypeError, "scores: expected a list"),
    ],
)
def test_bad_arguments_are_refused_by_name(either, call, error, message):
    with pytest.raises(error, match=message):
        call(torch.ones(3))


@pytest.mark.parametrize(
    ("nat", "message"),
    [
        ([torch.ones(2), None], r"nat_grads\[1\]: expected a tensor, got NoneType"),
        ([torch.ones(2), torch.ones(4)], r"nat_grads\[1\]: expected shape \[3\]"),
        ([torch.ones(2).int(), torch.ones(3).int()], r"nat_grads\[0\]: expected a floating dtype"),
    ],
)
def test_prepared_lists_are_checked_too(either, nat, message):
    ones = TensorList([torch.ones(2), torch.ones(3)])
    with pytest.raises((TypeError, ValueError), match=message):
        rgp_mask_(ones, TensorList(nat), ones, percentile=30, alpha=0.5)
    with pytest.raises(ValueError, match=r"nat_grads\[0\]: expected 1 to"):
        empty = TensorList([torch.ones(0)])
        rgp_threshold(empty, empty, percentile=30, alpha=0.5)
