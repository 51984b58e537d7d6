"""Learning-rate schedules at their corners."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cure_fast.config import OptimConfig
from cure_fast.training.schedules import lr_at


def test_multistep_drops_at_the_paper_epochs():
    optim = OptimConfig(lr=0.1, epochs=200)
    rates = [lr_at(optim, epoch / 200) for epoch in (0, 99, 100, 149, 150, 199)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_onecycle_rises_for_a_quarter_and_falls_to_zero():
    optim = OptimConfig(lr=0.4, schedule="onecycle")
    rates = [lr_at(optim, p) for p in (0.0, 0.125, 0.25, 0.625, 0.9999)]
    assert rates == pytest.approx([0.004, 0.2, 0.4, 0.2, 0.004], abs=1e-4)


def test_cosine_and_constant():
    assert lr_at(OptimConfig(lr=0.2, schedule="cosine"), 0.5) == pytest.approx(0.1)
    assert lr_at(OptimConfig(lr=0.2, schedule="constant"), 0.9) == 0.2


@given(
    schedule=st.sampled_from(["multistep", "onecycle", "cosine", "constant"]),
    total=st.integers(1, 10_000_000),
    data=st.data(),
)
def test_every_rate_is_positive_and_at_most_the_peak(schedule, total, data):
    progress = data.draw(st.integers(0, total - 1)) / total
    assert 0 < lr_at(OptimConfig(lr=0.3, schedule=schedule), progress) <= 0.3
