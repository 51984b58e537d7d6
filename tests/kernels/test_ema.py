"""The stochastic momentum update: values, the coin's statistics, integer tensors."""

from __future__ import annotations

import pytest
import torch

from cure_fast.kernels import ema_update_


def test_a_move_is_the_weighted_mean():
    average, param = [torch.tensor([1.0, 2.0])], [torch.tensor([3.0, -2.0])]
    moved = ema_update_(average, param, decay=0.75)
    assert bool(moved)
    torch.testing.assert_close(average[0], torch.tensor([1.5, 1.0]))
    assert torch.equal(param[0], torch.tensor([3.0, -2.0]))


def test_rate_zero_moves_nothing():
    average = [torch.ones(3), torch.tensor(4)]
    moved = ema_update_(average, [torch.zeros(3), torch.tensor(9)], decay=0.5, rate=0)
    assert not bool(moved) and torch.equal(average[0], torch.ones(3)) and average[1] == 4


def test_integers_are_copied_with_the_move():
    average = [torch.tensor(4)]
    ema_update_(average, [torch.tensor(9)], decay=0.999)
    assert average[0] == 9 and average[0].dtype == torch.int64


def test_one_coin_moves_all_or_nothing_at_the_given_rate():
    generator = torch.Generator().manual_seed(7)
    moves = 0
    for _ in range(2000):
        average = [torch.zeros(2), torch.zeros(3)]
        moved = ema_update_(
            average, [torch.ones(2), torch.ones(3)], decay=0.5, rate=0.2, generator=generator
        )
        values = {float(v) for tensor in average for v in tensor}
        assert values == ({0.5} if moved else {0.0})
        moves += bool(moved)
    # Binomial(2000, 0.2): mean 400, deviation 17.9.
    assert 400 - 5 * 17.9 < moves < 400 + 5 * 17.9


@pytest.mark.parametrize(("decay", "rate"), [(1.1, 1), (-0.1, 1), (0.5, 2), (0.5, float("nan"))])
def test_numbers_out_of_range_are_refused(decay, rate):
    with pytest.raises(ValueError, match="decay and rate"):
        ema_update_([torch.ones(1)], [torch.ones(1)], decay=decay, rate=rate)


def test_lists_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="shapes"):
        ema_update_([torch.ones(1)], [torch.ones(2)], decay=0.5)
